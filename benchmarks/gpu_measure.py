"""Times, memory and rates of the contenders on one problem; device events on a GPU, a wall clock elsewhere.

Letters: T tokens, H hidden.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_layers import FAILURES, Build, Forward, Problem
from benchmarks.roofline import forward_flops
from flex_kernels import Experts, Personal, Quantized, Shared

# Seconds of work before anything is timed on a GPU: an idle chip takes a while to raise its clocks, and the
# first contender of a process would pay for it.
WARM_S = 0.05
# Kernels whose share of a pass is recorded.
NAMED_KERNELS = 12


def time_ms(run: Callable[[], object], device: str, budget_s: float = 0.2, least: int = 5) -> float:
    """Median milliseconds of ``run`` after three warm-up calls or more; the L2 cache is flushed before each
    on a GPU."""
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
    start = time.monotonic()
    while time.monotonic() - start < WARM_S:
        flush.zero_()
        run()
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


def launched(run: Callable[[], object], device: str) -> list[tuple[str, float]] | None:
    """(name, microseconds) of what one call puts on the device, kernels and copies; None off a GPU."""
    if device == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return [(e.name, e.time_range.elapsed_us()) for e in events]


def by_kernel(found: list[tuple[str, float]]) -> dict[str, list[float]]:
    """{name: [calls, microseconds in all]} of the kernels that take most, the slowest first."""
    sums: dict[str, list[float]] = {}
    for name, microseconds in found:
        one = sums.setdefault(name[:100], [0, 0.0])
        one[0] += 1
        one[1] += microseconds
    slowest = sorted(sums.items(), key=lambda pair: -pair[1][1])[:NAMED_KERNELS]
    return {name: [calls, round(total, 1)] for name, (calls, total) in slowest}


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


def weights_of(forward: Forward) -> list[Tensor]:
    """The weights that a builder of :mod:`benchmarks.gpu_layers` made for its layer."""
    names, cells = forward.__code__.co_freevars, forward.__closure__ or ()
    found: list[Tensor] = []
    for name, value in zip(names, (cell.cell_contents for cell in cells)):
        if isinstance(value, (Experts, Personal, Shared)):
            held = [getattr(value, f.name) for f in fields(value)]
            found += [t for w in held for t in ((w.codes, w.scales) if isinstance(w, Quantized) else (w,))]
        elif name in ("gate_up", "down"):
            found.append(value)
    return [t for t in found if isinstance(t, Tensor)]


def saved_bytes(forward: Forward, p: Problem) -> int:
    """Bytes that autograd holds for backward: x and the routing decision among them, weights not."""
    given = (p.gate_up_E2IH, p.down_EHI, *weights_of(forward))
    weights = {t.untyped_storage().data_ptr() for t in given}
    held: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    x = p.x_TH.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = forward(x)
    del y
    return sum(held.values())


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


def steps(forward: Forward, p: Problem) -> tuple[Tensor, Callable[[], None], Callable[[], None]]:
    """(x, forward without a graph, forward with backward to x with frozen experts)."""
    x = p.x_TH.clone().requires_grad_()
    dy = torch.randn_like(p.x_TH)

    def infer() -> None:
        with torch.no_grad():
            forward(x)

    def train() -> None:
        forward(x).backward(dy)
        x.grad = None

    return x, infer, train


def measure_one(forward: Forward, p: Problem, device: str) -> dict[str, Any]:
    """Times and memory. Times come first: whatever breaks after them is recorded beside them."""
    x, infer, train = steps(forward, p)
    record: dict[str, Any] = {"forward_ms": time_ms(infer, device), "both_ms": time_ms(train, device)}
    counts: dict[str, Callable[[], object]] = {
        "peak_bytes": lambda: peak_bytes(train, device),
        "kept_bytes": lambda: kept_bytes(forward, x, device),
        "saved_bytes": lambda: saved_bytes(forward, p),
    }
    for name, count in counts.items():
        try:
            record[name] = count()
        except FAILURES as error:
            record[f"{name}_failed"] = described(error)
    return record


def count_launches(p: Problem, name: str, build: Build, device: str) -> dict[str, Any]:
    """Kernels of one contender's passes, after one of each, and which of them take the time. The profiler may
    slow down what runs after it: not for a process that measures times."""
    record: dict[str, Any] = {"layer": p.layer.name, "tokens": p.x_TH.shape[0], "name": name}
    try:
        _, infer, train = steps(build(p), p)
        infer()
        train()
        forward, both = launched(infer, device), launched(train, device)
    except FAILURES as error:
        return record | {"failed": described(error)}
    if forward is None or both is None:
        return record | {"forward_launches": None, "both_launches": None}
    counts = {"forward_launches": len(forward), "both_launches": len(both)}
    return record | counts | {"both_kernels_us": by_kernel(both)}


def measure(p: Problem, name: str, build: Build, device: str, graph: bool = False) -> dict[str, Any]:
    """One contender's figures, or why it could not run; ``graph``: also as a replayed CUDA graph."""
    tokens = p.x_TH.shape[0]
    routed = replace(p.layer, Is=0)
    record: dict[str, Any] = {"layer": p.layer.name, "tokens": tokens, "name": name}
    began = time.perf_counter()
    try:
        forward = build(p)
        record |= measure_one(forward, p, device)
    except ImportError as error:
        return record | {"missing": str(error)}
    except FAILURES as error:
        return record | {"failed": described(error)}
    if graph:
        record |= measure_graphs(forward, p, device)
    if "shared" not in name:
        record["forward_tflops"] = forward_flops(routed, tokens) / record["forward_ms"] / 1e9
        record["both_tflops"] = 2 * forward_flops(routed, tokens) / record["both_ms"] / 1e9
    return record | {"seconds": round(time.perf_counter() - began, 2)}


def measure_graphs(forward: Forward, p: Problem, device: str) -> dict[str, Any]:
    """Milliseconds of both passes as replayed CUDA graphs, None off a GPU."""
    x, dy = p.x_TH.clone().requires_grad_(), torch.randn_like(p.x_TH)
    # grad and not backward: adding up into x.grad happens on the stream on which x was first used.
    captured: dict[str, Callable[[], object]] = {
        "forward_graph": lambda: no_grad(forward, p.x_TH),
        "both_graph": lambda: torch.autograd.grad(forward(x), x, dy),
    }
    record: dict[str, Any] = {}
    for name, run in captured.items():
        try:
            record[f"{name}_ms"] = graph_ms(run, device)
        except FAILURES as error:
            record[f"{name}_failed"] = described(error)
    return record


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def no_grad(forward: Forward, x: Tensor) -> Tensor:
    with torch.no_grad():
        return forward(x)


def route_and_permute(backend: str, device: str, tokens: int, H: int, E: int, K: int) -> dict[str, Any]:
    """Milliseconds of routing alone: scores, choice and weights, then the sort by expert. Both also as a
    replayed CUDA graph, which leaves the host's time out."""
    module = importlib.import_module(f"flex_kernels.{backend}")
    home = "cuda.ops" if backend == "cuda" else "triton.groups"
    sort = importlib.import_module(f"flex_kernels.{home}").permute
    dtype = torch.bfloat16
    x_TH = torch.randn(tokens, H, device=device).to(dtype)
    weight_EH = (torch.randn(E, H, device=device) / H**0.5).to(dtype)
    none_GH, none_G = torch.empty(0, H, device=device), torch.empty(0, device=device)

    def route() -> Tensor:
        return module.route(x_TH, weight_EH, None, none_GH, none_G, K, True, "softmax", 1.0, False)[0]

    ids_TK = route()
    jobs: dict[str, Callable[[], object]] = {
        "route": route,
        "permute": lambda: sort(ids_TK, E),
        "both": lambda: sort(route(), E),
    }
    record: dict[str, Any] = {"backend": backend, "tokens": tokens, "H": H, "E": E, "K": K}
    for name, job in jobs.items():
        record[f"{name}_ms"] = time_ms(job, device)
        try:
            record[f"{name}_graph_ms"] = graph_ms(job, device)
        except FAILURES as error:
            record[f"{name}_graph_failed"] = described(error)
    return record
