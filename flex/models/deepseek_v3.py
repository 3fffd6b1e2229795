"""DeepSeek-V3: sigmoid router, its choice biased and limited to groups; ungated shared experts."""

from __future__ import annotations

from typing import Any

from torch import nn

from flex.models.base import Adapter
from flex.models.deepseek_v2 import LATENT_ATTENTION
from flex_kernels import Router


class DeepseekV3Adapter(Adapter):
    def router(self, block: nn.Module) -> Router:
        gate: Any = block.gate
        return Router(
            gate.weight,
            gate.top_k,
            normalize=bool(gate.norm_topk_prob),
            score="sigmoid",
            scale=gate.routed_scaling_factor,
            bias=self.bias(block),
        )

    def bias(self, block: nn.Module) -> Any:
        """Added to the scores for the choice alone, or None."""
        gate: Any = block.gate
        return gate.e_score_correction_bias

    def router_decides(self, block: nn.Module) -> bool:
        gate: Any = block.gate
        return gate.topk_group < gate.num_group


ADAPTER = DeepseekV3Adapter(
    "deepseek_v3", ("DeepseekV3MoE",), shared="shared_experts", attention=LATENT_ATTENTION
)
