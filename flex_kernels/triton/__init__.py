"""The Triton backend: grouped products with their epilogues, for NVIDIA GPUs from compute capability 8.0.

Runs on CPU tensors only inside Triton's interpreter (TRITON_INTERPRET=1 before the first import), for tests.
"""

from __future__ import annotations

import importlib.util

import torch

MISSING = (
    ""
    if importlib.util.find_spec("triton")
    else "the triton package is not installed (it comes with a CUDA torch)"
)
if not MISSING:
    from flex_kernels.triton.experts import Helpers, experts_backward, experts_forward
    from flex_kernels.triton.route import route
    from flex_kernels.triton.route_backward import route_backward

__all__ = ["Helpers", "describe", "experts_backward", "experts_forward", "route", "route_backward", "status"]


def interpreting() -> bool:
    """Whether the kernels of this process are interpreted: decided by Triton when they were decorated."""
    from triton.runtime.interpreter import InterpretedFunction

    from flex_kernels.triton.route import route_kernel

    return isinstance(route_kernel, InterpretedFunction)


def status(device_type: str) -> str:
    """Why this backend cannot run on tensors of ``device_type``; "" when it can."""
    if MISSING:
        return MISSING
    if device_type == "cpu":
        return "" if interpreting() else "Triton's kernels need a CUDA device (its interpreter is off)"
    if device_type != "cuda":
        return f"Triton's kernels run on CUDA devices, not on {device_type}"
    if not torch.cuda.is_available():
        return "no CUDA device: " + (
            "this torch is built without CUDA" if torch.version.cuda is None else "none visible"
        )
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"compute capability 8.0 or above is needed, this GPU has {major}.{minor}"


def describe() -> str:
    """What the backend runs on, in a few words."""
    import triton

    if interpreting():
        return f"triton {triton.__version__}, interpreter"
    major, minor = torch.cuda.get_device_capability()
    return f"triton {triton.__version__} on {torch.cuda.get_device_name()} (sm_{major}{minor})"
