"""Granite MoE: softmax over the chosen logits alone, which is a softmax router with normalised weights.

GraniteMoeShared has the same block, beside a shared MLP that the decoder layer adds by itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flex.models.base import Adapter


class GraniteAdapter(Adapter):
    def decide(self, block: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        found = self.gate(block)(x_TH)
        # transformers 5.17 returns the ids first and the logits last, 5.23 the other way round.
        return (found[0], found[2]) if found[0].is_floating_point() else (found[2], found[0])

    def gate(self, block: nn.Module) -> Any:
        return block.router


def adapter(architecture: str, block_class: str) -> Adapter:
    return GraniteAdapter(
        architecture,
        (block_class,),
        normalize=True,
        stored=(".experts.", ".block_sparse_moe.input_linear.", ".block_sparse_moe.output_linear."),
    )


ADAPTER = adapter("granitemoe", "GraniteMoeMoE")
SHARED_ADAPTER = adapter("granitemoeshared", "GraniteMoeSharedMoE")
