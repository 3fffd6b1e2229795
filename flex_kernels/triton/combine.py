"""The last pass: the weighted sum of a token's expert rows, the shared expert and the personal expert.

Letters: T tokens, H hidden, K chosen, N = T*K rows in expert order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.triton.direct import launch
from flex_kernels.triton.tiles import ceil_div, next_power_of_2


@triton.jit(do_not_specialize_on_alignment=["gate_ptr", "shared_gate_ptr"])
def combine_kernel(
    y_ptr,  # (N, H) contiguous, rows in expert order
    inverse_ptr,  # (T, K) int32: row of each slot, -1 where skipped
    weight_ptr,  # (T, K) float32, or unused: 1
    shared_ptr,  # (T, H), or unused
    shared_gate_ptr,  # (T,) float32, or unused: 1
    personal_ptr,  # (T, H), or unused
    gate_ptr,  # (T,) float32, or unused: 1
    out_ptr,  # (T, H)
    H: tl.constexpr,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_SHARED_GATE: tl.constexpr,
    HAS_PERSONAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CONVEX: tl.constexpr,
    BH: tl.constexpr,
):
    """Grid: (T, ceil(H / BH)); a program owns BH columns of one token.

    Reads K + 2 rows and writes one. The sum runs in float32 over k = 0 .. K-1, then shared, then personal:
    the same order every time, so the result is bitwise reproducible.
    """
    t = tl.program_id(0).to(tl.int64)
    h_h = tl.program_id(1) * BH + tl.arange(0, BH)
    inside_h = h_h < H
    sum_h = tl.zeros((BH,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse_ptr + t * K + k).to(tl.int64)
        y_h = tl.load(y_ptr + row * H + h_h, mask=inside_h & (row >= 0), other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            y_h *= tl.load(weight_ptr + t * K + k)
        sum_h += y_h
    if HAS_SHARED:
        shared_h = tl.load(shared_ptr + t * H + h_h, mask=inside_h, other=0.0).to(tl.float32)
        if HAS_SHARED_GATE:
            shared_h *= tl.load(shared_gate_ptr + t)
        sum_h += shared_h
    if HAS_PERSONAL:
        personal_h = tl.load(personal_ptr + t * H + h_h, mask=inside_h, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + t)
            personal_h *= gate
            if CONVEX:
                sum_h *= 1.0 - gate
        sum_h += personal_h
    tl.store(out_ptr + t * H + h_h, sum_h.to(out_ptr.dtype.element_ty), mask=inside_h)


def combine(
    y_NH: Tensor,
    inverse_TK: Tensor,
    weights_TK: Tensor | None,
    personal_TH: Tensor | None,
    gate_T: Tensor | None,
    shared_TH: Tensor | None,
    shared_gate_T: Tensor | None,
    mix: str,
) -> Tensor:
    """y [T, H] in y_NH's dtype: (1 or 1 - g) (sum_k w_k y_k + shared_gate * shared) + g * personal.

    A factor that is None is 1; a part that is None is absent. With all factors None this is the sum that
    turns gradients of rows into gradients of tokens.

    Args:
        y_NH: [N, H], contiguous, rows in expert order; rows that no slot points to are not read.
        inverse_TK: [T, K] int32, the row of each slot, -1 for none.
        weights_TK: [T, K] float32, contiguous.
        personal_TH, shared_TH: [T, H], contiguous.
        gate_T, shared_gate_T: [T] float32, contiguous.
        mix: "add" or "convex".
    """
    (T, K), H = inverse_TK.shape, y_NH.shape[1]
    out_TH = y_NH.new_empty(T, H)
    block = min(next_power_of_2(H), 2048)
    launch(
        combine_kernel,
        y_NH.device,
        (T, ceil_div(H, block)),
        (y_NH, inverse_TK, weights_TK, shared_TH, shared_gate_T, personal_TH, gate_T, out_TH),
        (),
        (),
        H=H,
        K=K,
        HAS_WEIGHT=weights_TK is not None,
        HAS_SHARED=shared_TH is not None,
        HAS_SHARED_GATE=shared_gate_T is not None,
        HAS_PERSONAL=personal_TH is not None,
        HAS_GATE=gate_T is not None,
        CONVEX=mix == "convex",
        BH=block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out_TH
