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
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from flex_kernels.quantize import KINDS, Quantized, quantize
from flex_kernels.triton.tiles import (
    INTERPRETER,
    Plan,
    Tile,
    candidates,
    capability_of,
    near,
    pinned_plan,
)

# (dtype of x, weights, H, I, E, K, bucket of T)
Key = tuple[str, str, int, int, int, int, int]
Timer = Callable[[Callable[[], object]], float]
PLAIN = "plain"
WEIGHTS = (PLAIN, *KINDS)
PRODUCTS = ("up", "down", "down_backward", "up_backward")
# Those whose rows of routed experts need a gather.
GATHERING = ("up", "down_backward")


def bucket(tokens: int) -> int:
    """Token counts share a plan up to the next power of two, at least 16."""
    return max(16, 1 << (tokens - 1).bit_length())


def cache_file(device: torch.device) -> Path:
    """Where the plans of this GPU and Triton version are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return root / "flex-kernels" / f"triton-{triton.__version__}-{gpu}.json"


def weights_text(gate_up: torch.Tensor | Quantized, down: torch.Tensor | Quantized) -> str:
    """What a plan's key says of the weights: "plain", "int8" or "nf4", or both where they differ."""
    first, second = (w.kind if isinstance(w, Quantized) else PLAIN for w in (gate_up, down))
    return first if first == second else f"{first}+{second}"


def key_of(dtype: torch.dtype, H: int, I: int, E: int, K: int, T: int, weights: str = PLAIN) -> Key:
    return (str(dtype).removeprefix("torch."), weights, H, I, E, K, bucket(T))


def key_text(key: Key) -> str:
    dtype, weights, H, I, E, K, tokens = key
    return f"{dtype}{'' if weights == PLAIN else ' ' + weights} H{H} I{I} E{E} K{K} T{tokens}"


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


def lookup(device: torch.device, key: Key) -> Plan:
    dtype, _, _, _, E, K, tokens = key
    capability = capability_of(device)
    if capability != INTERPRETER:
        tuned = stored_plans(cache_file(device)).get(key_text(key))
        if tuned is not None:
            return tuned
    return pinned_plan(capability, 4 if dtype == "float32" else 2, tokens * K, E)


@lru_cache(maxsize=4096)
def plan_for(
    device: torch.device, dtype: torch.dtype, H: int, I: int, E: int, K: int, T: int, weights: str = PLAIN
) -> Plan:
    """The plan of one set of experts, from sizes and :func:`weights_text` alone; E = K = 1 for a dense
    expert."""
    return lookup(device, key_of(dtype, H, I, E, K, T, weights))


@dataclass(frozen=True)
class Best:
    """What measuring found for one layer shape.

    Attributes:
        plan: the fastest tiles.
        milliseconds: of each product with its tile, by the names in PRODUCTS.
        tried, failed: how many tiles were measured, and how many did not compile or fit.
        timed: (milliseconds, tile) of every tile that ran, by product; of one height the fastest first.
    """

    plan: Plan
    milliseconds: dict[str, float]
    tried: int
    failed: int
    timed: dict[str, list[tuple[float, Tile]]]


def time_tiles(
    run: Callable[[Tile], object], tiles: list[Tile], time_ms: Timer, failed: list[str] | None = None
) -> list[tuple[float, Tile]]:
    """(milliseconds, tile) of those that compile and fit the chip, the fastest first.

    Why the others do not is added to ``failed``.
    """
    timed, reasons = [], [] if failed is None else failed
    for tile in tiles:
        try:
            timed.append((time_ms(partial(run, tile)), tile))
        except (TritonError, RuntimeError) as error:
            reasons.append(f"{tile}: {type(error).__name__}: {error}")
    return sorted(timed, key=lambda pair: pair[0])


class Products:
    """The four products of one layer shape on random weights and balanced random routing, to be timed by
    tile."""

    def __init__(self, device: torch.device, key: Key, seed: int = 0):
        from flex_kernels.triton.groups import permute

        dtype_name, weights, H, I, E, self.K, T = key
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, dtype_name)

        def random(*shape: int) -> torch.Tensor:
            values = torch.empty(shape, dtype=dtype, device=device)
            return values.normal_(0, shape[-1] ** -0.5, generator=generator)

        self.x_TH = random(T, H)
        self.act_NI, self.preact_N2I = random(T * self.K, I), random(T * self.K, 2 * I)
        first, _, second = weights.partition("+")
        self.gate_up = coded(random(E, 2 * I, H), first)
        self.down = coded(random(E, H, I), second or first)
        ids_TK = torch.rand(T, E, device=device, generator=generator).topk(self.K, dim=1).indices.int()
        self.weights_TK = torch.full((T, self.K), 1 / self.K, device=device)
        self.offsets_E1, self.order_N, _ = permute(ids_TK, E)

    def fits(self, m: int) -> bool:
        """Whether the weights can be read with tiles of ``m`` rows; see :mod:`flex_kernels.triton.codes`."""
        from flex_kernels.triton.codes import IN_LOOP_ROWS, staged_experts

        itemsize = self.x_TH.element_size()
        held = [w for w in (self.gate_up, self.down) if isinstance(w, Quantized)]
        return m <= IN_LOOP_ROWS or all(staged_experts(w, itemsize) for w in held)

    def by_name(self, m: int) -> dict[str, Callable[[Tile], object]]:
        """The products over rows cut into tiles of ``m``, by the names in PRODUCTS."""
        from flex_kernels.triton.down_backward import down_backward
        from flex_kernels.triton.grouped_gemm import grouped_gemm
        from flex_kernels.triton.groups import dense, grouped
        from flex_kernels.triton.up_swiglu import up_swiglu

        experts, tokens = self.offsets_E1.numel() - 1, self.x_TH.shape[0]
        routed = (self.offsets_E1, self.order_N, self.K, m)
        groups = dense(tokens, m) if experts == 1 else grouped(*routed)

        def backward(tile: Tile) -> object:
            x_TH, z_N2I, weights_TK = self.x_TH, self.preact_N2I, self.weights_TK
            return down_backward(x_TH, self.down, z_N2I, groups, tile, weights_TK, None, True, False, True)

        return {
            "up": lambda tile: up_swiglu(self.x_TH, self.gate_up, groups, tile, True, False),
            "down": lambda tile: grouped_gemm(self.act_NI, self.down, True, groups, tile),
            "down_backward": backward,
            "up_backward": lambda tile: grouped_gemm(self.preact_N2I, self.gate_up, False, groups, tile),
        }


def tiles_of(name: str, key: Key, tiles: list[Tile]) -> list[Tile]:
    """Those of ``tiles`` to try for one of PRODUCTS: rows are copied only where they need a gather."""
    experts = key[4]
    return [tile for tile in tiles if not tile.copy_rows or (experts > 1 and name in GATHERING)]


def coded(w: torch.Tensor, weights: str) -> torch.Tensor | Quantized:
    return w if weights == PLAIN else quantize(w, weights)  # type: ignore[arg-type]


def fastest_plan(
    device: torch.device, key: Key, tiles_by_m: dict[int, list[Tile]], time_ms: Timer, seed: int = 0
) -> Best:
    """The plan with the least total time of its four products.

    Raises:
        RuntimeError: no candidate runs on this device; the message has the first reason.
    """
    products = Products(device, key, seed)
    found: list[tuple[float, Plan, dict[str, float]]] = []
    failed: list[str] = []
    timed: dict[str, list[tuple[float, Tile]]] = {name: [] for name in PRODUCTS}
    tried = 0
    for m, tiles in tiles_by_m.items():
        if not products.fits(m):
            continue
        best = {}
        for name, run in products.by_name(m).items():
            own = tiles_of(name, key, tiles)
            tried += len(own)
            ran = time_tiles(run, own, time_ms, failed)
            timed[name] += ran
            if ran:
                best[name] = ran[0]
        if len(best) == len(PRODUCTS):
            milliseconds = {name: best[name][0] for name in PRODUCTS}
            plan = Plan(*(best[name][1] for name in PRODUCTS))
            found.append((sum(milliseconds.values()), plan, milliseconds))
    if not found:
        raise RuntimeError(f"no tile runs on {device} for {key_text(key)}: {'; '.join(failed[:1])}")
    _, plan, milliseconds = min(found, key=lambda one: one[0])
    return Best(plan, milliseconds, tried, len(failed), timed)


def compile_share(
    device: torch.device, key: Key, tiles_by_m: dict[int, list[Tile]], part: int, of: int
) -> None:
    """Run every ``of``-th candidate once, which leaves its compiled kernel in Triton's cache on disk."""
    products = Products(device, key)
    with torch.cuda.device_of(products.x_TH):
        jobs = [
            (run, tile)
            for m, tiles in tiles_by_m.items()
            if products.fits(m)
            for name, run in products.by_name(m).items()
            for tile in tiles_of(name, key, tiles)
        ]
        for run, tile in jobs[part::of]:
            time_tiles(run, [tile], lambda job: float(job() is None))


def compile_ahead(device: torch.device, key: Key, tiles_by_m: dict[int, list[Tile]], workers: int) -> None:
    """Compile the candidates in ``workers`` processes; one that fails leaves its share to the measurement."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(compile_share, device, key, tiles_by_m, i, workers) for i in range(workers)]
        for share in shares:
            error = share.exception()
            if error is not None and not isinstance(error, (BrokenProcessPool, RuntimeError, TritonError)):
                raise error


def tune(
    dtype: torch.dtype,
    H: int,
    I: int,
    E: int,
    K: int,
    T: int,
    device: torch.device | None = None,
    weights: str = PLAIN,
    workers: int = 1,
) -> Best:
    """Measure the candidate tiles for one layer shape on this GPU and keep the best plan on disk.

    Args:
        dtype: of the layer's input and, unless they are quantised, its experts.
        H, I, E, K: hidden size, expert width, experts, experts a token; E = K = 1 tunes a dense expert.
        T: tokens a call; rounded up to a power of two.
        device: a CUDA device; None for the current one.
        weights: "plain", "int8" or "nf4".
        workers: processes that compile the candidates before they are measured; 1 compiles them on the way.

    Raises:
        ValueError: ``weights`` is unknown, or K exceeds E.
        RuntimeError: there is no CUDA device, or no candidate runs on it.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not one of {', '.join(map(repr, WEIGHTS))}")
    if not 1 <= K <= E:
        raise ValueError(f"K={K} is not between 1 and the {E} experts")
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on a GPU, and torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    key = key_of(dtype, H, I, E, K, T, weights)
    tiles = near(candidates(capability_of(device), dtype.itemsize, weights != PLAIN), key[-1] * K, E)
    if workers > 1:
        compile_ahead(device, key, tiles, workers)
    with torch.cuda.device(device):
        best = fastest_plan(
            device,
            key,
            tiles,
            lambda run: triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"),
        )
    write_plan(cache_file(device), key_text(key), best.plan)
    stored_plans.cache_clear()
    plan_for.cache_clear()
    return best
