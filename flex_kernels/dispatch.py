"""Which backends this machine can run, and one sentence for each that it cannot.

A backend is a module with four functions of the same names and signatures as the custom ops in
:mod:`flex_kernels.autograd`: ``route``, ``route_backward``, ``experts_forward``, ``experts_backward``; and a
function ``status(device_type) -> str`` that returns "" when it can run on tensors of that device, else the
reason.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
# The order in which "auto" tries the backends of a device.
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine.

    Attributes:
        name: reference, cpu, triton or cuda.
        available: whether ``flex_moe(..., backend=name)`` can run here.
        detail: what it uses (instruction set, GPU), or in one sentence why it is missing.
    """

    name: str
    available: bool
    detail: str


@cache
def backend_module(name: str) -> ModuleType:
    """The module of a fused backend; imported on first use, so that a missing part costs nothing."""
    return importlib.import_module(f"flex_kernels.{name}")


def unavailable(name: str, device_type: str) -> str:
    """Why ``name`` cannot run on tensors of ``device_type``; "" when it can."""
    return "" if name == "reference" else backend_module(name).status(device_type)


@lru_cache
def first_answer(name: str, device_type: str) -> str:
    """:func:`unavailable` as this process first found it: every layer asks, and finding out takes long."""
    return unavailable(name, device_type)


@torch.compiler.assume_constant_result
def obstacle(name: str, device_type: str) -> str:
    """:func:`first_answer`, as a constant to a tracer."""
    return first_answer(name, device_type)


def backends() -> dict[str, BackendStatus]:
    """What this machine can run: a :class:`BackendStatus` a name, in order reference, cpu, triton, cuda."""
    found = {"reference": BackendStatus("reference", True, "plain torch, any device, float32 to float64")}
    for name in NAMES[1:]:
        reason = unavailable(name, DEVICE_OF[name])
        found[name] = BackendStatus(name, not reason, reason or backend_module(name).describe())
    return found


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves ``backend=name`` for tensors of this device and dtype.

    Raises:
        ValueError: the name is unknown, or the backend does not compute in ``dtype``.
        RuntimeError: the backend cannot run on ``device``; the message says why.
    """
    if name == "auto":
        if dtype not in FUSED_DTYPES:
            return "reference"
        return next(n for n in PREFERENCE.get(device.type, ("reference",)) if not obstacle(n, device.type))
    if name not in NAMES:
        raise ValueError(f"backend={name!r} is not one of 'auto', {', '.join(map(repr, NAMES))}")
    if name == "reference":
        return name
    if dtype not in FUSED_DTYPES:
        raise ValueError(f"backend={name!r} computes in float32, bfloat16 or float16, x is {dtype}")
    reason = obstacle(name, device.type)
    if reason:
        raise RuntimeError(f"backend={name!r} cannot run on {device.type}: {reason}")
    return name
