"""backends() tells what this machine can run, and why not the rest."""

import os
import subprocess
import sys

import pytest
import torch
from cases import make_case

from flex_kernels import backends, flex_moe
from flex_kernels.dispatch import resolve_backend


def test_every_backend_is_listed_with_a_sentence():
    found = backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"].available and found["cpu"].available
    assert all(len(status.detail.split()) > 2 for status in found.values())


def test_an_available_backend_runs_and_a_missing_one_says_why():
    case = make_case()
    for name in ("reference", "cpu"):
        assert torch.isfinite(flex_moe(*vars(case).values(), backend=name)).all()
    for name in ("triton", "cuda"):
        if not backends()[name].available:
            with pytest.raises(RuntimeError, match=rf"backend='{name}' cannot run on cpu: .+"):
                flex_moe(*vars(case).values(), backend=name)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "reference")],
    ids=str,
)
def test_auto_takes_the_fused_backend_of_the_device(dtype, name):
    assert resolve_backend("auto", torch.device("cpu"), dtype) == name


def test_auto_falls_back_to_the_reference_on_an_unknown_device():
    assert resolve_backend("auto", torch.device("meta"), torch.float32) == "reference"


def test_the_environment_chooses_an_instruction_set_or_names_what_can_run():
    ops = pytest.importorskip("flex_kernels.cpu.native", reason="the native extension is not built")
    code = "from flex_kernels.cpu import native, ops; print(native.isa())"
    for name in (ops.isas()[-1], "sse9"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"FLEX_KERNELS_ISA": name},
            capture_output=True,
            text=True,
        )
        if name == "sse9":
            assert "FLEX_KERNELS_ISA='sse9' is not one of" in done.stderr and ops.isas()[0] in done.stderr
        else:
            assert done.stdout.strip() == name
