"""Which plan a call uses: one that :func:`tune` measured on this GPU and kept on disk, else the pinned one.

Letters: T tokens, H hidden, I expert width, E experts, K chosen, N = T*K rows.

Nothing is ever measured behind the user's back: a call looks its plan up and never benchmarks, so a first
call, a CUDA graph capture and a resumed run all behave alike. Only ``tune`` measures.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
import triton

from flex_kernels.triton.tiles import INTERPRETER, Plan, Tile, candidates, capability_of, pinned_plan

Key = tuple[str, int, int, int, int, int]
Timer = Callable[[Callable[[], object]], float]


def bucket(tokens: int) -> int:
    """Token counts share a plan up to the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(tokens))


def cache_file(device: torch.device) -> Path:
    """Where the plans of this GPU and Triton version are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return root / "flex-kernels" / f"triton-{triton.__version__}-{gpu}.json"


def key_of(dtype: torch.dtype, H: int, I: int, E: int, K: int, T: int) -> Key:
    return (str(dtype).removeprefix("torch."), H, I, E, K, bucket(T))


def key_text(key: Key) -> str:
    dtype, H, I, E, K, tokens = key
    return f"{dtype} H{H} I{I} E{E} K{K} T{tokens}"


def read_plans(path: Path) -> dict[str, Plan]:
    """The plans in ``path``; none, with a warning, when it cannot be read as plans."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {
            key: Plan(**{name: Tile(**tile) for name, tile in plan.items()}) for key, plan in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"ignoring the tuned plans in {path}: {error}", stacklevel=2)
        return {}


def write_plan(path: Path, key: str, plan: Plan) -> None:
    """Add one plan to ``path``: written beside it, then renamed over it."""
    plans = read_plans(path) | {key: plan}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({k: asdict(p) for k, p in plans.items()}, file, indent=1)
    os.replace(file.name, path)


@lru_cache
def stored_plans(path: Path) -> dict[str, Plan]:
    return read_plans(path)


@lru_cache(maxsize=4096)
def lookup(device: torch.device, key: Key) -> Plan:
    dtype, _, _, E, K, tokens = key
    capability = capability_of(device)
    if capability != INTERPRETER:
        tuned = stored_plans(cache_file(device)).get(key_text(key))
        if tuned is not None:
            return tuned
    return pinned_plan(capability, 4 if dtype == "float32" else 2, tokens * K, E)


def plan_for(device: torch.device, dtype: torch.dtype, H: int, I: int, E: int, K: int, T: int) -> Plan:
    """The plan of one set of experts, from sizes alone; E = K = 1 for a dense expert."""
    return lookup(device, key_of(dtype, H, I, E, K, T))


def best_tile(run: Callable[[Tile], object], tiles: list[Tile], time_ms: Timer) -> tuple[float, Tile] | None:
    """(milliseconds, tile) of the fastest tile that fits the chip; None when none fits."""
    timed = []
    for tile in tiles:
        try:
            timed.append((time_ms(partial(run, tile)), tile))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(timed, key=lambda pair: pair[0], default=None)


def fastest_plan(
    device: torch.device, key: Key, tiles_by_m: dict[int, list[Tile]], time_ms: Timer, seed: int = 0
) -> Plan:
    """The plan with the least total time of its four products, on random weights and balanced random routing.

    Raises:
        RuntimeError: no candidate runs on this device.
    """
    from flex_kernels.triton.down_backward import down_backward
    from flex_kernels.triton.grouped_gemm import grouped_gemm
    from flex_kernels.triton.groups import grouped, permute
    from flex_kernels.triton.up_swiglu import up_swiglu

    dtype_name, H, I, E, K, T = key
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype) / shape[-1] ** 0.5

    x_TH, gate_up, down = random(T, H), random(E, 2 * I, H), random(E, H, I)
    act_NI, preact_N2I = random(T * K, I), random(T * K, 2 * I)
    ids_TK = torch.rand(T, E, device=device, generator=generator).topk(K, dim=1).indices.int()
    weights_TK = torch.full((T, K), 1 / K, device=device)
    offsets_E1, order_N, _ = permute(ids_TK, E)

    def timed_plan(m: int, tiles: list[Tile]) -> tuple[float, Plan] | None:
        groups = grouped(offsets_E1, order_N, K, m)
        products: list[Callable[[Tile], object]] = [
            lambda tile: up_swiglu(x_TH, gate_up, groups, tile, True, False),
            lambda tile: grouped_gemm(act_NI, down, True, groups, tile),
            lambda tile: down_backward(
                x_TH, down, preact_N2I, groups, tile, weights_TK, None, True, False, True
            ),
            lambda tile: grouped_gemm(preact_N2I, gate_up, False, groups, tile),
        ]
        best = [pair for run in products if (pair := best_tile(run, tiles, time_ms)) is not None]
        if len(best) < len(products):
            return None
        return sum(ms for ms, _ in best), Plan(*(tile for _, tile in best))

    plans = [pair for m, tiles in tiles_by_m.items() if (pair := timed_plan(m, tiles)) is not None]
    if not plans:
        raise RuntimeError(f"no tile runs on {device} for {key_text(key)}")
    return min(plans, key=lambda pair: pair[0])[1]


def tune(
    dtype: torch.dtype, H: int, I: int, E: int, K: int, T: int, device: torch.device | None = None
) -> Plan:
    """Measure the candidate tiles for one layer shape on this GPU, keep the best plan on disk, and return it.

    Args:
        dtype: of the layer's input and experts.
        H, I, E, K: hidden size, expert width, experts, experts a token; E = K = 1 tunes a dense expert.
        T: tokens a call; rounded up to a power of two.
        device: a CUDA device; None for the current one.

    Raises:
        RuntimeError: there is no CUDA device, or no candidate runs on it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on a GPU, and torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    key = key_of(dtype, H, I, E, K, T)
    tiles = candidates(capability_of(device), dtype.itemsize)
    with torch.cuda.device(device):
        plan = fastest_plan(
            device,
            key,
            tiles,
            lambda run: triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"),
        )
    write_plan(cache_file(device), key_text(key), plan)
    stored_plans.cache_clear()
    lookup.cache_clear()
    return plan
