"""Gradients of routed expert weights, for the uncommon case that they train: dW[e] = p^T q over e's rows.

Letters: E experts, N rows in expert order, P and Q the two sizes of one expert's matrix.
The index arrays are described in :mod:`flex_kernels.triton.common`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.triton.common import load_tile
from flex_kernels.triton.direct import launch
from flex_kernels.triton.groups import Groups
from flex_kernels.triton.tiles import ceil_div


@triton.jit
def weight_grad_kernel(
    p_ptr,  # (N, P), or (T, P) when GATHER_P; contiguous
    q_ptr,  # (N, Q), or (T, Q) when GATHER_Q; contiguous
    dw_ptr,  # (E, P, Q) contiguous
    order_ptr,  # (N,) int32
    offsets_ptr,  # (E+1,) int32
    P: tl.constexpr,
    Q: tl.constexpr,
    SLOTS: tl.constexpr,
    GATHER_P: tl.constexpr,
    GATHER_Q: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """Grid: (ceil(P / BP) * ceil(Q / BQ), E); a program owns one [BP, BQ] tile and runs over its expert's
    rows.

    An expert without rows gets zeros. One program a tile and a fixed order of rows: no atomics.
    """
    expert = tl.program_id(1)
    q_tiles: tl.constexpr = (Q + BQ - 1) // BQ
    p_p = tl.program_id(0) // q_tiles * BP + tl.arange(0, BP)
    q_q = tl.program_id(0) % q_tiles * BQ + tl.arange(0, BQ)
    first = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    dw_pq = tl.zeros((BP, BQ), dtype=tl.float32)
    for start in tl.range(first, end, BR):
        row_r = start + tl.arange(0, BR)
        inside_r = row_r < end
        token_r = tl.load(order_ptr + row_r, mask=inside_r, other=0) // SLOTS
        p_row_r = (token_r if GATHER_P else row_r).to(tl.int64)
        q_row_r = (token_r if GATHER_Q else row_r).to(tl.int64)
        p_pr = load_tile(
            p_ptr + p_row_r[None, :] * P + p_p[:, None],
            (p_p < P)[:, None],
            inside_r[None, :],
            P % BP == 0,
            False,
        )
        q_rq = load_tile(
            q_ptr + q_row_r[:, None] * Q + q_q[None, :],
            inside_r[:, None],
            (q_q < Q)[None, :],
            False,
            Q % BQ == 0,
        )
        dw_pq = tl.dot(p_pr, q_rq, dw_pq, input_precision="ieee")
    offset_pq = expert.to(tl.int64) * P * Q + p_p.to(tl.int64)[:, None] * Q + q_q[None, :]
    tl.store(
        dw_ptr + offset_pq, dw_pq.to(dw_ptr.dtype.element_ty), mask=(p_p < P)[:, None] & (q_q < Q)[None, :]
    )


def weight_grad(p: Tensor, gather_p: bool, q: Tensor, gather_q: bool, groups: Groups) -> Tensor:
    """[E, P, Q] in p's dtype: p^T q over the rows of each routed expert.

    Args:
        p, q: [N, P] and [N, Q] in expert order, or [T, .] by token where gathered; contiguous.
        groups: the routed rows.
    """
    if groups.offsets_E1 is None:
        raise ValueError("weight_grad sums over routed rows; a dense expert's gradient is one plain product")
    P, Q, E = p.shape[1], q.shape[1], groups.offsets_E1.numel() - 1
    dw_EPQ = p.new_empty(E, P, Q)
    # float32 runs on the plain cores and wants small tiles; so does the interpreter, whose matrices are
    # small.
    block, rows = (64, 32) if p.element_size() == 2 and p.device.type != "cpu" else (32, 16)
    launch(
        weight_grad_kernel,
        p.device,
        (ceil_div(P, block) * ceil_div(Q, block), E),
        (p, q, dw_EPQ, groups.order_N, groups.offsets_E1),
        (),
        (),
        P=P,
        Q=Q,
        SLOTS=groups.slots,
        GATHER_P=gather_p,
        GATHER_Q=gather_q,
        BP=block,
        BQ=block,
        BR=rows,
        num_warps=4,
        num_stages=3,
    )
    return dw_EPQ
