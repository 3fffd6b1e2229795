"""The CPU backend: routing, experts and their gradients for float32, bfloat16 and float16 tensors on the CPU.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates, R = E + G rows of the thin product.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flex_kernels import routing
from flex_kernels.cpu import ops
from flex_kernels.cpu.experts import experts_backward, experts_forward
from flex_kernels.routing import thin_product

__all__ = ["describe", "experts_backward", "experts_forward", "route", "route_backward", "status"]


def status(device_type: str) -> str:
    """Empty when this backend runs on tensors of ``device_type``, else the reason in one sentence."""
    return (
        "" if device_type == "cpu" else f"the cpu backend computes on CPU tensors only, not on {device_type}."
    )


def describe() -> str:
    """The instruction set and the number of threads in use."""
    threads = f"{torch.get_num_threads()} threads"
    if ops.kernels is ops.fallback:
        return f"plain torch, {threads}; the native extension is missing: {ops.BUILD_HINT}"
    engine = "fused kernels" if ops.fused() else "torch GEMMs"
    products = ", int8 products" if ops.int8_products() else ""
    return f"{engine}, {ops.kernels.isa()}{products}, {threads}"


def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    gate_weight_GH: Tensor,
    gate_bias_G: Tensor,
    top_k: int,
    normalize: bool,
    score: str,
    scale: float,
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids_TK int32, weights_TK float32, gates_GT float32, logits_TE float32 or [0, E]); see
    ``autograd.route``.
    """
    ops.warn_if_missing()
    experts = weight_EH.shape[0]
    logits_TR = thin_product(x_TH, torch.cat([weight_EH.float(), gate_weight_GH.float()]))
    if experts:
        ids_TK, weights_TK = ops.kernels.choose(logits_TR, experts, bias_E, top_k, normalize, score, scale)
    else:
        ids_TK = torch.empty(x_TH.shape[0], top_k, dtype=torch.int32)
        weights_TK = torch.empty(x_TH.shape[0], top_k)
    gates_GT = ops.kernels.open_gates(logits_TR, experts, gate_bias_G)
    logits_TE = logits_TR[:, :experts].contiguous() if want_logits else logits_TR.new_empty(0, experts)
    return ids_TK, weights_TK, gates_GT, logits_TE


# Its gradient of x lives within a step.
route_backward = partial(routing.route_backward, empty_like=lambda t: ops.kernels.empty_like(t))
