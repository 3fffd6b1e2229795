"""The native extension and what every call of it needs: dtypes as it counts them, and addresses of tensors
that were looked at.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

# After torch: its own libgomp must be the one in the process, so that both share one pool of threads.
_cpu_ops: Any = importlib.import_module("flex_kernels._cpu_ops")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a dense CPU tensor of this dtype and shape; 0 for None.

    Raises:
        ValueError: it is anything else. The kernels read and write without looking.
    """
    if t is None:
        return 0
    if t.dtype != dtype or t.device.type != "cpu" or tuple(t.shape) != shape or not t.is_contiguous():
        given = f"{list(t.shape)} {t.dtype} on {t.device}, strides {list(t.stride())}"
        raise ValueError(f"{name} must be a dense {list(shape)} {dtype} on the CPU, got {given}")
    return t.data_ptr()


def dtype_code(name: str, t: Tensor) -> int:
    if t.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    return DTYPES[t.dtype]
