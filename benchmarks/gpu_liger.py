"""liger-kernel's fused MoE, tuned by its own autotuner in seconds instead of minutes.

It tries 32 configurations for each of three products and 16 for each of two weight gradients, for every pair
of hidden size and expert width. All of them stay; they are compiled by several processes first, each of which
runs a share, and then timed with few repetitions. Letters: E experts, H hidden, I expert width.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.gpu_layers import FAILURES, liger, make_problem
from benchmarks.roofline import Layer

# Milliseconds of warming up and of timing for each configuration.
WARM_MS, TIMED_MS = 2, 10


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def autotuned() -> list[Any]:
    """liger's kernels that choose among configurations."""
    from triton.runtime.autotuner import Autotuner

    module = importlib.import_module("liger_kernel.ops.fused_moe_kernels")
    return [kernel for kernel in vars(module).values() if isinstance(kernel, Autotuner)]


def share(configurations: Sequence[Any], part: int, of: int) -> list[Any]:
    """Every ``of``-th configuration from ``part`` on; never none, for a kernel must run with one."""
    return list(configurations[part::of]) or list(configurations[:1])


def time_briefly() -> None:
    """Let the autotuner of every kernel of liger's time with few repetitions."""
    from triton.testing import do_bench

    def bench(call: Callable[[], object], quantiles: Sequence[float]) -> Any:
        return do_bench(call, warmup=WARM_MS, rep=TIMED_MS, quantiles=quantiles)

    for kernel in autotuned():
        kernel.do_bench = bench


def compile_share(layer: Layer, tokens: int, part: int, of: int) -> None:
    """Run one share of the configurations once each: the kernels are then in Triton's cache on disk."""

    def once(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
        call()
        return [1.0] * len(quantiles)

    for kernel in autotuned():
        kernel.configs, kernel.do_bench = share(kernel.configs, part, of), once
    p = make_problem(layer, tokens, "cuda", torch.bfloat16)
    liger(p)(p.x_TH.requires_grad_()).backward(torch.randn_like(p.x_TH))
    torch.cuda.synchronize()


def compile_ahead(layer: Layer, tokens: int, workers: int) -> list[str]:
    """Compile all configurations in ``workers`` processes; why a share failed, if any did."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(compile_share, layer, tokens, i, workers) for i in range(workers)]
        errors = [one.exception() for one in shares]
    for error in errors:
        if error is not None and not isinstance(error, FAILURES):
            raise error
    return [f"{type(error).__name__}: {error}"[:200] for error in errors if error is not None]
