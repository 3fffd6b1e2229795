"""ERNIE 4.5: softmax router whose choice is biased, always normalised; ungated shared experts, or none."""

from __future__ import annotations

from typing import Any

from torch import nn

from flex.models.base import Adapter
from flex_kernels import Router


class ErnieAdapter(Adapter):
    def router(self, block: nn.Module) -> Router:
        gate: Any = block.gate
        # [1, E]: one group of experts. transformers keeps a sum of weights from being less than norm_min,
        # 1e-12, which the sum of chosen softmax scores never is.
        return Router(
            gate.weight, gate.top_k, normalize=True, bias=gate.moe_statics.e_score_correction_bias[0]
        )


ADAPTER = ErnieAdapter("ernie4_5_moe", ("Ernie4_5_MoeSparseMoeBlock",), shared="shared_experts")
