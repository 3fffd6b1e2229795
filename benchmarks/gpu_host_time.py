"""What the host does for one layer on a GPU, measured without a GPU: Python, torch's dispatch, launchers.

    python -m benchmarks.gpu_host_time                        both backends, 16 and 128 tokens
    python -m benchmarks.gpu_host_time --rounds 20 --tokens 16 --out host.json

With few tokens a layer takes as long as the host needs to launch it. These are times of the host alone, on
this CPU. NO figure here is a GPU's: see :mod:`benchmarks.pretend_gpu`.

In the figures:  module call, argument checks, custom ops and autograd, allocation (of CPU memory), Triton's
                 argument handling and the C code of its launcher; torch's own few operations between the
                 launches, arithmetic included, on CPU tensors of a toy size.
Not in them:     cuLaunchKernel itself and everything behind it, CUDA's allocator, the CUDA runtime and
                 pybind11 in front of the CUDA routing kernels, torch.cuda's look-ups of devices and streams,
                 cuBLAS.

transformers' grouped_mm experts dispatch the same torch operations at any size. They are timed with one token
and widths of 16, where the arithmetic that a GPU would do is least.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_layers import Problem, make_problem, ours, transformers_experts
from benchmarks.pretend_gpu import pretend_gpu
from benchmarks.roofline import Layer
from benchmarks.timing import cpu_info, interleaved, median
from flex_kernels import Experts, FlexMoE, Router, Shared
from flex_kernels.check import check_arguments
from flex_kernels.dispatch import backend_module

# Experts and choices as in Qwen1.5-MoE, so that tiles are chosen as there; widths so small that arithmetic on
# the CPU hardly counts.
LAYER = Layer("toy", 64, 32, 60, 4)
LEAST = Layer("least", 16, 16, 2, 1)
# Hidden size and width as in Qwen1.5-MoE, for what is compiled for them; few experts, as they are not read.
FULL = Layer("full width", 2048, 1408, 4, 2)
PEER = "transformers grouped_mm, experts alone"
# Seconds of calls in a sample: the first ones after another run find the processor's caches cold.
BLOCK_S = 0.005
Run = Callable[[], Any]


class Dispatched(TorchDispatchMode):
    """Counts torch's operations but for views, allocations and this project's own."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.count += not func.is_view and not name.startswith(
            ("empty", "new_empty", "detach", "_unsafe_view")
        )
        return func(*args, **(kwargs or {}))


def module(p: Problem, backend: str, shared: bool = False) -> FlexMoE:
    """Router, frozen experts, a personal expert that trains, and where asked for a gated shared expert."""
    layer, x = p.layer, p.x_TH
    rows = (
        torch.randn(n, dtype=x.dtype)
        for n in ((layer.E, layer.H), (2 * layer.I, layer.H), (layer.H, layer.I))
    )
    router, gate_up, down = rows
    extra = Shared(gate_up, down, torch.randn(layer.H)) if shared else None
    experts = Experts(p.gate_up_E2IH, p.down_EHI)
    built = FlexMoE(Router(router, layer.K), experts, extra, save="recompute", backend=backend)
    built.personalize(0)
    return built


def passes(forward: Callable[[Tensor], Tensor], x_TH: Tensor, parameters: list[Tensor]) -> dict[str, Run]:
    """Forward without a graph, forward with one, and forward and backward."""
    x_TH = x_TH.detach().requires_grad_()
    dy_TH = torch.ones_like(x_TH)

    def infer() -> None:
        with torch.no_grad():
            forward(x_TH)

    def train() -> None:
        torch.autograd.grad(forward(x_TH), [x_TH, *parameters], dy_TH)

    return {"inference": infer, "forward": lambda: forward(x_TH), "both": train}


def parts(built: FlexMoE, x_TH: Tensor) -> dict[str, Run]:
    """The pieces of one forward pass, each alone, without what autograd adds."""
    assert built.personal is not None
    personal, experts = built.personal.record(), built.experts()
    router = Router(built.router_weight, built.top_k)
    backend = backend_module(built.backend)
    gates = personal.gate_weight[None], personal.gate_bias[None]
    route = (x_TH, router.weight, None, *gates, router.top_k, False, "softmax", 1.0, False)
    ids_TK, weights_TK, gates_GT, _ = backend.route(*route)
    tensors = (x_TH, ids_TK, weights_TK, experts.gate_up, experts.down, None, None, personal.gate_up)
    mix = (*tensors, personal.down, gates_GT.view(-1), *(None,) * 5, "add", False)

    def unrecorded(function: Callable[..., Any], *inputs: Any) -> None:
        with torch.no_grad():
            function(*inputs)

    return {
        "argument checks": lambda: check_arguments(x_TH, router, experts, personal, None, "add", "recompute"),
        "route in the backend": partial(unrecorded, backend.route, *route),
        "experts in the backend": partial(unrecorded, backend.experts_forward, *mix),
    }


def by_triton(run: Run) -> Run:
    """``run`` with every Triton kernel launched by ``kernel[grid](...)``."""

    def slow() -> None:
        with patch("flex_kernels.triton.direct.KNOWN_LAUNCHER", False):
            run()

    return slow


def operations(run: Run) -> int:
    with Dispatched() as dispatched:
        run()
    return dispatched.count


def microseconds(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Processor time of one call: the median over blocks of calls, which take turns."""

    def calls_of(run: Run) -> int:
        run()
        began = time.process_time()
        run()
        return 1 + int(BLOCK_S / max(1e-6, time.process_time() - began))

    def block(run: Run, calls: int) -> Run:
        return lambda: [run() for _ in range(calls)]

    calls = {name: calls_of(run) for name, run in runs.items()}
    blocks = {name: block(run, calls[name]) for name, run in runs.items()}
    samples = interleaved(blocks, rounds, seconds=60, least=rounds, clock=time.process_time)
    return {name: round(median(taken) * 1e6 / calls[name], 1) for name, taken in samples.items()}


def first_call(tokens: int) -> dict[str, Any]:
    """Seconds of wall clock of a layer's first forward and backward pass, from an empty cache of compiled
    kernels, and of the same again.
    """
    p = make_problem(FULL, tokens, "cpu", torch.bfloat16)
    built, x_TH = module(p, "cuda"), p.x_TH.requires_grad_()
    record: dict[str, Any] = {"tokens": tokens, "forward_s": [], "backward_s": []}
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        for _ in range(2):
            began = time.perf_counter()
            y_TH = built(x_TH)
            middle = time.perf_counter()
            y_TH.backward(torch.ones_like(y_TH))
            record["forward_s"].append(round(middle - began, 3))
            record["backward_s"].append(round(time.perf_counter() - middle, 3))
    return record


def measure(counting: Callable[[], Any], tokens: int, rounds: int) -> dict[str, Any]:
    """Launches, operations and microseconds at one number of tokens."""
    p = make_problem(LAYER, tokens, "cpu", torch.bfloat16)
    built = {backend: module(p, backend) for backend in ("cuda", "triton")}
    contenders: dict[str, dict[str, Run]] = {
        f"{backend}, whole layer": passes(layer, p.x_TH, list(layer.personal.parameters()))  # type: ignore[union-attr]
        for backend, layer in built.items()
    }
    contenders["cuda, experts alone"] = passes(ours(p, "cuda", "recompute"), p.x_TH, [])
    if importlib.util.find_spec("transformers"):
        least = make_problem(LEAST, 1, "cpu", torch.bfloat16)
        contenders[PEER] = passes(transformers_experts(least, "grouped_mm"), least.x_TH, [])
    runs: dict[str, Run] = {}
    record: dict[str, Any] = {"tokens": tokens, "launches": {}, "operations": {}}
    for contender, found in contenders.items():
        for name, run in found.items():
            run()
            count = counting()
            record["operations"][f"{contender}: {name}"] = operations(run)
            record["launches"][f"{contender}: {name}"] = dict(count.since())
        runs |= {f"{contender}: {name}": run for name, run in found.items()}
        if contender != PEER:
            runs[f"{contender}: both, by kernel[grid]"] = by_triton(found["both"])
    runs |= parts(built["cuda"], p.x_TH)
    return record | {"microseconds": microseconds(runs, rounds)}


def report(record: dict[str, Any]) -> str:
    times, counts = record["microseconds"], record["operations"]
    lines = [f"T={record['tokens']:<6}{'':44} {'us':>8} {'launches':>9} {'torch ops':>10}"]
    for name, us in times.items():
        launches = sum(record["launches"].get(name, {}).values()) or ""
        lines.append(f"  {name:50} {us:8.1f} {launches:>9} {counts.get(name, ''):>10}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=100, help="samples of each; the median is printed")
    parser.add_argument(
        "--first-tokens", type=int, default=2048, help="of the step whose compilation is timed"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the same")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    machine = {"cpu": cpu_info().get("model name", "unknown CPU")}
    machine |= {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    print("Host time with launches that do nothing, on CPU tensors. Not a GPU figure.")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    with pretend_gpu() as counting:
        first = first_call(options.first_tokens)
        records = [measure(counting, tokens, options.rounds) for tokens in options.tokens]
    print(
        f"A layer with H={FULL.H}, I={FULL.I} and {first['tokens']} tokens, first and second time: forward "
        f"{first['forward_s']} s, backward {first['backward_s']} s"
    )
    print(*map(report, records), sep="\n")
    if options.out:
        whole = {"machine": machine, "first_call": first, "records": records}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
