"""What the grouped kernels share on the device: which tile a program works on and which rows it owns.

Letters: T tokens, K chosen experts a token ("slots"), E experts, N = T*K rows in expert order, M row tiles.

The index arrays, all int32:
    order_N         order[n] = t*K + k: the slot whose row is the n-th in expert order
    inverse_N       inverse[t*K + k] = n, or -1 for a slot that is skipped
    offsets_E1      rows of expert e are offsets[e] .. offsets[e+1]; offsets[E] counts the real rows
    tile_expert_M   expert of each row tile
    tile_row_M      first row of each row tile
    tile_count_1    how many of the M tiles are real; M itself is a bound that the host knows
"""

import triton
import triton.language as tl


@triton.jit
def tile_coordinates(tile, m_tiles, N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, column tile) of linear index ``tile``: GROUP_M row tiles sweep the columns together.

    Row tiles of one expert are neighbours, so a group reads each weight tile from L2 after its first member.
    """
    group = tile // (GROUP_M * N_TILES)
    first = group * GROUP_M
    size = tl.minimum(m_tiles - first, GROUP_M)
    inside = tile - group * (GROUP_M * N_TILES)
    return first + inside % size, inside // size


@triton.jit
def expert_rows(m, offsets_ptr, tile_expert_ptr, tile_row_ptr, rows, GROUPED: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, end of the expert's rows) of row tile ``m``; one expert and ``rows`` rows when not
    GROUPED."""
    if GROUPED:
        expert = tl.load(tile_expert_ptr + m)
        first = tl.load(tile_row_ptr + m)
        end = tl.load(offsets_ptr + expert + 1)
    else:
        expert = m * 0
        first = m * BM
        end = rows
    return expert, first, end


@triton.jit
def row_tile_count(tile_count_ptr, rows, GROUPED: tl.constexpr, BM: tl.constexpr):
    """How many row tiles there are to compute."""
    count = tl.load(tile_count_ptr) if GROUPED else tl.cdiv(rows, BM)
    return count


@triton.jit
def load_tile(pointers, row_mask, col_mask, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    """A 2-D tile with zeros outside; a mask that is known to be all true is left out, so that loads stay
    wide."""
    if EVEN_ROWS and EVEN_COLS:
        tile = tl.load(pointers)
    elif EVEN_ROWS:
        tile = tl.load(pointers, mask=col_mask, other=0.0)
    elif EVEN_COLS:
        tile = tl.load(pointers, mask=row_mask, other=0.0)
    else:
        tile = tl.load(pointers, mask=row_mask & col_mask, other=0.0)
    return tile


@triton.jit
def column_halves(tile_mn, BM: tl.constexpr, BN: tl.constexpr):
    """(left, right) halves [BM, BN / 2] of an accumulator: an epilogue that takes one at a time needs half
    the registers."""
    return tl.split(tl.permute(tl.reshape(tile_mn, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def column_quarter(tile_mn, index: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Columns index * BN / 4 .. (index + 1) * BN / 4 - 1 of an accumulator; see :func:`column_halves`."""
    left, right = column_halves(tile_mn, BM, BN)
    half = left if index < 2 else right
    first, second = column_halves(half, BM, BN // 2)
    return first if index % 2 == 0 else second
