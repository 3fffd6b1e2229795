"""Times, memory and rates of the contenders on one problem; device events on a GPU, a wall clock elsewhere.

Letters: T tokens, H hidden.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_layers import FAILURES, Forward, Problem, contenders
from benchmarks.roofline import Chip, floor_seconds, forward_flops


def time_ms(run: Callable[[], object], device: str, budget_s: float = 0.4, least: int = 5) -> float:
    """Median milliseconds of ``run`` after three warm-up calls; the L2 cache is flushed before each on a
    GPU."""
    for _ in range(3):
        run()
    if device == "cpu":
        times = []
        for _ in range(least):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device)
    torch.cuda.synchronize()
    pairs, start = [], time.monotonic()
    while len(pairs) < least or (time.monotonic() - start < budget_s and len(pairs) < 200):
        flush.zero_()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        pairs.append((before, after))
        if len(pairs) % 10 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def graph_ms(run: Callable[[], object], device: str) -> float | None:
    """Milliseconds of a replayed CUDA graph of ``run``: the device's own time, without the host's; None off a
    GPU."""
    if device == "cpu":
        return None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return time_ms(graph.replay, device)


def launches(run: Callable[[], object], device: str) -> int | None:
    """Kernels that one call puts on the device; None off a GPU."""
    if device == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most memory ``run`` holds beyond what was held before it; None off a GPU."""
    if device == "cpu":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept_bytes(forward: Forward, x: Tensor, device: str) -> int | None:
    """Bytes that stay allocated between forward and backward beyond x, the weights and y; None off a GPU."""
    if device == "cpu":
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    y = forward(x)
    return torch.cuda.memory_allocated() - before - y.nbytes


def rates(device: str, size: int = 8192) -> dict[str, float]:
    """Measured ceilings: bytes/s of a large copy (read plus written), FLOP/s of a large bf16 product of
    random data."""
    count = 2**30 if device != "cpu" else 2**24
    source = torch.empty(count, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source), device)
    size = size if device != "cpu" else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product_ms = time_ms(lambda: a @ b, device)
    return {
        "copy_bytes_per_s": 4 * count / copy_ms * 1e3,
        "matmul_flops_per_s": 2 * size**3 / product_ms * 1e3,
    }


def measure_one(forward: Forward, p: Problem, device: str) -> dict[str, Any]:
    """Forward without a graph, and forward with backward to x with frozen experts."""
    x = p.x_TH.clone().requires_grad_()
    dy = torch.randn_like(p.x_TH)

    def infer() -> None:
        with torch.no_grad():
            forward(x)

    def train() -> None:
        forward(x).backward(dy)
        x.grad = None

    return {
        "forward_ms": time_ms(infer, device),
        "both_ms": time_ms(train, device),
        "peak_bytes": peak_bytes(train, device),
        "kept_bytes": kept_bytes(forward, x, device),
        "forward_launches": launches(infer, device),
    }


def measure(
    p: Problem, backends: list[str], device: str, chip: Chip, quantised: bool = False
) -> Iterator[dict[str, Any]]:
    """One record a contender: its figures, or why it could not run."""
    tokens = p.x_TH.shape[0]
    routed = replace(p.layer, Is=0)
    forward_work, both_work = forward_flops(routed, tokens), 2 * forward_flops(routed, tokens)
    for name, build in contenders(p, backends, quantised).items():
        record: dict[str, Any] = {"layer": p.layer.name, "tokens": tokens, "name": name}
        try:
            forward = build()
            record |= measure_one(forward, p, device)
            if name.startswith("flex"):
                record["forward_graph_ms"] = graph_ms(lambda: no_grad(forward, p.x_TH), device)  # noqa: B023
        except ImportError as error:
            yield record | {"missing": str(error)}
            continue
        except FAILURES as error:
            yield record | {"failed": f"{type(error).__name__}: {error}"[:400]}
            continue
        if "shared" not in name:
            record["forward_tflops"] = forward_work / record["forward_ms"] / 1e9
            record["both_tflops"] = both_work / record["both_ms"] / 1e9
        if not name.endswith(("personal and shared", "int8 experts", "nf4 experts")):
            # The floor counts 16-bit weights.
            record["floor_forward_ms"] = 1e3 * floor_seconds(routed, tokens, chip)
            record["floor_both_ms"] = 1e3 * floor_seconds(routed, tokens, chip, True)
        yield record


def no_grad(forward: Forward, x: Tensor) -> Tensor:
    with torch.no_grad():
        return forward(x)
