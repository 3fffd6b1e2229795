"""The CPU backend: routing, experts and their gradients for float32, bfloat16 and float16 tensors."""

from __future__ import annotations

import torch

from flex_kernels.cpu import ops
from flex_kernels.cpu.experts import experts_backward, experts_forward
from flex_kernels.cpu.route import route, route_backward

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
