"""Frozen weights in 8 or 4 bits as the grouped kernels read them: the one decoder, and where it runs.

Letters: E experts, R rows and C columns of one expert's matrix as stored, G its column groups of 64.

Forward and backward read the same codes (:class:`flex_kernels.quantize.Quantized`): forward reduces along a
stored row, backward along a stored column. Which way they are decoded is decided by the rows of a tile, so on
the host and from sizes alone:

    few rows    (at most IN_LOOP_ROWS a tile) every tile of codes is decoded in the kernel's main loop
    many rows   some experts at a time are decoded into one buffer of at most STAGED_BYTES, and the plain
                kernel runs over their rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.quantize import GROUP_COLUMNS, NF4_LEVELS, Quantized
from flex_kernels.triton.common import load_tile
from flex_kernels.triton.direct import launch
from flex_kernels.triton.groups import Groups
from flex_kernels.triton.tiles import Plan, Tile, capability_of, ceil_div, pinned_plan

Weights = Tensor | Quantized
# Most rows a tile for which decoding in the main loop is meant: every row tile decodes its weights again.
IN_LOOP_ROWS = 64
# Most columns, output or reduced, of such a tile; a tile of 4-bit codes must lie in one group of columns.
IN_LOOP_COLUMNS = GROUP_COLUMNS
# Bytes of decoded weights at a time when rows are many.
STAGED_BYTES = 64 * 2**20
# Programs a multiprocessor for the plain kernel over a staged part of the experts, where its tile names none:
# the host's bound on the row tiles of a part is nearly that of all, so most programs would find nothing.
STAGED_PER_SM = 2

PLAIN, INT8, NF4 = 0, 1, 2
KINDS = {"int8": INT8, "nf4": NF4}
IS_INT8 = tl.constexpr(INT8)
GROUP = tl.constexpr(GROUP_COLUMNS)
LEVELS = tl.constexpr(NF4_LEVELS)


@triton.jit
def nf4_values(code_rc, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The levels, float32, of 4-bit codes [ROWS, COLS].

    The 16 levels are constants, looked up through shared memory: one load a code, no table in global memory.
    """
    index = tl.arange(0, 16)
    level = tl.full((16,), LEVELS[15], dtype=tl.float32)
    for i in tl.static_range(15):
        level = tl.where(index == i, LEVELS[i], level)
    flat = tl.reshape(code_rc, (ROWS * COLS,)).to(tl.int32)
    return tl.reshape(tl.gather(level, flat, 0), (ROWS, COLS))


@triton.jit
def load_row_scales(scales_ptr, row_r, mask_r, stride_sr):
    """Float32 scales of rows, zero where masked; of one column group, whose first scale ``scales_ptr`` is."""
    return tl.load(scales_ptr + row_r.to(tl.int64) * stride_sr, mask=mask_r, other=0.0).to(tl.float32)


@triton.jit
def load_decoded(
    codes_ptr,  # (R, C) int8, or (R, ceil(C / 2)) uint8: of one expert
    scales_ptr,  # (R,), or (R, G): of the same expert
    row_r,
    mask_r,
    first_col,
    stride_wr,
    stride_wc,
    stride_sr,
    stride_sg,
    dtype: tl.constexpr,
    C: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Weights [ROWS, COLS] in ``dtype``, in the orientation they are stored in, from column ``first_col``, a
    multiple of COLS, which is at most 64. Rows that are masked are zero; columns past C are finite.

    Each product of code and scale is rounded once. Without SCALED, int8 codes come without their scales, for
    a product that applies them to its sum; 4-bit weights always have theirs.
    """
    row_r1 = row_r.to(tl.int64)[:, None]
    if KIND == IS_INT8:
        col_c = first_col + tl.arange(0, COLS)
        code_rc = load_tile(
            codes_ptr + row_r1 * stride_wr + col_c[None, :] * stride_wc,
            mask_r[:, None],
            (col_c < C)[None, :],
            EVEN_ROWS,
            C % COLS == 0,
        )
        value_rc = code_rc.to(tl.float32)
        if SCALED:
            value_rc *= load_row_scales(scales_ptr, row_r, mask_r, stride_sr)[:, None]
    else:
        # A tile lies in one group of columns, so its scales are a vector: as a matrix of one column they
        # would be loaded once for every column of a thread.
        tl.static_assert(COLS <= GROUP)
        byte_b = first_col // 2 + tl.arange(0, COLS // 2)
        pair_rb = load_tile(
            codes_ptr + row_r1 * stride_wr + byte_b[None, :] * stride_wc,
            mask_r[:, None],
            (byte_b < (C + 1) // 2)[None, :],
            EVEN_ROWS,
            C % COLS == 0,
        )
        code_rc = tl.reshape(tl.join(pair_rb & 15, pair_rb >> 4), (ROWS, COLS))
        value_rc = nf4_values(code_rc, ROWS, COLS)
        group_ptr = scales_ptr + first_col // GROUP * stride_sg
        value_rc *= load_row_scales(group_ptr, row_r, mask_r, stride_sr)[:, None]
    return value_rc.to(dtype)


@triton.jit
def decode_kernel(
    codes_ptr,  # (E, R, C) int8, or (E, R, ceil(C / 2)) uint8; any strides
    scales_ptr,  # (E, R), or (E, R, G); any strides
    out_ptr,  # (E, R, C) contiguous
    stride_we,
    stride_wr,
    stride_wc,
    stride_se,
    stride_sr,
    stride_sg,
    R: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Grid: (ceil(R / BR) * ceil(C / BC), E); a program decodes one [BR, BC] tile of one expert.

    Reads 1 or 1/2 byte a weight and its scale, and writes the weight in out's type.
    """
    C_TILES: tl.constexpr = (C + BC - 1) // BC
    expert = tl.program_id(1).to(tl.int64)
    row_r = tl.program_id(0) // C_TILES * BR + tl.arange(0, BR)
    first_col = tl.program_id(0) % C_TILES * BC
    weight_rc = load_decoded(
        codes_ptr + expert * stride_we,
        scales_ptr + expert * stride_se,
        row_r,
        row_r < R,
        first_col,
        stride_wr,
        stride_wc,
        stride_sr,
        stride_sg,
        out_ptr.dtype.element_ty,
        C,
        R % BR == 0,
        KIND,
        True,
        BR,
        BC,
    )
    col_c = first_col + tl.arange(0, BC)
    out_rc = out_ptr + expert * R * C + row_r.to(tl.int64)[:, None] * C + col_c[None, :]
    tl.store(out_rc, weight_rc, mask=(row_r < R)[:, None] & (col_c < C)[None, :])


def kind_of(w: Weights) -> int:
    """PLAIN, INT8 or NF4."""
    return KINDS[w.kind] if isinstance(w, Quantized) else PLAIN


def stored(w: Weights) -> Tensor:
    """What the kernel's weight pointer points to: the weights, or their codes."""
    return w.codes if isinstance(w, Quantized) else w


def scale_arguments(w: Weights) -> tuple[Any, ...]:
    """(scales, strides of expert, row and group) as the kernels take them; unused for plain weights."""
    if not isinstance(w, Quantized):
        return None, 0, 0, 0
    return w.scales, *w.scales.stride()[:2], w.scales.stride(2) if w.scales.ndim == 3 else 0


def decode(w: Quantized, out_ERC: Tensor) -> None:
    """Write the weights [E, R, C] in ``out_ERC``'s dtype, contiguous, each product rounded once."""
    E, R, C = w.shape
    rows, columns = 64, 64
    launch(
        decode_kernel,
        w.codes.device,
        (ceil_div(R, rows) * ceil_div(C, columns), E),
        (w.codes, w.scales, out_ERC),
        (),
        (*w.codes.stride(), *scale_arguments(w)[1:]),
        R=R,
        C=C,
        KIND=kind_of(w),
        BR=rows,
        BC=columns,
        num_warps=4,
    )


def staged_experts(w: Quantized, itemsize: int) -> int:
    """Experts that are decoded at a time; 0 when not even one fits STAGED_BYTES.

    As many as fit, less what makes the parts more even: the tile table is compiled for a number of experts.
    """
    E, R, C = w.shape
    fit = min(E, STAGED_BYTES // (R * C * itemsize))
    return ceil_div(E, ceil_div(E, fit)) if fit else 0


def decodes_in_loop(tile: Tile) -> bool:
    """Whether the kernel itself decodes, tile by tile; else parts of the experts are decoded before it."""
    return tile.m <= IN_LOOP_ROWS


def suited(tile: Tile, w: Weights, per_column: int = 1) -> Tile:
    """``tile`` with what the weights ask of it; its rows stay. ``per_column``: weight rows an output column.

    Decoded tiles pass through registers: 64 x 64 weights at three stages compile without spills for sm_80 and
    sm_90 in every kernel. Codes are read by pointers.
    """
    if not isinstance(w, Quantized):
        return tile
    if decodes_in_loop(tile):
        if max(tile.n * per_column, tile.k) > IN_LOOP_COLUMNS:
            n, k = min(tile.n, IN_LOOP_COLUMNS // per_column), min(tile.k, IN_LOOP_COLUMNS)
            tile = replace(tile, n=n, k=k, warps=4, stages=3)
        return replace(tile, tma=False)
    return replace(tile, per_sm=tile.per_sm or STAGED_PER_SM)


def pieces(w: Weights, groups: Groups, tile: Tile, dtype: torch.dtype) -> Iterator[tuple[Weights, Groups]]:
    """(weights, rows) of the launches that make up one grouped product, in order.

    Plain weights and few rows: one launch. Many rows of quantised weights: one for every part of the experts,
    whose decoded weights are in one buffer that the next part overwrites.

    Raises:
        ValueError: one expert's matrix alone exceeds STAGED_BYTES; :func:`decodable` keeps from that.
    """
    if not isinstance(w, Quantized) or decodes_in_loop(tile):
        yield w, groups
        return
    E, R, C = w.shape
    count = staged_experts(w, dtype.itemsize)
    if not count:
        raise ValueError(
            f"one expert's matrix [{R}, {C}] in {dtype} exceeds the {STAGED_BYTES} bytes "
            "that are decoded at a time"
        )
    buffer = torch.empty(count, R, C, dtype=dtype, device=w.device)
    for first in range(0, E, count):
        end = min(first + count, E)
        decode(w[first:end], buffer[: end - first])
        yield buffer[: end - first], groups.of_experts(first, end) if groups.grouped else groups


def decodable(plan: Plan, weights: Sequence[Weights], x: Tensor) -> Plan:
    """``plan``, or the pinned one for IN_LOOP_ROWS rows where one expert is too large to be decoded ahead."""
    staged = [staged_experts(w, x.element_size()) for w in weights if isinstance(w, Quantized)]
    if decodes_in_loop(plan.up) or all(staged):
        return plan
    E = weights[0].shape[0]
    return pinned_plan(capability_of(x.device), x.element_size(), IN_LOOP_ROWS * E, E)
