"""Gradients of the router's weights and of the gates, from the parts that down_backward left.

Letters: T tokens, K chosen, N = T*K rows in expert order, B column tiles whose parts add up to dS.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.triton.direct import launch
from flex_kernels.triton.tiles import ceil_div


# The gates may be rows of one matrix: where they start moves with T and is not looked at.
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["gate_ptr", "shared_gate_ptr"])
def score_grads_kernel(
    routed_ptr,  # (B, N) float32, or unused
    inverse_ptr,  # (T, K) int32
    weight_ptr,  # (T, K) float32
    personal_ptr,  # (Bp, T) float32, or unused
    gate_ptr,  # (T,) float32, or unused
    shared_ptr,  # (Bs, T) float32, or unused
    shared_gate_ptr,  # (T,) float32, or unused: 1
    dweight_ptr,  # (T, K) float32, or unused
    dgate_ptr,  # (T,) float32, or unused
    dshared_gate_ptr,  # (T,) float32, or unused
    T,
    K: tl.constexpr,
    B: tl.constexpr,
    BP: tl.constexpr,
    BS: tl.constexpr,
    HAS_SHARED_GATE: tl.constexpr,
    CONVEX: tl.constexpr,
    WRITE_WEIGHT: tl.constexpr,
    WRITE_GATE: tl.constexpr,
    WRITE_SHARED_GATE: tl.constexpr,
    BT: tl.constexpr,
):
    """Grid: ceil(T / BT); a program owns BT tokens. B, BP or BS = 0 says that a part is absent.

    With D = 1 - g for mix="convex", else 1:  dw_k = D dS_k,  dg_s = D dS_s,
    dg = dS_p (- sum_k w_k dS_k - g_s dS_s for "convex").
    """
    t_t = tl.program_id(0) * BT + tl.arange(0, BT)
    inside_t = t_t < T
    t_t = t_t.to(tl.int64)
    damp_t = tl.full((BT,), 1.0, dtype=tl.float32)
    if CONVEX:
        damp_t -= tl.load(gate_ptr + t_t, mask=inside_t, other=0.0)
    rest_t = tl.zeros((BT,), dtype=tl.float32)
    if B > 0:
        N = T.to(tl.int64) * K
        for k in range(K):
            row_t = tl.load(inverse_ptr + t_t * K + k, mask=inside_t, other=-1).to(tl.int64)
            ds_t = tl.zeros((BT,), dtype=tl.float32)
            for b in range(B):
                ds_t += tl.load(routed_ptr + b * N + row_t, mask=row_t >= 0, other=0.0)
            if WRITE_WEIGHT:
                tl.store(dweight_ptr + t_t * K + k, damp_t * ds_t, mask=inside_t)
            rest_t += ds_t * tl.load(weight_ptr + t_t * K + k, mask=inside_t, other=0.0)
    if BS > 0:
        ds_t = tl.zeros((BT,), dtype=tl.float32)
        for b in range(BS):
            ds_t += tl.load(shared_ptr + b * T.to(tl.int64) + t_t, mask=inside_t, other=0.0)
        if WRITE_SHARED_GATE:
            tl.store(dshared_gate_ptr + t_t, damp_t * ds_t, mask=inside_t)
        if HAS_SHARED_GATE:
            ds_t *= tl.load(shared_gate_ptr + t_t, mask=inside_t, other=0.0)
        rest_t += ds_t
    if WRITE_GATE:
        dg_t = tl.zeros((BT,), dtype=tl.float32)
        # The compiler reads a loop that never runs, too.
        if BP > 0:
            for b in range(BP):
                dg_t += tl.load(personal_ptr + b * T.to(tl.int64) + t_t, mask=inside_t, other=0.0)
        if CONVEX:
            dg_t -= rest_t
        tl.store(dgate_ptr + t_t, dg_t, mask=inside_t)


def score_grads(
    routed_BN: Tensor | None,
    inverse_TK: Tensor | None,
    weights_TK: Tensor,
    personal_BT: Tensor | None,
    gate_T: Tensor | None,
    shared_BT: Tensor | None,
    shared_gate_T: Tensor | None,
    mix: str,
    need_weights: bool,
    need_gate: bool,
    need_shared_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (weights [T, K], gate [T], shared gate [T]), float32; zero elements where not needed.

    Args:
        routed_BN, personal_BT, shared_BT: float32 parts of dS = <dO, expert output>; None where no gradient
            asks for them. ``need_weights`` asks for routed, ``need_gate`` for personal (and for all three
            when convex), ``need_shared_gate`` for shared.
        inverse_TK: [T, K] int32, the row of each slot, -1 for none.
        weights_TK, gate_T, shared_gate_T: float32, contiguous.
    """
    T, K = weights_TK.shape
    dweights_TK = weights_TK.new_empty((T, K) if need_weights else (0,))
    dgate_T = weights_TK.new_empty(T if need_gate else 0)
    dshared_gate_T = weights_TK.new_empty(T if need_shared_gate else 0)
    if not (need_weights or need_gate or need_shared_gate):
        return dweights_TK, dgate_T, dshared_gate_T
    block = 64
    launch(
        score_grads_kernel,
        weights_TK.device,
        (ceil_div(T, block), 1),
        (
            *(routed_BN, inverse_TK, weights_TK, personal_BT, gate_T, shared_BT, shared_gate_T),
            *(dweights_TK, dgate_T, dshared_gate_T),
        ),
        (T,),
        (),
        K=K,
        B=0 if routed_BN is None else routed_BN.shape[0],
        BP=0 if personal_BT is None else personal_BT.shape[0],
        BS=0 if shared_BT is None else shared_BT.shape[0],
        HAS_SHARED_GATE=shared_gate_T is not None,
        CONVEX=mix == "convex" and gate_T is not None,
        WRITE_WEIGHT=need_weights,
        WRITE_GATE=need_gate,
        WRITE_SHARED_GATE=need_shared_gate,
        BT=block,
        num_warps=2,
    )
    return dweights_TK, dgate_T, dshared_gate_T
