"""The cases that the GPU suite runs in workers, the most important first: checks, times, a step, tuning.

A part's list of cases depends on its options alone, so that a second worker can go on where one ended.

Cost, for planning: a contender of the layer takes :func:`estimated_seconds`, from operations at a rate well
under any chip's and a fixed overhead; tests/test_triton_gpu_suite.py holds the sums to the suite's limits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from benchmarks import gpu_liger
from benchmarks.gpu_checks import (
    BFLOAT16_SIZES,
    QUANTISED_SIZES,
    QUANTISED_TINY,
    SIZES,
    TINY,
    check_layers,
    far_experts,
)
from benchmarks.gpu_layers import (
    BATCHED,
    DENSE,
    EAGER,
    FAILURES,
    GROUPED,
    LIGER,
    SCATTERMOE,
    Problem,
    compiled_contenders,
    complete_name,
    contenders,
    make_problem,
    quantised_name,
)
from benchmarks.gpu_measure import count_launches, described, measure, rates, route_and_permute
from benchmarks.roofline import LAYERS, Layer, forward_flops
from flex_kernels.quantize import KINDS

Record = dict[str, Any]
Case = tuple[Any, ...]
Run = Callable[[argparse.Namespace, Case], Iterator[tuple[str, Record]]]

TOY = Layer("toy", 64, 32, 6, 2, 48)
BY_NAME = {layer.name: layer for layer in (*LAYERS, TOY)}
QWEN, _, _, _, MIXTRAL = LAYERS
DTYPES = ("bfloat16", "float16", "float32")
# (tokens, skewed) of the sizes that the targets name, then the others.
TARGET_SIZES = ((8192, False), (128, False), (16, False), (8192, True))
OTHER_SIZES = ((1024, False), (32768, False), (128, True), (1024, True), (32768, True), (16, True))
# Most tokens of which a CUDA graph is timed: beyond, the device is busy anyway.
FEW_TOKENS = 128
# batched_mm gathers an expert's weights for every slot: not beyond this many bytes.
GATHERED_BYTES = 16 * 2**30
# Assumed for planning, not measured: operations a second of every contender, and seconds around its timing.
PLANNED_RATE, PLANNED_OVERHEAD_S = 3e14, 0.8
PLANNED_CALLS, PLANNED_TIMING_S = 9, 0.2


@dataclass(frozen=True)
class Part:
    """``cases(options)`` lists them; ``run(options, case)`` yields (section, record)."""

    cases: Callable[[argparse.Namespace], list[Case]]
    run: Run


def run_case(part: Part, options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    """The case's records; an error of a kernel, a peer or the memory is one more."""
    try:
        yield from part.run(options, case)
    except ImportError as error:
        yield "parts", {"case": str(case), "missing": str(error)}
    except FAILURES as error:
        yield "parts", {"case": str(case), "failed": described(error)}


def device_works(device: str) -> bool:
    """Whether the device still answers: after an illegal access every later call of the process fails."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
        torch.cuda.empty_cache()
    except FAILURES:
        return False
    return True


@lru_cache(maxsize=1)
def problem_of(name: str, tokens: int, skewed: bool, device: str) -> Problem:
    return make_problem(BY_NAME[name], tokens, device, torch.bfloat16, skewed)


def on_gpu(options: argparse.Namespace) -> bool:
    return options.device != "cpu"


def check_cases(options: argparse.Namespace) -> list[Case]:
    """bfloat16 first, then codes, then the other types: each compiles kernels of its own."""
    plain, coded = (SIZES, BFLOAT16_SIZES + QUANTISED_SIZES) if on_gpu(options) else (TINY, QUANTISED_TINY)
    sizes = [(s, DTYPES[0]) for s in (*plain, *coded)] + [(s, d) for d in DTYPES[1:] for s in plain]
    cases: list[Case] = [(backend, dtype, s) for s, dtype in sizes for backend in options.backends]
    if on_gpu(options):
        cases += [(backend, "bfloat16", "2^31 elements") for backend in options.backends]
    return cases


def check(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    backend, dtype, sizes = case
    if isinstance(sizes, str):
        yield "checks", far_experts(backend)
        return
    dtypes = (getattr(torch, dtype),)
    for record in check_layers([backend], options.device, (sizes,), dtypes, options.seed):
        yield "checks", record | {"seed": options.seed}


def target_names(backends: Sequence[str], layer: Layer, tokens: int) -> list[str]:
    """Who is measured at one size: ours, the peers that need no tuning, the bound."""
    names = [f"flex {backends[0]} preact", f"flex {backends[0]} recompute"] if backends else []
    names += [GROUPED, DENSE, SCATTERMOE]
    if tokens <= FEW_TOKENS:
        gathered = 2 * tokens * layer.K * 2 * layer.I * layer.H
        names += [EAGER] + [BATCHED] * (gathered <= GATHERED_BYTES)
    return names


def target_cases(options: argparse.Namespace) -> list[Case]:
    """(layer, tokens, skewed, contender): by size, then by layer; first what this machine can do at all."""
    layers, sizes = (LAYERS, TARGET_SIZES) if on_gpu(options) else ((TOY,), ((16, False), (16, True)))
    cases: list[Case] = [("rates",), *(("routing", backend) for backend in options.backends)]
    return cases + [
        (layer.name, tokens, skewed, name)
        for tokens, skewed in sizes
        for layer in layers
        for name in target_names(options.backends, layer, tokens)
    ]


def other_cases(options: argparse.Namespace) -> list[Case]:
    """The complete layer and codes where they tell most, then the other sizes, then the second backend."""
    first, second = options.backends[:1], options.backends[1:2]
    if not on_gpu(options):
        names = [
            f(b)
            for b in first
            for f in (complete_name, *(lambda b, k=k: quantised_name(b, k) for k in KINDS))
        ]
        return [(TOY.name, 16, False, name) for name in [*names, EAGER]]
    cases: list[Case] = []
    for tokens in (8192, 128):
        for layer in LAYERS:
            cases += [(layer.name, tokens, False, complete_name(b)) for b in first]
            if layer in (QWEN, MIXTRAL):
                cases += [
                    (layer.name, tokens, False, quantised_name(b, kind)) for b in first for kind in KINDS
                ]
            cases += [(layer.name, tokens, False, f"flex {b} recompute") for b in second]
    cases += [(layer.name, 8192, False, EAGER) for layer in LAYERS]
    return cases + [
        (layer.name, tokens, skewed, name)
        for tokens, skewed in OTHER_SIZES
        for layer in LAYERS
        for name in target_names(options.backends, layer, tokens)
    ]


def estimated_seconds(case: Case) -> float:
    """What a case of the layer is expected to take at most, for planning; see the constants PLANNED_*."""
    if case[0] not in BY_NAME or not isinstance(case[1], int):
        return 3.0
    name, tokens = case[:2]
    forward = forward_flops(BY_NAME[name], tokens) / PLANNED_RATE
    forward_and_backward = 3 * forward
    timed = sum(max(PLANNED_TIMING_S, PLANNED_CALLS * s) for s in (forward, forward_and_backward))
    return PLANNED_OVERHEAD_S + timed


def graphed(tokens: int, name: str) -> bool:
    """Whether a CUDA graph of this contender is timed: of ours, and of the peers that one can hold."""
    return tokens <= FEW_TOKENS and (name.startswith("flex") or name in (GROUPED, BATCHED, DENSE))


def measure_case(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    device = options.device
    if case == ("rates",):
        yield "rates", rates(device)
    elif case[0] == "routing":
        sizes = (8192, 2048, 64, 8) if on_gpu(options) else (16, 64, 6, 2)
        yield "routing", route_and_permute(case[1], device, *sizes)
    else:
        layer, tokens, skewed, name = case
        p = problem_of(layer, tokens, skewed, device)
        record = measure(p, name, contenders(options.backends)[name], device, graphed(tokens, name))
        yield "measurements", record | {"skewed": skewed}


def launch_cases(options: argparse.Namespace) -> list[Case]:
    names = [f"flex {b} {save}" for b in options.backends[:1] for save in ("recompute", "preact")]
    sizes = (
        [(layer.name, t) for t in (128, 8192, 16) for layer in LAYERS]
        if on_gpu(options)
        else [(TOY.name, 16)]
    )
    return [(*size, name) for size in sizes for name in (*names, GROUPED)]


def count(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    layer, tokens, name = case
    p = problem_of(layer, tokens, False, options.device)
    yield "launches", count_launches(p, name, contenders(options.backends)[name], options.device)


def compiled_cases(options: argparse.Namespace) -> list[Case]:
    """Few sizes: every one is compiled anew."""
    names = compiled_contenders(options.backends, options.device)
    if not on_gpu(options):
        return [(TOY.name, 16, name) for name in names]
    return [(QWEN.name, tokens, name) for tokens in (8192, 128) for name in names]


def measure_compiled(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    layer, tokens, name = case
    p = problem_of(layer, tokens, False, options.device)
    build = compiled_contenders(options.backends, options.device)[name]
    yield "measurements", measure(p, name, build, options.device) | {"skewed": False}


def liger_cases(options: argparse.Namespace) -> list[Case]:
    """A layer's kernels are tuned, then measured at every size: liger tunes once for all of them."""
    if not on_gpu(options) or not gpu_liger.installed():
        return []
    cases: list[Case] = []
    for layer in LAYERS:
        cases += [
            (layer.name, 8192, "tune"),
            *((layer.name, *size) for size in (*TARGET_SIZES, *OTHER_SIZES)),
        ]
    return cases


def measure_liger(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    """liger beside ours, in one process on the same problem."""
    layer, tokens, what = case
    gpu_liger.time_briefly()
    if what == "tune":
        began = time.perf_counter()
        failed = gpu_liger.compile_ahead(BY_NAME[layer], tokens, options.workers)
        seconds = round(time.perf_counter() - began, 1)
        yield "liger", {"layer": layer, "compiling_seconds": seconds, "not_compiled": failed}
        return
    p, builds = problem_of(layer, tokens, what, options.device), contenders(options.backends)
    for name in (*(f"flex {b} {s}" for b in options.backends[:1] for s in ("preact", "recompute")), LIGER):
        record = measure(p, name, builds[name], options.device, graphed(tokens, name))
        yield "measurements", record | {"skewed": what}


def warm_cases(options: argparse.Namespace) -> list[Case]:
    """(layer, tokens, contender): one for every set of kernels that the measurements need, those of the
    targets first."""
    plain = [f"flex {b} {save}" for b in options.backends for save in ("recompute", "preact")]
    complete = [complete_name(b) for b in options.backends]
    coded = [quantised_name(b, kind) for b in options.backends for kind in KINDS]
    if not on_gpu(options):
        return [(TOY.name, 16, name) for name in (*plain, *complete)]
    few = [(MIXTRAL.name, 16)]
    sizes = [(layer.name, tokens) for tokens in (8192, 128) for layer in LAYERS]
    later = [(layer.name, 1024) for layer in LAYERS]
    cases: list[Case] = [(*size, name) for size in sizes + few for name in plain]
    cases += [(*size, name) for size in sizes for name in complete]
    cases += [(*size, name) for size in later for name in plain]
    return cases + [(*size, n) for size in sizes if size[0] in (QWEN.name, MIXTRAL.name) for n in coded]


def warm(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    """Run once what will be measured: its kernels are then in Triton's cache, compiled in parallel."""
    layer, tokens, name = case
    began = time.perf_counter()
    p = make_problem(BY_NAME[layer], tokens, options.device, torch.bfloat16)
    x, dy = p.x_TH.requires_grad_(), torch.randn_like(p.x_TH)
    forward = contenders(options.backends)[name](p)
    with torch.no_grad():
        forward(x)
    forward(x).backward(dy)
    seconds = round(time.perf_counter() - began, 1)
    yield "warm", {"layer": layer, "tokens": tokens, "name": name, "seconds": seconds}


def client_cases(options: argparse.Namespace) -> list[Case]:
    from benchmarks.gpu_client import CLIENT_LAYERS

    return [(layer,) for layer in CLIENT_LAYERS]


def client(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    from benchmarks.gpu_client import client_step

    began = time.perf_counter()
    record = client_step(case[0], options.device, options.backends[0])
    yield "client", record | {"seconds_in_all": round(time.perf_counter() - began, 1)}


def tune_cases(options: argparse.Namespace) -> list[Case]:
    """The targets' sizes; nothing is tuned without a GPU."""
    sizes = [(layer.name, 8192) for layer in (QWEN, MIXTRAL, *LAYERS[1:4])] + [(QWEN.name, 128)]
    return list(sizes) if on_gpu(options) else []


def tune(options: argparse.Namespace, case: Case) -> Iterator[tuple[str, Record]]:
    """Ours with pinned tiles, then tuned, in one process on the same problem."""
    from dataclasses import asdict

    from flex_kernels.triton import tune as tuning

    name, tokens = case
    layer, p = BY_NAME[name], problem_of(name, tokens, False, options.device)
    ours = [f"flex {options.backends[0]} {save}" for save in ("preact", "recompute")]
    builds = contenders(options.backends)
    pinned = {n: measure(p, n, builds[n], options.device) for n in ours}
    began = time.perf_counter()
    best = tuning.tune(torch.bfloat16, layer.H, layer.I, layer.E, layer.K, tokens, workers=options.workers)
    record = {"layer": name, "tokens": tokens, "tuning_seconds": round(time.perf_counter() - began, 1)}
    yield "tuning", record | asdict(best)
    for n in ours:
        tuned = measure(p, n, builds[n], options.device)
        before = pinned[n].get("both_ms")
        yield "tuned", tuned | {"skewed": False, "pinned_both_ms": before}


PARTS = {
    "checks": Part(check_cases, check),
    "warm": Part(warm_cases, warm),
    "targets": Part(target_cases, measure_case),
    "client": Part(client_cases, client),
    "launches": Part(launch_cases, count),
    "compiled": Part(compiled_cases, measure_compiled),
    "liger": Part(liger_cases, measure_liger),
    "tune": Part(tune_cases, tune),
    "others": Part(other_cases, measure_case),
}
