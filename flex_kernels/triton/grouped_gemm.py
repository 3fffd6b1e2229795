"""Grouped product C = A W^T or A W over each expert's rows: the down-projection, and its mirror in backward.

Letters: E experts, N rows in expert order, R reduced columns, C output columns, M row tiles.
The index arrays are described in :mod:`flex_kernels.triton.common`.

    down-projection     Y [N, H]  = A [N, I] W2^T      W2 as stored is [E, C, R]: "out by in"
    gradient of x rows  dX [N, H] = dZ [N, 2I] W1      W1 as stored is [E, R, C]: "in by out"
"""

from __future__ import annotations

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
from flex_kernels.triton.common import expert_rows, load_tile, row_tile_count, tile_coordinates
from flex_kernels.triton.groups import Groups
from flex_kernels.triton.launch import grouped_jit, grouped_launch
from flex_kernels.triton.tiles import Tile, descriptor


@grouped_jit
def grouped_gemm_kernel(
    a,  # (N, R) contiguous; a tensor descriptor when TMA
    w,  # (E, C, R) when OUT_FIRST, else (E, R, C), or its codes, any strides; a tensor descriptor when TMA
    scales_ptr,  # one a row of w, or one for 64 of its columns, any strides; unused for plain weights
    c_ptr,  # (N, C) contiguous
    order_ptr,  # (N,) int32, unused: rows are in expert order already
    offsets_ptr,  # (E+1,) int32
    tile_expert_ptr,  # (M,) int32
    tile_row_ptr,  # (M,) int32
    tile_count_ptr,  # (1,) int32
    rows,  # N of a dense expert
    stride_we,
    stride_wr,
    stride_wc,
    stride_se,
    stride_sr,
    stride_sg,
    R: tl.constexpr,
    C: tl.constexpr,
    OUT_FIRST: tl.constexpr,
    GROUPED: tl.constexpr,
    TMA: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Grid: any number of programs; program p computes tiles p, p + programs, ... of [BM rows, BN of the C
    columns].

    Reads 2 (BM + BN) R bytes, 1 or 1/2 a quantised weight, and writes 2 BM BN in 16-bit types.
    Through descriptors a tile may read rows of the next expert; they are not stored.
    """
    N_TILES: tl.constexpr = (C + BN - 1) // BN
    m_tiles = row_tile_count(tile_count_ptr, rows, GROUPED, BM)
    for tile in tl.range(tl.program_id(0), m_tiles * N_TILES, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_coordinates(tile, m_tiles, N_TILES, GROUP_M)
        expert, first, end = expert_rows(m, offsets_ptr, tile_expert_ptr, tile_row_ptr, rows, GROUPED, BM)
        row_m = first + tl.arange(0, BM)
        col_n = n * BN + tl.arange(0, BN)
        k_k = tl.arange(0, BK)
        if not TMA:
            a_mk = a + tl.minimum(row_m, end - 1).to(tl.int64)[:, None] * R + k_k[None, :]
        if KIND:
            codes = w + expert.to(tl.int64) * stride_we
            scales = scales_ptr + expert.to(tl.int64) * stride_se
        elif not TMA:
            w_kn = w + expert.to(tl.int64) * stride_we + col_n.to(tl.int64)[None, :] * stride_wc
            w_kn += k_k.to(tl.int64)[:, None] * stride_wr
        c_mn = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, R, BK):
            if TMA:
                a_tile = a.load([first, k])
                if OUT_FIRST:
                    w_tile = w.load([expert, n * BN, k]).reshape(BN, BK).T
                else:
                    w_tile = w.load([expert, k, n * BN]).reshape(BK, BN)
            else:
                a_tile = load_tile(a_mk + k, True, (k_k < R - k)[None, :], True, R % BK == 0)
                if not KIND:
                    w_tile = load_tile(
                        w_kn, (k_k < R - k)[:, None], (col_n < C)[None, :], R % BK == 0, C % BN == 0
                    )
                    w_kn += BK * stride_wr
                elif OUT_FIRST:
                    w_tile = load_decoded(
                        codes,
                        scales,
                        col_n,
                        col_n < C,
                        k,
                        stride_wc,
                        stride_wr,
                        stride_sr,
                        stride_sg,
                        c_ptr.dtype.element_ty,
                        R,
                        C % BN == 0,
                        KIND,
                        False,
                        BN,
                        BK,
                    ).T
                else:
                    w_tile = load_decoded(
                        codes,
                        scales,
                        k + k_k,
                        k + k_k < R,
                        n * BN,
                        stride_wr,
                        stride_wc,
                        stride_sr,
                        stride_sg,
                        c_ptr.dtype.element_ty,
                        C,
                        R % BK == 0,
                        KIND,
                        True,
                        BK,
                        BN,
                    )
            c_mn = tl.dot(a_tile, w_tile, c_mn, input_precision="ieee")
        if KIND == IS_INT8 and OUT_FIRST:
            c_mn *= load_row_scales(scales, col_n, col_n < C, stride_sr)[None, :]
        mask_mn = (row_m < end)[:, None] & (col_n < C)[None, :]
        tl.store(
            c_ptr + row_m.to(tl.int64)[:, None] * C + col_n[None, :],
            c_mn.to(c_ptr.dtype.element_ty),
            mask=mask_mn,
        )


def grouped_gemm(a_NR: Tensor, w: Weights, out_first: bool, groups: Groups, tile: Tile) -> Tensor:
    """[N, C] in a's dtype: each row times its expert's matrix; rows past the last real one are not written.

    Args:
        a_NR: [N, R], contiguous, rows in expert order.
        w: [E, C, R] when ``out_first``, else [E, R, C]; any strides, plain or quantised.
        groups: which rows belong to which expert.
        tile: block sizes; ``tile.m`` must be ``groups.block_m``.
    """
    R = a_NR.shape[1]
    tile = suited(tile, w)
    C = w.shape[1] if out_first else w.shape[2]
    c_NC = a_NR.new_empty(groups.rows, C)
    for piece, rows in pieces(w, groups, tile, a_NR.dtype):
        values = stored(piece)
        stride_we, stride_w1, stride_w2 = values.stride()
        block = (1, tile.n, tile.k) if out_first else (1, tile.k, tile.n)
        a_desc = descriptor(a_NR, (tile.m, tile.k)) if tile.tma else None
        w_desc = descriptor(values, block) if tile.tma else None
        tma = a_desc is not None and w_desc is not None
        scales, *scale_strides = scale_arguments(piece)
        grouped_launch(grouped_gemm_kernel, C, piece, rows, tile, tma, a_NR.device)(
            (a_desc if tma else a_NR, w_desc if tma else values, scales, c_NC, *rows.pointers()),
            (rows.rows,),
            (
                stride_we,
                stride_w2 if out_first else stride_w1,
                stride_w1 if out_first else stride_w2,
                *scale_strides,
            ),
            R=R,
            C=C,
            OUT_FIRST=out_first,
        )
    return c_NC
