"""What holds for every test."""

import pytest

from flex_kernels.cpu import fused


@pytest.fixture(autouse=True)
def small_calls_are_cut_as_large_ones(monkeypatch):
    """Else every layer of a test's size would be one batch of hidden rows."""
    monkeypatch.setattr(fused, "FEWEST_ELEMENTS", 0)
