"""The host's part of a layer, with a driver that does nothing: launches, and compiled forms of kernels."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import gpu_host_time, pretend_gpu  # noqa: E402
from benchmarks.gpu_layers import make_problem, ours  # noqa: E402
from flex_kernels.triton import direct  # noqa: E402
from flex_kernels.triton.combine import combine, combine_kernel  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the stub of the driver needs a C compiler"),
    pytest.mark.skipif(not direct.KNOWN_LAUNCHER, reason=f"Triton {triton.__version__} launches its own way"),
]
PRODUCTS = {"up_swiglu_kernel": 2, "grouped_gemm_kernel": 2}


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(direct, "FORMS", {})
    with pretend_gpu.pretend_gpu() as start:
        yield start


def problem(tokens=16):
    return make_problem(gpu_host_time.LAYER, tokens, "cpu", torch.bfloat16)


def combine_arguments(x_TH, gate_T):
    T = x_TH.shape[0]
    return x_TH, torch.zeros(T, 1, dtype=torch.int32), None, x_TH, gate_T, None, None, "add"


def test_a_layer_with_a_personal_expert_is_seven_launches_and_its_backward_nine(counting):
    p = problem()
    layer = gpu_host_time.module(p, "cuda")
    x_TH = p.x_TH.requires_grad_()
    for _ in range(2):
        count = counting()
        y_TH = layer(x_TH)
        assert count.since() == PRODUCTS | {"route_fused": 1, "permute": 1, "combine": 1}
        count = counting()
        y_TH.backward(torch.ones_like(y_TH))
        single = ("combine", "score_grads_kernel", "route_backward_kernel")
        assert count.since() == PRODUCTS | {"down_backward_kernel": 2} | dict.fromkeys(single, 1)


def test_a_gated_shared_expert_is_two_launches_more(counting):
    p = problem()
    layer = gpu_host_time.module(p, "cuda", shared=True)
    layer(p.x_TH)
    count = counting()
    layer(p.x_TH)
    assert sum(count.since().values()) == 9


def test_experts_with_a_given_routing_launch_no_routing_kernel(counting):
    p = problem()
    forward = ours(p, "cuda", "recompute")
    forward(p.x_TH)
    count = counting()
    forward(p.x_TH)
    assert count.since() == {"up_swiglu_kernel": 1, "grouped_gemm_kernel": 1, "permute": 1, "combine": 1}


def test_a_launch_that_was_seen_before_does_not_ask_triton_again(counting, monkeypatch):
    arguments = combine_arguments(torch.zeros(8, 64), torch.zeros(8))
    combine(*arguments)
    monkeypatch.setattr(type(combine_kernel), "run", lambda *a, **k: pytest.fail("asked Triton"))
    count = counting()
    combine(*arguments)
    assert count.since() == {"combine_kernel": 1}


def test_rows_that_do_not_start_at_16_bytes_have_a_compiled_form_of_their_own(counting):
    storage = torch.zeros(8 * 64 + 1)
    for x_TH in (storage[:-1].view(8, 64), storage[1:].view(8, 64)):
        combine(*combine_arguments(x_TH, torch.zeros(8)))
    functions = {form.function for form in direct.FORMS.values()}
    assert len(direct.FORMS) == len(functions) == 2


def test_a_gate_that_starts_anywhere_shares_the_compiled_form(counting):
    gates = torch.zeros(9)
    for gate_T in (gates[:8], gates[1:]):
        combine(*combine_arguments(torch.zeros(8, 64), gate_T))
    assert len(direct.FORMS) == 1


def test_every_dtype_has_a_compiled_form_of_its_own(counting):
    for dtype in (torch.float32, torch.bfloat16):
        combine(*combine_arguments(torch.zeros(8, 64, dtype=dtype), torch.zeros(8)))
    assert len({form.function for form in direct.FORMS.values()}) == 2


def test_a_profiler_hears_of_launches_that_were_seen_before(counting):
    arguments = combine_arguments(torch.zeros(8, 64), torch.zeros(8))
    combine(*arguments)
    heard = []
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(heard.append)
    try:
        combine(*arguments)
    finally:
        hook.remove(heard.append)
    assert len(heard) == 1


def test_the_command_prints_times_and_writes_launches_of_both_passes(tmp_path, capsys):
    out = tmp_path / "host.json"
    gpu_host_time.main(["--rounds", "2", "--tokens", "16", "--first-tokens", "16", "--out", str(out)])
    assert "Not a GPU figure" in capsys.readouterr().out
    written = json.loads(out.read_text())
    first, (record,) = written["first_call"], written["records"]
    assert first["tokens"] == 16 and len(first["forward_s"]) == len(first["backward_s"]) == 2
    assert sum(record["launches"]["cuda, whole layer: forward"].values()) == 7
    assert sum(record["launches"]["triton, whole layer: both"].values()) == 16
    assert all(us > 0 for us in record["microseconds"].values())


def test_a_machine_with_a_gpu_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        pytest.raises(RuntimeError, match=r"measure there with benchmarks.gpu_suite"),
        pretend_gpu.pretend_gpu(),
    ):
        pass
