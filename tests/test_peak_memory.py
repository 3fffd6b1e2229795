"""The high-water mark of the process: it sees what was held for a moment, and starts anew each time."""

import subprocess
import sys

import pytest

from flex.memory import PeakMemory

MIB = 2**20
# In a process of its own: what other tests freed may still be resident, and would be used again unseen.
HOLD_200_MIB = f"""
import torch
from flex.memory import PeakMemory
start = PeakMemory().read()
peak = PeakMemory()
held = torch.ones(200 * {MIB} // 4)
del held
print(peak.read() - start, PeakMemory().read() - start)
"""


def test_memory_held_for_a_moment_is_seen_and_not_blamed_on_what_follows():
    if PeakMemory().kind != "resident":
        pytest.skip("this system does not let a process reset its high-water mark")
    done = subprocess.run([sys.executable, "-c", HOLD_200_MIB], capture_output=True, text=True, check=True)
    during, after = map(int, done.stdout.split())
    assert 190 * MIB < during < 230 * MIB
    assert after < 50 * MIB
