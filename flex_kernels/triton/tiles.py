"""Block sizes of the grouped kernels: the pinned plans, and how a tile becomes a launch.

Letters: E experts, N rows. m, n, k are the block sizes of a tile: rows, output columns, reduced columns.
A plan only decides speed, except that k fixes the order in which a product is summed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Stands for Triton's interpreter in place of a compute capability.
INTERPRETER = 0


@dataclass(frozen=True)
class Tile:
    """One kernel's launch.

    Attributes:
        m, n, k: block sizes; powers of two, at least 16.
        group: row tiles that sweep the columns together.
        warps, stages: warps a program, and the depth of the software pipeline.
        tma: weights, and rows that need no gather, through tensor descriptors where their strides allow it.
        copy_rows: with ``tma``, rows that need a gather are copied into expert order first, one launch more,
            and then need none.
        per_sm: programs a multiprocessor of a persistent grid; 0 launches one program a tile.
        flatten: of a persistent grid: fetch the next tile's operands while the epilogue of this one runs.
    """

    m: int
    n: int
    k: int
    group: int = 8
    warps: int = 4
    stages: int = 3
    tma: bool = False
    copy_rows: bool = False
    per_sm: int = 0
    flatten: bool = False


@dataclass(frozen=True)
class Plan:
    """The tiles of one set of experts; all have the same ``m``, so that one tile table serves them."""

    up: Tile
    down: Tile
    down_backward: Tile
    up_backward: Tile

    @property
    def m(self) -> int:
        return self.up.m


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. Triton's own ``cdiv`` takes microseconds on the host, and every launch asks."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``, for n >= 1."""
    return 1 << (n - 1).bit_length()


def same(tile: Tile) -> Plan:
    return Plan(tile, tile, tile, tile)


# 16-bit plans by (least compute capability, most rows an expert that the tile suits). They fit the shared
# memory of every chip of that capability or above: 99 KiB for sm_80 (sm_86, sm_89 and sm_120 have no more),
# 227 KiB for sm_90.
AMPERE = {
    16: same(Tile(16, 64, 128, group=1, warps=4, stages=2)),
    32: same(Tile(32, 64, 64, group=2, warps=4, stages=3)),
    64: same(Tile(64, 64, 64, group=4, warps=4, stages=3)),
    128: Plan(
        up=Tile(128, 64, 64, warps=8, stages=3),
        down=Tile(128, 128, 64, warps=8, stages=3),
        down_backward=Tile(128, 64, 64, warps=8, stages=3),
        up_backward=Tile(128, 128, 64, warps=8, stages=3),
    ),
}
HOPPER = {
    16: same(Tile(16, 64, 128, group=1, warps=4, stages=4)),
    32: same(Tile(32, 64, 128, group=2, warps=4, stages=4)),
    64: replace(
        same(Tile(64, 128, 64, group=4, warps=4, stages=4, tma=True)),
        up=Tile(64, 64, 64, group=4, warps=4, stages=4, tma=True),
    ),
    128: Plan(
        up=Tile(128, 128, 64, warps=8, stages=4, tma=True, per_sm=1, flatten=True),
        down=Tile(128, 256, 64, warps=8, stages=4, tma=True, per_sm=1, flatten=True),
        down_backward=Tile(128, 128, 64, warps=8, stages=4, tma=True, per_sm=1, flatten=True),
        up_backward=Tile(128, 256, 64, warps=8, stages=4, tma=True, per_sm=1, flatten=True),
    ),
}
# float32 products run on the plain cores: small tiles, or the accumulators spill.
FLOAT32 = {
    16: same(Tile(16, 32, 32, group=1, warps=4, stages=2)),
    64: same(Tile(64, 32, 16, group=4, warps=4, stages=2)),
}
# The interpreter runs a program at a time, in NumPy: what matters is that tiles are smaller than the tests'
# shapes.
INTERPRETED = {16: same(Tile(16, 64, 64, group=2, per_sm=3))}


def plain_plans(capability: int) -> dict[int, Plan]:
    """The pinned plans by rows a tile, for 16-bit products. HOPPER's take up to 227 KiB of shared memory,
    as sm_90 and sm_100 have it; sm_120 has the 99 KiB of sm_86."""
    return HOPPER if 90 <= capability < 120 else AMPERE


def pinned_plan(capability: int, itemsize: int, rows: int, experts: int) -> Plan:
    """The plan used where nothing was tuned: it depends on sizes known to the host alone and benchmarks
    nothing.

    Args:
        capability: 80, 90, ...; or INTERPRETER.
        itemsize: bytes of an element of x.
        rows: rows over all experts; experts: how many share them.
    """
    if capability == INTERPRETER:
        plans = INTERPRETED
    elif itemsize == 4:
        plans = FLOAT32
    else:
        plans = plain_plans(capability)
    each = rows / experts
    return plans[min((m for m in plans if m >= each), default=max(plans))]


def capability_of(device: torch.device) -> int:
    """80 for sm_80, ...; INTERPRETER for a tensor that only the interpreter can reach."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return 1 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def grid_size(tiles: int, tile: Tile, device: torch.device) -> int:
    """Programs to launch for at most ``tiles`` tiles."""
    return min(tiles, multiprocessors(device) * tile.per_sm) if tile.per_sm else tiles


def descriptor(t: Tensor, block: tuple[int, ...]) -> TensorDescriptor | None:
    """A tensor descriptor of ``t`` as stored, or None where the copy engine cannot address it.

    It wants the last dimension dense, the others at multiples of 16 bytes, a 16-byte aligned start and no
    empty dimension.
    """
    *outer, last = t.stride()
    aligned = all(s * t.element_size() % 16 == 0 for s in outer) and t.data_ptr() % 16 == 0
    if last != 1 or not aligned or not t.numel():
        return None
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def candidates(capability: int, itemsize: int, coded: bool = False) -> dict[int, list[Tile]]:
    """The few tiles that tuning tries for every product, by m: the pinned ones and their likely neighbours.

    ``coded``: for weights in 8 or 4 bits. Few rows are multiplied while they are decoded, in tiles of at most
    64 x 64 (:func:`flex_kernels.triton.codes.suited` cuts larger ones); many rows meet decoded weights, so
    their tiles are the plain ones.
    """
    if itemsize == 4:
        return {m: [plan.up] for m, plan in FLOAT32.items()}
    found = {}
    for m, plan in plain_plans(capability).items():
        pinned_tiles = {plan.up, plan.down, plan.down_backward, plan.up_backward}
        tiles = set(pinned_tiles)
        tiles |= {replace(t, stages=t.stages - 1) for t in tuple(tiles) if t.stages > 2}
        tiles |= {replace(t, n=64, warps=4) for t in tuple(tiles) if t.n > 64}
        if any(t.tma for t in pinned_tiles):
            tiles |= {replace(t, tma=False, per_sm=0, flatten=False) for t in tuple(tiles) if t.tma}
            tiles |= {replace(t, flatten=False) for t in pinned_tiles if t.flatten}
            tiles |= {replace(t, copy_rows=True) for t in (plan.up, plan.down_backward)}
        if coded and m < 128:
            base = Tile(m, 64, 64, group=plan.up.group)
            tiles = {replace(base, stages=s, warps=w) for s in (2, 3, 4) for w in (4, 8)}
            tiles |= {replace(base, n=32), replace(base, k=32)}
        found[m] = sorted(tiles, key=lambda t: (t.n, t.k, t.warps, t.stages, t.tma, t.copy_rows, t.flatten))
    return found


def near(tiles_by_m: dict[int, list[Tile]], rows: int, experts: int) -> dict[int, list[Tile]]:
    """The candidates of the row block that suits the rows an expert gets, and of its two neighbours."""
    blocks, each = sorted(tiles_by_m), rows / experts
    middle = next((i for i, m in enumerate(blocks) if m >= each), len(blocks) - 1)
    return {m: tiles_by_m[m] for m in blocks[max(0, middle - 1) : middle + 2]}
