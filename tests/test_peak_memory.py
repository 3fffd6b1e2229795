"""The high-water mark of the process: it sees what was held for a moment, and starts anew each time."""

import pytest
import torch

from flex.memory import PeakMemory

MIB = 2**20


def test_memory_held_for_a_moment_is_seen_and_not_blamed_on_what_follows():
    if PeakMemory().kind != "resident":
        pytest.skip("this system does not let a process reset its high-water mark")
    start = PeakMemory().read()
    peak = PeakMemory()
    held = torch.ones(200 * MIB // 4)
    del held
    assert 190 * MIB < peak.read() - start < 230 * MIB
    assert PeakMemory().read() - start < 50 * MIB
