"""Backward of the down-projection and SwiGLU in one grouped product: dA = dO W2, then dZ and dS.

Letters: T tokens, H hidden, E experts, I expert width, N rows in expert order (N = T for a dense expert), M
row tiles, B column tiles. The index arrays are described in :mod:`flex_kernels.triton.common`.

With c the factor of a row's expert in the layer's output (its score, the gate, times 1 - g for mix="convex"):

    dA      = dO W2                              gathered by token, without c
    dS      = <dA, A>                            the gradient of c, so no expert output is ever needed
    dZ_up   = c dA silu(Z_gate)
    dZ_gate = c dA Z_up silu'(Z_gate)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.triton.codes import Weights, load_decoded, pieces, scale_arguments, stored, suited
from flex_kernels.triton.common import (
    column_quarter,
    expert_rows,
    load_tile,
    row_tile_count,
    tile_coordinates,
)
from flex_kernels.triton.groups import Groups
from flex_kernels.triton.launch import described_rows, grouped_jit, grouped_launch
from flex_kernels.triton.tiles import Tile, ceil_div, descriptor


@triton.jit
def swiglu_backward(
    da_mn,
    c_m,
    row_m,
    inside_m,
    first_col,
    z_ptr,
    dz_ptr,
    act_ptr,
    I: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue on BN columns from ``first_col``: stores dZ and c A where wanted, returns their part of
    dS.

    dZ may lie over Z. Where the up half starts at another alignment than the gate half, the compiler stores
    it with other threads than those that loaded it, hence the barrier.
    """
    col_n = first_col + tl.arange(0, BN)
    mask_mn = inside_m[:, None] & (col_n < I)[None, :]
    z_offset_mn = row_m.to(tl.int64)[:, None] * (2 * I) + col_n[None, :]
    gate_mn = tl.load(z_ptr + z_offset_mn, mask=mask_mn, other=0.0).to(tl.float32)
    up_mn = tl.load(z_ptr + z_offset_mn + I, mask=mask_mn, other=0.0).to(tl.float32)
    if I % 8 != 0:
        tl.debug_barrier()
    sigmoid_mn = tl.sigmoid(gate_mn)
    silu_mn = gate_mn * sigmoid_mn
    ds_m = tl.sum(da_mn * silu_mn * up_mn, axis=1)
    if WRITE_ACT:
        act_mn = c_m[:, None] * silu_mn * up_mn
        act_offset_mn = row_m.to(tl.int64)[:, None] * I + col_n[None, :]
        tl.store(act_ptr + act_offset_mn, act_mn.to(act_ptr.dtype.element_ty), mask=mask_mn)
    if WRITE_DZ:
        da_mn *= c_m[:, None]
        dgate_mn = da_mn * up_mn * (sigmoid_mn + silu_mn * (1.0 - sigmoid_mn))
        tl.store(dz_ptr + z_offset_mn, dgate_mn.to(dz_ptr.dtype.element_ty), mask=mask_mn)
        tl.store(dz_ptr + z_offset_mn + I, (da_mn * silu_mn).to(dz_ptr.dtype.element_ty), mask=mask_mn)
    return ds_m


@grouped_jit
def down_backward_kernel(
    dy,  # (T, H) contiguous; a tensor descriptor of the rows in expert order when ROWS_TMA
    w,  # (E, H, I), or its codes, of any strides; a tensor descriptor when TMA
    scales_ptr,  # (E, H) or (E, H, ceil(I / 64)), any strides; unused for plain weights
    z_ptr,  # (N, 2I) contiguous
    dz_ptr,  # (N, 2I) contiguous, may be z_ptr; or unused
    act_ptr,  # (N, I) contiguous, or unused: c A
    ds_ptr,  # (B, N) float32, or unused: the part of dS from each column tile
    score_ptr,  # (T*K,) float32 by slot, or unused
    damp_ptr,  # (T,) float32, or unused: the gate g of mix="convex"
    order_ptr,  # (N,) int32
    offsets_ptr,  # (E+1,) int32
    tile_expert_ptr,  # (M,) int32
    tile_row_ptr,  # (M,) int32
    tile_count_ptr,  # (1,) int32
    rows,  # N
    stride_we,
    stride_wh,
    stride_wi,
    stride_se,
    stride_sh,
    stride_sg,
    H: tl.constexpr,
    I: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_DAMP: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    WRITE_DS: tl.constexpr,
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

    Reads 2 (BM + BN) H + 4 BM BN bytes (1 or 1/2 a quantised weight) and writes 4 BM BN in 16-bit types, and
    4 BM for dS, whose parts are summed in a fixed order later: no atomics.
    """
    N_TILES: tl.constexpr = (I + BN - 1) // BN
    m_tiles = row_tile_count(tile_count_ptr, rows, GROUPED, BM)
    for tile in tl.range(tl.program_id(0), m_tiles * N_TILES, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_coordinates(tile, m_tiles, N_TILES, GROUP_M)
        expert, first, end = expert_rows(m, offsets_ptr, tile_expert_ptr, tile_row_ptr, rows, GROUPED, BM)
        row_m = first + tl.arange(0, BM)
        slot_m = tl.minimum(row_m, end - 1)
        if GROUPED:
            slot_m = tl.load(order_ptr + slot_m)
        token_m = slot_m // SLOTS
        col_n = n * BN + tl.arange(0, BN)
        k_k = tl.arange(0, BK)
        if not ROWS_TMA:
            dy_mk = dy + token_m.to(tl.int64)[:, None] * H + k_k[None, :]
        if KIND:
            codes = w + expert.to(tl.int64) * stride_we
            scales = scales_ptr + expert.to(tl.int64) * stride_se
        elif not TMA:
            w_kn = w + expert.to(tl.int64) * stride_we + col_n.to(tl.int64)[None, :] * stride_wi
            w_kn += k_k.to(tl.int64)[:, None] * stride_wh
        da_mn = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, H, BK):
            if ROWS_TMA:
                dy_tile = dy.load([first, k])
            else:
                dy_tile = load_tile(dy_mk + k, True, (k_k < H - k)[None, :], True, H % BK == 0)
            if KIND:
                w_tile = load_decoded(
                    codes,
                    scales,
                    k + k_k,
                    k + k_k < H,
                    n * BN,
                    stride_wh,
                    stride_wi,
                    stride_sh,
                    stride_sg,
                    z_ptr.dtype.element_ty,
                    I,
                    H % BK == 0,
                    KIND,
                    True,
                    BK,
                    BN,
                )
            elif TMA:
                w_tile = w.load([expert, k, n * BN]).reshape(BK, BN)
            else:
                w_tile = load_tile(
                    w_kn, (k_k < H - k)[:, None], (col_n < I)[None, :], H % BK == 0, I % BN == 0
                )
                w_kn += BK * stride_wh
            da_mn = tl.dot(dy_tile, w_tile, da_mn, input_precision="ieee")
        c_m = tl.full((BM,), 1.0, dtype=tl.float32)
        if HAS_SCORE:
            c_m = tl.load(score_ptr + slot_m)
        if HAS_DAMP:
            c_m *= 1.0 - tl.load(damp_ptr + token_m)
        ds_m = tl.zeros((BM,), dtype=tl.float32)
        for quarter in tl.static_range(4):
            ds_m += swiglu_backward(
                column_quarter(da_mn, quarter, BM, BN),
                c_m,
                row_m,
                row_m < end,
                n * BN + quarter * (BN // 4),
                z_ptr,
                dz_ptr,
                act_ptr,
                I,
                WRITE_DZ,
                WRITE_ACT,
                BN // 4,
            )
        if WRITE_DS:
            tl.store(ds_ptr + n.to(tl.int64) * rows + row_m, ds_m, mask=row_m < end)


def down_backward(
    dy_TH: Tensor,
    down_EHI: Weights,
    preact_N2I: Tensor,
    groups: Groups,
    tile: Tile,
    score: Tensor | None,
    damp_T: Tensor | None,
    want_preact_grad: bool,
    want_act: bool,
    want_score_grad: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dZ [N, 2I], c A [N, I], parts of dS [B, N] float32); zero elements where not wanted.

    Args:
        dy_TH: [T, H], contiguous: the gradient of the layer's output.
        down_EHI: [E, H, I], any strides; plain or quantised.
        preact_N2I: [N, 2I], contiguous, in x's dtype.
        groups: which rows belong to which expert.
        tile: block sizes; ``tile.m`` must be ``groups.block_m``.
        score: float32, one a slot (T*K routed, T dense); None for 1.
        damp_T: the gate g where the row's part of the output is scaled by 1 - g, else None.
        overwrite: put dZ where Z was; every element is read by the one program that then writes it.
    """
    _E, H, I = down_EHI.shape
    N = groups.rows
    tile = suited(tile, down_EHI)
    dz_N2I = preact_N2I.new_empty(0)
    if want_preact_grad:
        dz_N2I = preact_N2I if overwrite else torch.empty_like(preact_N2I)
    act_NI = preact_N2I.new_empty((N, I) if want_act else (0,))
    ds_BN = torch.empty(
        (ceil_div(I, tile.n), N) if want_score_grad else (0,), dtype=torch.float32, device=dy_TH.device
    )
    dy_desc = described_rows(dy_TH, groups, tile)
    for w, rows in pieces(down_EHI, groups, tile, dy_TH.dtype):
        values = stored(w)
        w_desc = descriptor(values, (1, tile.k, tile.n)) if tile.tma else None
        scales, *scale_strides = scale_arguments(w)
        grouped_launch(down_backward_kernel, I, w, rows, tile, w_desc is not None, dy_TH.device)(
            (
                *(dy_TH if dy_desc is None else dy_desc, values if w_desc is None else w_desc),
                *(scales, preact_N2I),
                *(dz_N2I, act_NI, ds_BN, score, damp_T, *rows.pointers()),
            ),
            (rows.rows,),
            (*values.stride(), *scale_strides),
            H=H,
            I=I,
            SLOTS=rows.slots,
            HAS_SCORE=score is not None,
            HAS_DAMP=damp_T is not None,
            WRITE_DZ=want_preact_grad,
            WRITE_ACT=want_act,
            WRITE_DS=want_score_grad,
            ROWS_TMA=dy_desc is not None,
        )
    return dz_N2I, act_NI, ds_BN
