"""DeepSeek-V2: softmax router times a scale, greedy or limited to groups; ungated shared experts."""

from __future__ import annotations

from typing import Any

from torch import nn

from flex.models.base import Adapter, Unsupported
from flex_kernels import Router

LATENT_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
METHODS = ("greedy", "group_limited_greedy")


class DeepseekV2Adapter(Adapter):
    def check(self, block: nn.Module) -> None:
        gate: Any = block.gate
        if gate.topk_method not in METHODS:
            raise Unsupported(
                f"topk_method={gate.topk_method!r} is not one of {', '.join(map(repr, METHODS))}"
            )
        super().check(block)

    def router(self, block: nn.Module) -> Router:
        gate: Any = block.gate
        # transformers' router of this architecture never normalises, whatever norm_topk_prob says.
        return Router(gate.weight, gate.top_k, normalize=False, scale=gate.routed_scaling_factor)

    def router_decides(self, block: nn.Module) -> bool:
        gate: Any = block.gate
        return gate.topk_method == "group_limited_greedy" and gate.topk_group < gate.num_group


ADAPTER = DeepseekV2Adapter(
    "deepseek_v2", ("DeepseekV2Moe", "DeepseekV2MoE"), shared="shared_experts", attention=LATENT_ATTENTION
)
