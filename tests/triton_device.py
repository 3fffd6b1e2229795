"""Where the Triton suites run their tensors, and memory that shows every element nobody wrote."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flex_kernels.quantize import Quantized

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "FLEX_EMULATED_GPU" in os.environ
DEVICE = "cpu" if INTERPRETED or EMULATED else "cuda"
# The interpreter multiplies bfloat16 wrongly, without a word.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def to_device(case):
    """The case with every tensor on DEVICE."""

    def move(record):
        """A record with its tensors moved, and its quantised weights, which are records of tensors."""
        held = {k: v for k, v in vars(record).items() if isinstance(v, (Tensor, Quantized))}
        moved = {k: v.detach().to(DEVICE) if isinstance(v, Tensor) else move(v) for k, v in held.items()}
        return replace(record, **moved)

    parts = {n: move(r) for n, r in vars(case).items() if r is not None and not isinstance(r, Tensor)}
    return replace(case, x_TH=case.x_TH.detach().to(DEVICE), **parts)


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin return NaN, so that a result depends on nothing that was not written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
