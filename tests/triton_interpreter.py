"""Whether this Triton's interpreter works at all with this NumPy: some releases fail on the simplest kernel.

python tests/triton_interpreter.py      runs that kernel; the error is on the last line
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest


@functools.cache
def interpreter_problem() -> str:
    """Empty where the interpreter runs, else which version fails and how."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not done.returncode:
        return ""
    import numpy
    import triton

    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: {error}"


def need_interpreter() -> None:
    """Skips the test where the interpreter itself is broken; never on the version that requirements pin."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if interpreter_problem():
        assert not triton.__version__.startswith("3.7."), interpreter_problem()
        pytest.skip(interpreter_problem())


def main() -> None:
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(count_ptr, out_ptr, N: tl.constexpr):
        n = tl.arange(0, N)
        count = tl.load(count_ptr).to(tl.int64)
        for step in range(0, count):
            tl.store(out_ptr + n, n + step, mask=(n < N - 1) & (count > 0))

    out = torch.full((8,), -1, dtype=torch.int32)
    kernel[(1,)](torch.tensor([3], dtype=torch.int32), out, 8)
    assert out.tolist() == [2, 3, 4, 5, 6, 7, 8, -1], out


if __name__ == "__main__":
    main()
