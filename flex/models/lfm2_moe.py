"""LFM2 MoE: sigmoid router with a choice bias, between attention and short convolutions; no shared expert."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flex.models.deepseek_v3 import DeepseekV3Adapter


class Lfm2Adapter(DeepseekV3Adapter):
    def bias(self, block: nn.Module) -> Any:
        return block.expert_bias if self.gate(block).use_expert_bias else None

    def router_decides(self, block: nn.Module) -> bool:
        # Chosen scores are divided by their sum and 1e-6, which the fused router does not add.
        return bool(self.gate(block).norm_topk_prob)

    def decide(self, block: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE, _, ids_TK = self.gate(block)(x_TH, self.bias(block))
        return logits_TE, ids_TK


ADAPTER = Lfm2Adapter(
    "lfm2_moe",
    ("Lfm2MoeSparseMoeBlock",),
    attention=("q_proj", "k_proj", "v_proj", "in_proj", "out_proj"),
    floor=1e-6,
    packs=False,
)
