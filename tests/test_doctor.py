"""flex.doctor and flex.selfcheck: what they find, and that a wrong backend cannot pass."""

from __future__ import annotations

import json
import os

import pytest
import torch

from flex import cli, doctor, selfcheck
from flex.doctor import Finding
from flex.selfcheck import DTYPES, self_check
from flex_kernels import BackendStatus


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_passes_its_own_check(dtype):
    found = self_check("reference", dtype)
    assert found.passed
    # float32 and bfloat16 cannot be exact: an error of zero would mean that nothing was compared.
    assert 0 < found.value_error < found.value_allowed
    assert 0 < found.gradient_error < found.gradient_allowed


def wrong_by(what: str, factor: float):
    """``flex_moe`` whose value, or the gradient of whose input, is off by ``factor``."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * factor if what == "value" else x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor if what == "gradient" else grad

    def flex_moe(x, router, experts, personal, shared, backend):
        y = selfcheck.reference.moe(Off.apply(x), router, experts, personal, shared, "add")[0]
        return y

    return flex_moe


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_a_backend_that_is_slightly_wrong_fails(monkeypatch, what):
    monkeypatch.setattr(selfcheck, "flex_moe", wrong_by(what, 1.001))
    found = self_check("cpu", torch.float32)
    assert not found.passed
    assert (found.value_error > found.value_allowed) == (what == "value")
    assert found.gradient_error > found.gradient_allowed


def test_a_backend_that_returns_nan_fails(monkeypatch):
    monkeypatch.setattr(selfcheck, "flex_moe", wrong_by("value", float("nan")))
    assert not self_check("cpu", torch.float32).passed


def test_a_backend_that_raises_fails_with_its_message(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("illegal instruction\nand more")

    monkeypatch.setattr(selfcheck, "flex_moe", broken)
    found = self_check("cpu", torch.float32)
    assert not found.passed
    assert found.problem == "RuntimeError: illegal instruction"


def test_findings_name_versions_machine_and_every_backend():
    findings = list(doctor.examine(check=False))
    topics = {finding.topic for finding in findings}
    assert {"versions", "machine", "GPU", "backends"} <= topics
    versions = {f.name: f.detail for f in findings if f.topic == "versions"}
    assert versions["torch"] == torch.__version__
    assert [f.name for f in findings if f.topic == "backends"] == ["reference", "cpu", "triton", "cuda"]
    assert any(f.name == "CPU" and f.detail for f in findings)


def test_whatever_is_missing_says_why_and_optional_packages_say_how_to_get_them(monkeypatch):
    import importlib.metadata

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    peft = next(f for f in doctor.versions() if f.name == "peft")
    assert peft.state == "missing"
    assert peft.detail == "not installed; needed for LoRA"
    assert peft.advice == "pip install 'flex-kernels[federated]'"


def test_a_cpu_build_of_torch_beside_a_gpu_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "output_of", lambda *command: "NVIDIA H200, 570.1, 143771 MiB")
    (finding,) = doctor.gpus()
    assert finding.state == "missing"
    assert "CPU build" in finding.detail and "NVIDIA H200" in finding.detail
    assert "CUDA build of torch" in finding.advice


@pytest.mark.parametrize(
    ("capability", "version", "notes"),
    [(90, "3.6.0", 1), (100, "3.7.0+git1", 1), (90, "3.7.1", 0), (90, "3.10.0", 0), (86, "3.6.0", 0)],
)
def test_a_triton_that_leaves_a_fence_out_is_noted_where_it_matters(capability, version, notes):
    found = list(doctor.triton_notes(capability, version))
    assert len(found) == notes
    assert all(f.state == "note" and version in f.detail and "3.7.1" in f.advice for f in found)


def test_memory_and_processor_are_those_of_the_system():
    free, total = doctor.memory()
    assert 0 < free <= total
    model, flags = doctor.cpu_model_and_flags()
    assert model
    if os.path.exists("/proc/cpuinfo"):
        assert flags


def some_backends(**available):
    return {
        name: BackendStatus(name, fine, "fine" if fine else "no GPU here") for name, fine in available.items()
    }


def test_exit_code_is_zero_when_only_optional_parts_are_missing(monkeypatch, capsys):
    monkeypatch.setattr("flex_kernels.backends", lambda: some_backends(reference=True, cuda=False))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no GPU here" in out
    assert "Ready: reference." in out
    assert "reference, bfloat16" in out


def test_exit_code_is_one_when_a_backend_computes_wrongly(monkeypatch, capsys):
    monkeypatch.setattr("flex_kernels.backends", lambda: some_backends(reference=True, cpu=True))
    monkeypatch.setattr(selfcheck, "flex_moe", wrong_by("value", 1.01))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "failed: cpu, float32" in out
    assert "backend='reference' is safe" in out


def test_json_output_is_the_findings(monkeypatch, capsys):
    monkeypatch.setattr("flex_kernels.backends", lambda: some_backends(reference=True))
    assert cli.main(["doctor", "--json", "--no-check"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert Finding("backends", "reference", "ok", "fine") in [Finding(**f) for f in findings]
    assert not any(f["topic"] == "self-check" for f in findings)
