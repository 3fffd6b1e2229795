"""Which rows belong to which expert: a stable sort and a table of row tiles, without a host sync.

Letters: T tokens, K chosen experts a token ("slots"), E experts, N = T*K rows in expert order, M row tiles.
The index arrays are described in :mod:`flex_kernels.triton.common`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.row_order import part_sizes, parts_of, tile_bound
from flex_kernels.triton.direct import launch
from flex_kernels.triton.tiles import ceil_div, next_power_of_2


# A part of the experts starts anywhere in the offsets, and the rows of the table where the tiles' bound puts
# them: neither is looked at, or some numbers of tokens would compile the kernel again.
@triton.jit(
    do_not_specialize_on_alignment=["offsets_ptr", "tile_expert_ptr", "tile_row_ptr", "tile_count_ptr"]
)
def tile_table_kernel(
    offsets_ptr,  # (E+1,) int32
    tile_expert_ptr,  # (M,) int32
    tile_row_ptr,  # (M,) int32
    tile_count_ptr,  # (1,) int32
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid: E programs; program e writes the row tiles of expert e, and the last one the number of tiles."""
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    start_E = tl.load(offsets_ptr + e, mask=e <= expert, other=0)
    end_E = tl.load(offsets_ptr + e + 1, mask=e <= expert, other=0)
    tiles_E = (end_E - start_E + BM - 1) // BM
    before = tl.sum(tl.where(e < expert, tiles_E, 0), axis=0)
    own = tl.sum(tl.where(e == expert, tiles_E, 0), axis=0)
    first_row = tl.load(offsets_ptr + expert)
    for j in range(0, own, LANES):
        lane = j + tl.arange(0, LANES)
        tl.store(tile_expert_ptr + before + lane, expert + lane * 0, mask=lane < own)
        tl.store(tile_row_ptr + before + lane, first_row + lane * BM, mask=lane < own)
    if expert == E - 1:
        tl.store(tile_count_ptr, before + own)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["order_ptr", "real_ptr"])
def copy_rows_kernel(
    x_ptr,  # (T, R) contiguous
    out_ptr,  # (N, R) contiguous
    order_ptr,  # (N,) int32
    real_ptr,  # (1,) int32: how many of the N rows are real
    rows,  # N
    R: tl.constexpr,
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """Grid: (BM rows, BR columns) of the output. Reads and writes 2 BM BR bytes each in 16-bit types."""
    row_m = tl.program_id(0) * BM + tl.arange(0, BM)
    col_r = tl.program_id(1) * BR + tl.arange(0, BR)
    inside_m = row_m < tl.minimum(tl.load(real_ptr), rows)
    source_m = tl.load(order_ptr + row_m, mask=inside_m, other=0) // SLOTS
    mask_mr = inside_m[:, None] & (col_r < R)[None, :]
    value_mr = tl.load(x_ptr + source_m.to(tl.int64)[:, None] * R + col_r[None, :], mask=mask_mr)
    tl.store(out_ptr + row_m.to(tl.int64)[:, None] * R + col_r[None, :], value_mr, mask=mask_mr)


class Groups(NamedTuple):
    """The rows of a grouped product.

    Attributes:
        rows: N, the number of rows that outputs have; real rows may be fewer where slots are skipped.
        slots: K; row n is token order[n] // K.
        block_m: rows a tile.
        tile_bound: at least the number of tiles, known without asking the device.
        order_N, offsets_E1, tile_expert_M, tile_row_M, tile_count_1: None for a dense expert, whose row n is
            token n.
    """

    rows: int
    slots: int
    block_m: int
    tile_bound: int
    order_N: Tensor | None = None
    offsets_E1: Tensor | None = None
    tile_expert_M: Tensor | None = None
    tile_row_M: Tensor | None = None
    tile_count_1: Tensor | None = None

    @property
    def grouped(self) -> bool:
        return self.order_N is not None

    def pointers(self) -> tuple:
        """The index arrays that every grouped kernel takes, in order."""
        return (
            self.order_N,
            self.offsets_E1,
            self.tile_expert_M,
            self.tile_row_M,
            self.tile_count_1,
        )

    @property
    def real_1(self) -> Tensor | None:
        """The end of the last expert's rows; None for a dense expert."""
        return None if self.offsets_E1 is None else self.offsets_E1[-1:]

    def of_experts(self, first: int, end: int) -> Groups:
        """The rows of experts ``first`` .. ``end`` - 1, left in their places; the first is their expert 0."""
        if self.offsets_E1 is None or self.order_N is None:
            raise ValueError("a dense expert's rows cannot be split by expert")
        return grouped(self.offsets_E1[first : end + 1], self.order_N, self.slots, self.block_m)


def copy_rows(x_TR: Tensor, groups: Groups) -> Tensor:
    """[N, R]: the rows of ``x_TR`` in expert order; those past the last real one are not written."""
    R = x_TR.shape[1]
    out_NR = x_TR.new_empty(groups.rows, R)
    rows, columns = 16, min(256, next_power_of_2(R))
    launch(
        copy_rows_kernel,
        x_TR.device,
        (ceil_div(groups.rows, rows), ceil_div(R, columns)),
        (x_TR, out_NR, groups.order_N, groups.real_1),
        (groups.rows,),
        (),
        R=R,
        SLOTS=groups.slots,
        BM=rows,
        BR=columns,
        num_warps=4,
    )
    return out_NR


def permute(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets_E1, order_N, inverse_N) of :class:`flex_kernels.row_order.RowOrder`."""
    found = parts_of(sort_rows(ids_TK, experts, 0), part_sizes(ids_TK.numel(), experts, 0))
    return found.offsets_E1, found.order_N, found.inverse_N


def sort_rows(ids_TK: Tensor, experts: int, block_m: int) -> Tensor:
    """The slots sorted by expert, stably, and the table of their tiles: a
    :class:`flex_kernels.row_order.RowOrder` in one piece. The sort is plain torch.

    Args:
        ids_TK: int32, contiguous; ``experts`` marks a slot to skip, whose place is past offsets[E].
        block_m: rows a tile, or 0 for no table.
    """
    flat_N, sizes = ids_TK.reshape(-1), part_sizes(ids_TK.numel(), experts, block_m)
    packed = torch.empty(sum(sizes), dtype=torch.int32, device=flat_N.device)
    parts = parts_of(packed, sizes)
    sorted_N, order_N = flat_N.sort(stable=True)
    parts.order_N.copy_(order_N)
    bounds_E1 = torch.arange(experts + 1, dtype=flat_N.dtype, device=flat_N.device)
    torch.searchsorted(sorted_N, bounds_E1, out_int32=True, out=parts.offsets_E1)
    rank_N = torch.arange(flat_N.numel(), dtype=torch.int32, device=flat_N.device)
    parts.inverse_N.scatter_(0, order_N, torch.where(sorted_N < experts, rank_N, -1))
    if block_m:
        write_tiles(parts.offsets_E1, block_m, parts.tile_expert_M, parts.tile_row_M, parts.tile_count_1)
    return packed


def sorted_groups(packed: Tensor, ids_TK: Tensor, experts: int, block_m: int) -> tuple[Groups, Tensor]:
    """(the routed rows in expert order, inverse_TK) of what :func:`sort_rows` found for ``ids_TK``."""
    sizes = part_sizes(ids_TK.numel(), experts, block_m)
    inverse_N, order_N, tile_expert_M, tile_row_M, offsets_E1, tile_count_1 = parts_of(packed, sizes)
    tables = order_N, offsets_E1, tile_expert_M, tile_row_M, tile_count_1
    return Groups(sizes[0], ids_TK.shape[1], block_m, sizes[2], *tables), inverse_N.view_as(ids_TK)


def dense(tokens: int, block_m: int) -> Groups:
    """One expert that owns every token."""
    return Groups(tokens, 1, block_m, ceil_div(tokens, block_m))


def grouped(offsets_E1: Tensor, order_N: Tensor, slots: int, block_m: int) -> Groups:
    """Sorted rows cut into tiles of ``block_m`` rows that never cross from one expert to the next."""
    N, E = order_N.numel(), offsets_E1.numel() - 1
    bound = tile_bound(N, E, block_m)
    table_2M = torch.empty(2, bound, dtype=torch.int32, device=order_N.device)
    tile_count_1 = torch.empty(1, dtype=torch.int32, device=order_N.device)
    write_tiles(offsets_E1, block_m, table_2M[0], table_2M[1], tile_count_1)
    return Groups(N, slots, block_m, bound, order_N, offsets_E1, table_2M[0], table_2M[1], tile_count_1)


def write_tiles(
    offsets_E1: Tensor, block_m: int, tile_expert_M: Tensor, tile_row_M: Tensor, tile_count_1: Tensor
) -> None:
    """Fill the table of row tiles and their number."""
    E = offsets_E1.numel() - 1
    launch(
        tile_table_kernel,
        offsets_E1.device,
        (E, 1),
        (offsets_E1, tile_expert_M, tile_row_M, tile_count_1),
        (),
        (),
        E=E,
        E_POW2=next_power_of_2(E),
        BM=block_m,
        LANES=128,
        num_warps=4,
    )
