"""The routed rows in expert order as one array: what sorting the slots yields, for forward and for backward.

Letters: T tokens, E experts, K chosen, N = T*K rows ("slots"), M row tiles.

In one array because each costs the host an allocation, and backward wants all of it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowOrder(NamedTuple):
    """The parts of the array, one behind the other, all int32.

    Attributes:
        inverse_N: inverse[t*K + k] = n, or -1 for a slot that is skipped. First, and so always aligned: the
            kernels that read it are compiled for that.
        order_N: order[n] = t*K + k, the slot whose row is the n-th in expert order; past offsets[E], where
            slots are skipped, no row's.
        tile_expert_M: the expert of each tile of rows, which never crosses from one to the next.
        tile_row_M: the first row of each tile.
        offsets_E1: rows of expert e are offsets[e] .. offsets[e+1]; offsets[E] counts the real rows.
        tile_count_1: how many of the M tiles are used.
    """

    inverse_N: Tensor
    order_N: Tensor
    tile_expert_M: Tensor
    tile_row_M: Tensor
    offsets_E1: Tensor
    tile_count_1: Tensor


def tile_bound(rows: int, experts: int, block_rows: int) -> int:
    """At least the number of row tiles, however the rows are divided: an expert wastes less than one tile."""
    return rows // block_rows + min(experts, rows)


def part_sizes(rows: int, experts: int, block_rows: int) -> tuple[int, ...]:
    """Numbers of elements of the parts; without a tile table where ``block_rows`` is 0."""
    tiles = tile_bound(rows, experts, block_rows) if block_rows else 0
    return rows, rows, tiles, tiles, experts + 1, int(block_rows > 0)


def parts_of(packed: Tensor, sizes: tuple[int, ...]) -> RowOrder:
    """Views of the array; ``sizes`` of :func:`part_sizes`."""
    # Not Tensor.split, whose Python takes as long as a kernel.
    return RowOrder(*torch.split_with_sizes(packed, sizes))
