"""The benchmark beside other libraries' CPU kernels, without them: what it checks, keeps and says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import cpu_peers
from benchmarks.baselines import Shape, make_layer
from benchmarks.cpu_peer_kernels import OURS, Kernel, make_problem, vllm_library
from benchmarks.cpu_peers import AGREE, differences, exact, refusal
from benchmarks.timing import interleaved

TINY = Shape(H=40, I=24, E=5, K=2, normalize=True)


@pytest.fixture
def layer():
    return make_layer(TINY, torch.bfloat16)


def test_the_yardstick_is_the_routed_sum_token_by_token(layer):
    problem = make_problem(layer, 7)
    y_TH, dx_TH, dweights_TK = exact(layer, problem)
    for t in range(7):
        x_H = problem.x_TH[t].double().requires_grad_()
        outputs = []
        for e in problem.ids_TK[t].tolist():
            gate, up = (layer.gate_up[e].double() @ x_H).chunk(2)
            outputs.append(layer.down[e].double() @ (F.silu(gate) * up))
        y_H = sum(w * out for w, out in zip(problem.weights_TK[t].double(), outputs))
        (dx_H,) = torch.autograd.grad(y_H, x_H, problem.dy_TH[t].double())
        torch.testing.assert_close(y_TH[t], y_H.detach())
        torch.testing.assert_close(dx_TH[t], dx_H)
        torch.testing.assert_close(
            dweights_TK[t], torch.stack([out.detach() @ problem.dy_TH[t].double() for out in outputs])
        )


def test_the_problem_routes_to_the_best_experts_with_weights_that_sum_to_one(layer):
    problem = make_problem(layer, 33)
    logits_TE = problem.x_TH.float() @ layer.router.float().T
    best_T = logits_TE.argmax(-1)
    assert (problem.ids_TK[:, 0] == best_T).float().mean() > 0.9  # near ties round either way in bfloat16
    assert problem.ids_TK.dtype == torch.int32 and problem.ids_TK.max() < 5
    torch.testing.assert_close(problem.weights_TK.sum(-1), torch.ones(33))


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("name", OURS)
def test_layer_and_transformers_agree_with_float64_in_both_modes(layer, name, tokens):
    pytest.importorskip("transformers")
    problem, kernel = make_problem(layer, tokens), OURS[name](layer, tokens)
    wanted = exact(layer, problem)
    forward, backward = (kernel.run(mode)(problem) for mode in ("forward", "backward"))
    assert [len(forward), len(backward)] == [1, 3]
    for found in (forward, backward):
        assert max(differences(found, wanted).values()) <= AGREE


def test_a_difference_that_is_not_a_number_counts_as_infinite():
    y = torch.ones(2, 2)
    assert differences((y * float("nan"),), (y,)) == {"y": float("inf")}
    assert differences((y * 1.5, y), (y, y)) == {"y": 0.5, "dx": 0.0}


@pytest.mark.parametrize(
    ("returncode", "stderr", "said"),
    [
        (-4, "", "killed by SIGILL: an instruction that this processor lacks"),
        (-11, "noise", "killed by SIGSEGV"),
        (1, "Traceback\n  x\nRuntimeError: needs AMX\n\n", "RuntimeError: needs AMX"),
        (3, "", "ended with exit status 3"),
    ],
)
def test_a_refusal_is_told_in_the_peers_own_words(returncode, stderr, said):
    assert refusal(returncode, stderr) == said


def test_a_missing_peer_is_named_as_missing():
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    assert cpu_peers.trial("vllm vec") == {"status": "ModuleNotFoundError: No module named 'vllm'"}


def test_the_library_is_the_one_for_the_processor_or_the_only_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="_C_AVX2 for this processor"):
        vllm_library(tmp_path, set())
    for name in ("_C", "_C_AVX2", "_C_AVX512"):
        (tmp_path / f"{name}.abi3.so").touch()
    chosen = [
        vllm_library(tmp_path, flags).name for flags in ({"avx512f", "avx512_bf16"}, {"avx512f"}, set())
    ]
    assert chosen == ["_C.abi3.so", "_C_AVX512.abi3.so", "_C_AVX2.abi3.so"]
    (tmp_path / "_C_AVX2.abi3.so").unlink()
    assert vllm_library(tmp_path, {"avx2"}).name == "_C.abi3.so"


def test_every_sample_comes_after_a_rest(monkeypatch):
    slept = []
    monkeypatch.setattr("benchmarks.timing.time.sleep", slept.append)
    samples = interleaved({"a": int, "b": int}, repeats=3, seconds=10.0, rest=0.25)
    assert slept == [0.25] * 6 and [len(taken) for taken in samples.values()] == [3, 3]


def failing(p):
    raise RuntimeError("too many tokens")


@pytest.fixture
def pretended(monkeypatch, layer):
    """A run on the tiny shape beside four peers: right, wrong, failing at its first call, not installed."""
    right = lambda layer, most: Kernel(lambda p: exact(layer, p)[0].bfloat16())  # noqa: E731
    wrong = lambda layer, most: Kernel(lambda p: 1.1 * exact(layer, p)[0])  # noqa: E731
    absent = lambda layer, most: pytest.fail("was built")  # noqa: E731
    peers = {"right": right, "wrong": wrong, "failing": lambda layer, most: Kernel(failing), "absent": absent}
    statuses = dict.fromkeys(peers, "runs") | {"absent": "No module named 'absent'"}
    monkeypatch.setattr(cpu_peers, "PEERS", peers)
    monkeypatch.setattr(cpu_peers, "trial", lambda name: {"status": statuses[name]})
    monkeypatch.setattr(cpu_peers, "OURS", {n: OURS[n] for n in ("flex recompute", "flex preact")})
    monkeypatch.setattr(cpu_peers, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(cpu_peers, "REST", 0.0)


def test_only_peers_that_run_and_agree_are_timed_and_the_rest_is_said(pretended, tmp_path):
    pytest.importorskip("transformers")  # its version is part of the machine's description
    said: list[str] = []
    out = tmp_path / "x.json"
    threads = torch.get_num_threads()
    found = cpu_peers.run(["tiny"], [3], repeats=1, out=out, progress=said.append)
    forward, backward = (found["cases"][f"tiny T=3 {mode} threads={threads}"] for mode in cpu_peers.MODES)
    assert set(forward["median_seconds"]) == {"flex recompute", "right"}
    assert set(backward["median_seconds"]) == {"flex recompute", "flex preact"}
    assert forward["left_out"]["failing"] == "RuntimeError: too many tokens"
    assert float(forward["left_out"]["wrong"].removeprefix("differs by ")) == pytest.approx(0.1, abs=0.01)
    assert said[3] == "absent: No module named 'absent'" and "failing left out: RuntimeError" in said[4]
    assert set(found["prepared_bytes"]["tiny"]) == {"right", "wrong", "failing"}
    assert json.loads(out.read_text()) == found


def test_a_second_run_keeps_what_the_first_measured(pretended, tmp_path):
    pytest.importorskip("transformers")
    arguments = {"repeats": 1, "out": tmp_path / "x.json", "progress": lambda text: None}
    first = cpu_peers.run(["tiny"], [3], ["forward"], **arguments)
    second = cpu_peers.run(["tiny"], [3, 5], ["forward"], **arguments)
    ((key, case),) = first["cases"].items()
    assert second["cases"][key] == case and len(second["cases"]) == 2


@pytest.mark.parametrize("wrong", [{"shapes": ["huge"]}, {"modes": ["sideways"]}])
def test_unknown_names_are_refused_before_any_work(monkeypatch, tmp_path, wrong):
    monkeypatch.setattr(cpu_peers, "trial", lambda name: pytest.fail("began to work"))
    with pytest.raises(ValueError, match="is not one of"):
        cpu_peers.run(out=tmp_path / "x.json", **wrong)
