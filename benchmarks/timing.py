"""Interleaved wall-clock timing, and the machine it was taken on."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    seconds: float,
    least: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    rest: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every run, one of each in turn, so that a change of the machine's speed meets them all
    alike.

    One untimed round warms up. Rounds stop after ``repeats``, or past ``seconds`` once there are ``least``;
    where a single round takes longer than ``seconds``, after one. ``clock`` may be ``time.process_time``:
    with one thread it leaves out what other programs on a busy machine take. ``rest``: seconds slept before
    every sample, for runs whose idle threads go on spinning for a while and would slow down the next one.
    """
    began = time.perf_counter()
    for run in runs.values():
        run()
    if time.perf_counter() - began > seconds:
        least = 1
    samples: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for done in range(repeats):
        if done >= least and time.perf_counter() - began > seconds:
            break
        for name, run in runs.items():
            time.sleep(rest)
            start = clock()
            run()
            samples[name].append(clock() - start)
    return samples


def median(samples: list[float]) -> float:
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def cpu_info() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in path.read_text().split("\n\n")[0].splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, instruction sets, load, versions, date."""
    import transformers

    import flex_kernels

    info = cpu_info()
    wanted = (
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
    )
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [f for f in wanted if f in flags],
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flex_kernels": flex_kernels.__version__,
        "cpu_backend": flex_kernels.backends()["cpu"].detail,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
