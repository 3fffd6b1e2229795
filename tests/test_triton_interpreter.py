"""The Triton suites: in Triton's interpreter on any machine, and compiled where there is a GPU.

Whether kernels are interpreted is fixed when Triton is first imported, so the suites run in a process of
their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import need_interpreter

SUITES = ("triton_suite_kernels.py", "triton_suite_layer.py", "triton_suite_codes.py")


def run_suite(suite: str, interpret: bool) -> None:
    here = Path(__file__).parent
    # cuBLAS wants a fixed workspace while the suites have torch poison fresh memory.
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        str(here / suite),
    ]
    done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_passes_in_the_interpreter(suite):
    need_interpreter()
    run_suite(suite, interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_passes_on_the_gpu(suite):
    run_suite(suite, interpret=False)
