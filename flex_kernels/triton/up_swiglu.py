"""Grouped up-projection with SwiGLU: Z = x [W1; W3]^T and A = silu(Z_gate) * Z_up, by expert.

Letters: T tokens, H hidden, E experts, I expert width, N rows in expert order (N = T for a dense expert), M
row tiles. The index arrays are described in :mod:`flex_kernels.triton.common`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.triton.codes import (
    IS_INT8,
    Weights,
    load_decoded,
    load_row_scales,
    pieces,
    scale_arguments,
    stored,
    suited,
)
from flex_kernels.triton.common import column_halves, expert_rows, load_tile, row_tile_count, tile_coordinates
from flex_kernels.triton.groups import Groups
from flex_kernels.triton.launch import described_rows, grouped_jit, grouped_launch
from flex_kernels.triton.tiles import Tile, descriptor


@triton.jit
def store_swiglu(
    gate_mn,
    up_mn,
    row_m,
    inside_m,
    first_col,
    a_ptr,
    z_ptr,
    I: tl.constexpr,
    WRITE_A: tl.constexpr,
    WRITE_Z: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue on BN columns from ``first_col``."""
    col_n = first_col + tl.arange(0, BN)
    mask_mn = inside_m[:, None] & (col_n < I)[None, :]
    row_m1 = row_m.to(tl.int64)[:, None]
    if WRITE_Z:
        z_mn = z_ptr + row_m1 * (2 * I) + col_n[None, :]
        tl.store(z_mn, gate_mn.to(z_ptr.dtype.element_ty), mask=mask_mn)
        tl.store(z_mn + I, up_mn.to(z_ptr.dtype.element_ty), mask=mask_mn)
    if WRITE_A:
        a_mn = gate_mn * tl.sigmoid(gate_mn) * up_mn
        tl.store(a_ptr + row_m1 * I + col_n[None, :], a_mn.to(a_ptr.dtype.element_ty), mask=mask_mn)


@grouped_jit
def up_swiglu_kernel(
    x,  # (T, H) contiguous; a tensor descriptor of the rows in expert order when ROWS_TMA
    w,  # (E, 2I, H), or its codes, of any strides; a tensor descriptor of (E, 2, I, H) when TMA
    scales_ptr,  # (E, 2I) or (E, 2I, ceil(H / 64)), any strides; unused for plain weights
    a_ptr,  # (N, I) contiguous, or unused
    z_ptr,  # (N, 2I) contiguous, or unused
    order_ptr,  # (N,) int32
    offsets_ptr,  # (E+1,) int32
    tile_expert_ptr,  # (M,) int32
    tile_row_ptr,  # (M,) int32
    tile_count_ptr,  # (1,) int32
    rows,  # N of a dense expert
    stride_we,
    stride_wi,
    stride_wh,
    stride_se,
    stride_si,
    stride_sg,
    H: tl.constexpr,
    I: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPED: tl.constexpr,
    WRITE_A: tl.constexpr,
    WRITE_Z: tl.constexpr,
    ROWS_TMA: tl.constexpr,
    TMA: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Grid: any number of programs; program p computes tiles p, p + programs, ... of [BM rows, BN of the I
    columns].

    A tile's gate and up columns are one product, so that x is read once and the tensor cores see twice the
    columns; the epilogue takes them apart. Reads 2 (BM + 2 BN) H bytes and writes
    2 BM BN (and twice that for Z) in 16-bit types; quantised weights are 1 or 1/2 byte each. Rows of x are
    gathered in the load, or in order already when ROWS_TMA; what is past the expert's end is not stored.
    """
    N_TILES: tl.constexpr = (I + BN - 1) // BN
    m_tiles = row_tile_count(tile_count_ptr, rows, GROUPED, BM)
    for tile in tl.range(tl.program_id(0), m_tiles * N_TILES, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_coordinates(tile, m_tiles, N_TILES, GROUP_M)
        expert, first, end = expert_rows(m, offsets_ptr, tile_expert_ptr, tile_row_ptr, rows, GROUPED, BM)
        row_m = first + tl.arange(0, BM)
        # The tile's weight rows: BN of the gate half, then the BN of the up half that they multiply.
        half_j, column_j = tl.arange(0, 2 * BN) // BN, n * BN + tl.arange(0, 2 * BN) % BN
        inside_j, row_j = column_j < I, half_j * I + column_j
        k_k = tl.arange(0, BK)
        if not ROWS_TMA:
            source_m = tl.minimum(row_m, end - 1)
            if GROUPED:
                source_m = tl.load(order_ptr + source_m) // SLOTS
            x_mk = x + source_m.to(tl.int64)[:, None] * H + k_k[None, :]
        if KIND:
            codes = w + expert.to(tl.int64) * stride_we
            scales = scales_ptr + expert.to(tl.int64) * stride_se
        elif not TMA:
            w_kj = w + expert.to(tl.int64) * stride_we + row_j.to(tl.int64)[None, :] * stride_wi
            w_kj += k_k.to(tl.int64)[:, None] * stride_wh
        z_mj = tl.zeros((BM, 2 * BN), dtype=tl.float32)
        for k in range(0, H, BK):
            if ROWS_TMA:
                x_tile = x.load([first, k])
            else:
                x_tile = load_tile(x_mk + k, True, (k_k < H - k)[None, :], True, H % BK == 0)
            if KIND:
                w_tile = load_decoded(
                    codes,
                    scales,
                    row_j,
                    inside_j,
                    k,
                    stride_wi,
                    stride_wh,
                    stride_si,
                    stride_sg,
                    a_ptr.dtype.element_ty,
                    H,
                    I % BN == 0,
                    KIND,
                    False,
                    2 * BN,
                    BK,
                ).T
            elif TMA:
                w_tile = w.load([expert, 0, n * BN, k]).reshape(2 * BN, BK).T
            else:
                w_tile = load_tile(w_kj, (k_k < H - k)[:, None], inside_j[None, :], H % BK == 0, I % BN == 0)
                w_kj += BK * stride_wh
            z_mj = tl.dot(x_tile, w_tile, z_mj, input_precision="ieee")
        if KIND == IS_INT8:
            z_mj *= load_row_scales(scales, row_j, inside_j, stride_si)[None, :]
        gate_mn, up_mn = column_halves(z_mj, BM, 2 * BN)
        left_gate, right_gate = column_halves(gate_mn, BM, BN)
        left_up, right_up = column_halves(up_mn, BM, BN)
        store_swiglu(
            left_gate, left_up, row_m, row_m < end, n * BN, a_ptr, z_ptr, I, WRITE_A, WRITE_Z, BN // 2
        )
        store_swiglu(
            right_gate,
            right_up,
            row_m,
            row_m < end,
            n * BN + BN // 2,
            a_ptr,
            z_ptr,
            I,
            WRITE_A,
            WRITE_Z,
            BN // 2,
        )


def up_swiglu(
    x_TH: Tensor, gate_up_E2IH: Weights, groups: Groups, tile: Tile, want_act: bool, want_preact: bool
) -> tuple[Tensor, Tensor]:
    """(A [N, I], Z [N, 2I]) in x's dtype, zero elements where not wanted; rows past the last real one are not
    written.

    Args:
        x_TH: [T, H], contiguous.
        gate_up_E2IH: [E, 2I, H], any strides, gate rows first; plain or quantised.
        groups: which rows belong to which expert.
        tile: block sizes; ``tile.m`` must be ``groups.block_m``.
    """
    _E, two_I, H = gate_up_E2IH.shape
    I = two_I // 2
    tile = suited(tile, gate_up_E2IH, per_column=2)
    act_NI = x_TH.new_empty((groups.rows, I) if want_act else (0,))
    preact_N2I = x_TH.new_empty((groups.rows, two_I) if want_preact else (0,))
    x_desc = described_rows(x_TH, groups, tile)
    for w, rows in pieces(gate_up_E2IH, groups, tile, x_TH.dtype):
        values = stored(w)
        described = descriptor(values.unflatten(1, (2, I)), (1, 2, tile.n, tile.k)) if tile.tma else None
        scales, *scale_strides = scale_arguments(w)
        grouped_launch(up_swiglu_kernel, I, w, rows, tile, described is not None, x_TH.device)(
            (
                *(x_TH if x_desc is None else x_desc, values if described is None else described, scales),
                *(act_NI, preact_N2I, *rows.pointers()),
            ),
            (rows.rows,),
            (*values.stride(), *scale_strides),
            H=H,
            I=I,
            SLOTS=rows.slots,
            WRITE_A=want_act,
            WRITE_Z=want_preact,
            ROWS_TMA=x_desc is not None,
        )
    return act_NI, preact_N2I
