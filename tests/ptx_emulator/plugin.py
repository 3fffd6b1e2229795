"""For pytest: every test's Triton kernels run on an emulated GPU, of the capability in FLEX_EMULATED_GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .gpu import Gpu, emulated_gpu


@pytest.fixture(autouse=True)
def gpu() -> Iterator[Gpu]:
    with emulated_gpu(int(os.environ["FLEX_EMULATED_GPU"])) as found:
        yield found
    assert not found.hazards
