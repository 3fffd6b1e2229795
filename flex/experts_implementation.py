"""The fused layer as an experts implementation of transformers, for frozen models that are not grafted.

``model.set_experts_implementation("flex_kernels")``, ``from_pretrained(...,
experts_implementation="flex_kernels")``. The model keeps its router and its shared expert; the routed experts
run on the fused layer.

Letters: T tokens, H hidden, E routed experts, K chosen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flex.models.base import check_experts
from flex_kernels import Experts, Routed, flex_moe
from flex_kernels.modules import record_of

NAME = "flex_kernels"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """sum_k weights_k E_{ids_k}(x).

    Args:
        self: transformers' experts module: ``gate_up_proj`` [E, 2I, H], ``down_proj`` [E, H, I],
            plain or quantised.
        hidden_states: [T, H].
        top_k_index: [T, K]; the value E marks a token of another rank, which contributes nothing.
        top_k_weights: [T, K].

    Raises:
        Unsupported: experts with biases, transposed or interleaved weights, no gate, or an activation but
            SiLU.
    """
    check_experts(self)
    routed = Routed(top_k_index, top_k_weights)
    experts = Experts(record_of(self.gate_up_proj), record_of(self.down_proj))
    return flex_moe(hidden_states, routed, experts)


def register() -> None:
    """Make the name known to transformers; again does no harm."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
