"""The layer on this CPU against transformers and a dense product: time and extra memory, forward and with
backward.

    python -m benchmarks.layer                                        the standard table
    python -m benchmarks.layer --shape qwen1.5 --dtype bf16 --tokens 64 256 --out x.json --quick

Time: every implementation in turn in one process, medians of the wall clock, every sample kept. Memory: one
process an implementation; the kernel's own account of resident pages (VmHWM after a reset, less VmRSS before
the step), so that it counts native scratch as well as tensors; malloc is told to give pages back at once.
Peak extra memory is that of a forward and backward step: it includes the gradients and, in every
implementation alike, the output.

Quantised experts run with save="preact", a shared expert beside them is held in int8; "rates" are what this
machine read and multiplied in the same run.

Cases already in the output file are kept: an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import (
    SHAPES,
    Layer,
    forward_backward,
    forward_only,
    implementations,
    make_layer,
)
from benchmarks.timing import interleaved, machine, median
from flex.memory import give_back_freed
from flex_kernels.quantize import KINDS, Kind

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (64, 256, 1024, 2048, 8192)
SECONDS_PER_CASE = 12.0
Progress = Callable[[str], None]


def inputs(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x_TH, dy_TH = (
        torch.randn(tokens, layer.shape.H, generator=generator).to(layer.router.dtype) for _ in "xy"
    )
    return x_TH, dy_TH


def time_case(layer: Layer, tokens: int, mode: str, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Samples of every implementation. ``mode``: "forward", "backward" (forward and backward to x), or
    "personal"
    (forward and backward to x and to a personal expert)."""
    x_TH, dy_TH = inputs(layer, tokens)
    # In other dtypes quantised experts are right, not tuned.
    kinds: tuple[Kind, ...] = KINDS if layer.router.dtype == torch.bfloat16 and mode != "personal" else ()
    runs = implementations(layer, mode == "personal", kinds)
    if mode == "forward":
        del runs["flex preact"]
        return interleaved({n: forward_only(r, x_TH) for n, r in runs.items()}, repeats, seconds)
    steps = {n: forward_backward(layer, r, x_TH, dy_TH) for n, r in runs.items()}
    return interleaved(steps, repeats, seconds)


def rates() -> dict[str, float]:
    """Bytes a second that all threads read from memory, and multiply-adds of large products, times two."""
    memory = torch.ones(1 << 28)
    matrices = {name: torch.randn(3072, 3072).to(dtype) for name, dtype in DTYPES.items()}
    runs: dict[str, Callable[[], Any]] = {"read": memory.sum}
    runs |= {name: lambda m=m: m @ m for name, m in matrices.items()}  # type: ignore[misc]
    best = {name: min(taken) for name, taken in interleaved(runs, 5, 10.0).items()}
    found = {f"{name} flop/s": 2 * 3072**3 / best[name] for name in matrices}
    return {"read bytes/s": memory.nbytes / best["read"], **found}


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure_memory(shape: str, dtype: str, name: str, tokens: Sequence[int]) -> dict[str, int]:
    """Peak extra bytes of a forward and backward step by number of tokens, in a process of its own."""
    layer = make_layer(SHAPES[shape], DTYPES[dtype])
    run = implementations(layer, with_personal=False)[name]
    forward_backward(layer, run, *inputs(layer, 8))()
    found = {}
    for count in sorted(tokens):
        step = forward_backward(layer, run, *inputs(layer, count))
        # Or a step could use, unseen, what one of fewer tokens left.
        give_back_freed()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step()
        found[str(count)] = resident("VmHWM") - before
    return found


def memory_in_process(shape: str, dtype: str, name: str, tokens: Sequence[int]) -> dict[str, int]:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = ["--memory", name, "--shape", shape, "--dtype", dtype, "--tokens", *map(str, tokens)]
    command = [sys.executable, "-m", "benchmarks.layer", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {name} at {shape} {dtype}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def save(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def too_large(shape: str, dtype: str) -> bool:
    s = SHAPES[shape]
    weights = 3 * s.H * (s.E * s.I + 2 * (s.K * s.I + s.Is)) * DTYPES[dtype].itemsize
    return weights > 0.4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run(
    shapes: Sequence[str] = tuple(SHAPES),
    dtypes: Sequence[str] = tuple(DTYPES),
    tokens: Sequence[int] = TOKENS,
    repeats: int = 9,
    out: str | Path = "benchmarks/results/layer_cpu.json",
    progress: Progress = print,
    seconds: float = SECONDS_PER_CASE,
    modes: Sequence[str] = ("forward", "backward", "personal"),
    memory: bool = True,
) -> dict[str, Any]:
    """Measure every case that ``out`` does not hold yet; returns the whole content of ``out``.

    Args:
        shapes: names in ``benchmarks.baselines.SHAPES``; dtypes: "bf16", "fp32"; tokens: numbers of tokens.
        repeats: most rounds a case; ``seconds``: no more rounds past this once there are three (one, where a
        single round
            takes longer).
        progress: called with a line after every case.

    Raises:
        ValueError: an unknown shape, dtype or mode.
    """
    for kind, given, known in (
        ("shape", shapes, SHAPES),
        ("dtype", dtypes, DTYPES),
        ("mode", modes, ("forward", "backward", "personal")),
    ):
        for value in given:
            if value not in known:
                raise ValueError(f"{kind}={value!r} is not one of {', '.join(map(repr, known))}")
    path = Path(out)
    result = json.loads(path.read_text()) if path.exists() else {"cases": {}, "memory": {}}
    result["machine"] = machine()
    result["rates"] = rates()
    for shape in shapes:
        for dtype in dtypes:
            if too_large(shape, dtype) or (shape == "mixtral" and dtype == "fp32"):
                progress(f"{shape} {dtype}: left out, its weights do not fit this machine's memory")
                continue
            wanted = [
                (t, m) for t in tokens for m in modes if f"{shape} {dtype} T={t} {m}" not in result["cases"]
            ]
            layer = make_layer(SHAPES[shape], DTYPES[dtype]) if wanted else None
            for count, mode in wanted:
                assert layer is not None
                samples = time_case(layer, count, mode, repeats, seconds)
                medians = {name: median(taken) for name, taken in samples.items()}
                case = {"shape": shape, "dtype": dtype, "tokens": count, "mode": mode}
                result["cases"][f"{shape} {dtype} T={count} {mode}"] = case | {
                    "median_seconds": medians,
                    "samples_seconds": samples,
                }
                save(path, result)
                progress(line(case, medians))
            del layer
            if memory:
                measure_all_memory(shape, dtype, tokens, result, path, progress)
    return result


def measure_all_memory(
    shape: str, dtype: str, tokens: Sequence[int], result: dict[str, Any], path: Path, progress: Progress
) -> None:
    for name in ("flex recompute", "flex preact", "transformers eager", "transformers grouped_mm"):
        held = result["memory"].setdefault(f"{shape} {dtype} {name}", {})
        missing = [t for t in tokens if str(t) not in held]
        if missing:
            held |= memory_in_process(shape, dtype, name, missing)
            save(path, result)
        values = ", ".join(f"T={t} {held[str(t)] / 2**20:.1f}" for t in tokens)
        progress(f"{shape} {dtype} extra MiB of {name}: {values}")


def line(case: dict[str, Any], medians: dict[str, float]) -> str:
    """One line a case: milliseconds, and how many times faster than the better of transformers' two."""
    flex = min(v for n, v in medians.items() if n in ("flex recompute", "flex preact"))
    stock = min(v for n, v in medians.items() if n.startswith("transformers"))
    times = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in medians.items())
    where = f"{case['shape']} {case['dtype']} T={case['tokens']} {case['mode']}"
    return f"{where}: {times} ms; {stock / flex:.2f} times as fast as transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the layer on this CPU.")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--mode", nargs="+", default=["forward", "backward", "personal"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS_PER_CASE, help="per case, after three rounds"
    )
    parser.add_argument("--out", default="benchmarks/results/layer_cpu.json")
    parser.add_argument("--quick", action="store_true", help="three rounds, no more than 1,024 tokens")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    tokens = [t for t in given.tokens if t <= 1024] if given.quick else given.tokens
    if given.memory:
        print(json.dumps(measure_memory(given.shape[0], given.dtype[0], given.memory, tokens)))
        return
    repeats = 3 if given.quick else given.repeats
    report: Progress = lambda text: print(text, flush=True)  # noqa: E731
    run(
        given.shape,
        given.dtype,
        tokens,
        repeats,
        given.out,
        report,
        given.seconds,
        given.mode,
        not given.no_memory,
    )


if __name__ == "__main__":
    main()
