"""The CUDA backend as a whole: what it says of itself, what it hands to Triton, and the layer through it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation import emulation_fixture, needs_compiler  # noqa: F401
from triton_interpreter import need_interpreter

from flex_kernels import cuda
from flex_kernels.cuda import ops


class FakeNative:
    """A loaded extension whose CUDA runtime answers what a test wants."""

    def __init__(self, error: int, count: int):
        self.answer = error, count

    def device_count(self) -> tuple[int, int]:
        return self.answer

    def error_string(self, code: int) -> str:
        return f"reason {code}"


class FakeKernels:
    def __init__(self, error: int = 0, count: int = 1):
        self.native = FakeNative(error, count)


@pytest.fixture
def complete(monkeypatch):
    """A machine that has everything."""
    monkeypatch.setattr(cuda, "missing_extension", lambda: "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(ops, "kernels", FakeKernels)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: object() if n == "triton" else found(n))
    return monkeypatch


def test_a_complete_machine_can_run_it(complete):
    assert cuda.status("cuda") == ""


def test_cpu_tensors_are_refused_in_a_sentence(complete):
    assert cuda.status("cpu") == "the CUDA kernels run on CUDA devices, not on cpu"


def test_an_extension_that_was_not_built_is_named_with_the_remedy(complete):
    complete.undo()
    complete.setattr(importlib.util, "find_spec", lambda name: None)
    reason = cuda.missing_extension()
    assert "nvcc was not found" in reason and "put nvcc on PATH" in reason


def test_an_extension_that_does_not_load_says_why(complete):
    complete.undo()

    def broken(name):
        raise ImportError("libfoo.so: cannot open")

    complete.setattr(importlib.util, "find_spec", lambda name: object())
    complete.setattr(importlib, "import_module", broken)
    assert cuda.missing_extension() == "the CUDA extension is built but does not load: libfoo.so: cannot open"


def test_each_missing_part_is_named(complete):
    complete.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert cuda.status("cuda") == "Some GPU has compute capability 7.5, 8.0 or above is needed"
    complete.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.status("cuda") == "torch finds no CUDA device"
    complete.setattr(torch.version, "cuda", None)
    assert cuda.status("cuda") == f"torch {torch.__version__} is built without CUDA"
    complete.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda.status("cuda").endswith(
        "; the triton package, which runs the expert products, is not installed"
    )


def test_the_extension_s_own_runtime_has_the_last_word(complete):
    complete.setattr(ops, "kernels", lambda: FakeKernels(error=35))
    assert cuda.status("cuda") == "the extension's CUDA runtime reports: reason 35"
    complete.setattr(ops, "kernels", lambda: FakeKernels(count=0))
    assert cuda.status("cuda") == "the extension's CUDA runtime finds no device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.skipif(bool(cuda.missing_extension()), reason="the CUDA extension is not built")
def test_the_built_extension_loads_and_reports_that_there_is_no_device():
    native = ops.kernels().native
    error, count = native.device_count()
    assert error != 0 and count == 0
    assert native.error_string(error) != ""
    with pytest.raises(ValueError, match="ids is on cpu, this kernel wants it on cuda"):
        ops.permute(torch.zeros(2, 2, dtype=torch.int32), 4)


@needs_compiler
def test_a_failed_launch_names_the_kernel_and_the_reason(emulation, monkeypatch):
    if not emulation.emulated:
        pytest.skip("replaces the kernel")
    monkeypatch.setattr(emulation.kernels.native, "permute", lambda *args: 1)
    with pytest.raises(
        RuntimeError, match=r"CUDA kernel permute on cpu failed: invalid argument \(error 1\)"
    ):
        emulation.kernels.permute(torch.zeros(2, 2, dtype=torch.int32), 4)


@needs_compiler
def test_more_experts_than_the_kernels_take_go_to_triton(emulation, monkeypatch):
    triton = pytest.importorskip("flex_kernels.triton", reason="triton is not installed")
    monkeypatch.setattr(ops, "kernels", lambda: emulation.kernels)
    calls = []
    monkeypatch.setattr(triton, "route", lambda *args: calls.append(args[5]))
    settings = (False, "softmax", 1.0, False)
    for experts, top_k in ((513, 2), (64, 33)):
        x_TH, weight_EH = torch.zeros(3, 4), torch.zeros(experts, 4)
        cuda.route(x_TH, weight_EH, None, torch.zeros(0, 4), torch.zeros(0), top_k, *settings)
    assert calls == [2, 33]
    ids_TK = torch.tensor([[600, 3], [3, 601]], dtype=torch.int32)
    sorted_by = []
    groups = importlib.import_module("flex_kernels.triton.groups")
    monkeypatch.setattr(groups, "sort_rows", lambda *args: sorted_by.append(args[1:]))
    cuda.sort_rows(ids_TK, 601, 16)
    assert sorted_by == [(601, 16)]


@needs_compiler
def test_the_layer_s_values_and_gradients_through_this_backend():
    pytest.importorskip("triton", reason="triton is not installed")
    here = Path(__file__).parent
    interpret = "0" if torch.cuda.is_available() else "1"
    if interpret == "1":
        need_interpreter()
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", str(here / "cuda_suite_layer.py")]
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
