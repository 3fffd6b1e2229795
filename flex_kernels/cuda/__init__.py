"""The CUDA backend: Triton's grouped expert products between this project's own CUDA routing kernels.

route, permute and combine are CUDA C++ (csrc/cuda, :mod:`flex_kernels.cuda.ops`); the products and their
backward are those of :mod:`flex_kernels.triton`, as is the routing beyond 512 experts or 32 choices.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flex_kernels.cuda import ops

__all__ = ["describe", "experts_backward", "experts_forward", "route", "route_backward", "status"]

EXTENSION = "flex_kernels._cuda_ops"


def missing_extension() -> str:
    """Why the native module cannot be loaded; "" when it can."""
    if importlib.util.find_spec(EXTENSION) is None:
        return (
            "the CUDA extension is not built, because nvcc was not found when flex-kernels was installed: "
            "put nvcc on PATH (or set CUDA_HOME) and install again"
        )
    try:
        importlib.import_module(EXTENSION)
    except ImportError as error:
        return f"the CUDA extension is built but does not load: {error}"
    return ""


def missing_device() -> str:
    """Why no GPU can be used; "" when the current one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, 8.0 or above is needed"
        )
    return ""


def runtime_error() -> str:
    """What the extension's own CUDA runtime finds wrong; "" when it sees a device."""
    native = ops.kernels().native
    error, count = native.device_count()
    if error:
        return f"the extension's CUDA runtime reports: {native.error_string(error)}"
    return "" if count else "the extension's CUDA runtime finds no device"


def status(device_type: str) -> str:
    """All that keeps this backend from tensors of ``device_type``, in one line; "" when nothing does."""
    if device_type != "cuda":
        return f"the CUDA kernels run on CUDA devices, not on {device_type}"
    extension, device = missing_extension(), missing_device()
    reasons = [extension, device]
    if not extension and not device:
        reasons.append(runtime_error())
    if importlib.util.find_spec("triton") is None:
        reasons.append("the triton package, which runs the expert products, is not installed")
    return "; ".join(reason for reason in reasons if reason)


def describe() -> str:
    """What the backend runs on, in a few words."""
    from flex_kernels import triton

    return f"CUDA routing kernels, expert products by {triton.describe()}"


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
    """As :func:`flex_kernels.autograd.route`."""
    kernels = ops.kernels()
    args = (x_TH, weight_EH, bias_E, gate_weight_GH, gate_bias_G, top_k, normalize, score, scale, want_logits)
    if weight_EH.shape[0] > kernels.native.MAX_EXPERTS or top_k > kernels.native.MAX_TOP_K:
        from flex_kernels import triton

        return triton.route(*args)
    return kernels.route(*args)


def sort_rows(ids_TK: Tensor, experts: int, block_m: int) -> Tensor:
    """As :func:`flex_kernels.triton.groups.sort_rows`, tile table included."""
    kernels = ops.kernels()
    if experts > kernels.native.MAX_EXPERTS:
        from flex_kernels.triton import groups

        known_TK = ids_TK.clamp(-1, experts).remainder(experts + 1)
        return groups.sort_rows(known_TK, experts, block_m)
    return kernels.sort_rows(ids_TK, experts, block_m)


@cache
def products() -> Any:
    """The Triton backend, whose grouped products this one shares; imported late: triton may be missing."""
    from flex_kernels import triton

    return triton


@cache
def helpers() -> Any:
    """The pieces of the Triton backend that these kernels replace."""
    from flex_kernels.triton.experts import Helpers

    return Helpers(sort=sort_rows, combine=ops.combine)


def route_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`flex_kernels.autograd.route_backward`, less its last argument."""
    return products().route_backward(*args)


def experts_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`flex_kernels.autograd.experts`, less its last two arguments."""
    return products().experts_forward(*args, helpers=helpers())


def experts_backward(*args: Any) -> tuple[Tensor, ...]:
    """As :func:`flex_kernels.autograd.experts_backward`, less its last argument."""
    return products().experts_backward(*args, helpers=helpers())
