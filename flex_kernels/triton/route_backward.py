"""Gradients of the router and the gates in one pass over x: the mirror of :mod:`flex_kernels.triton.route`.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates (at most 2), P programs.

The logits are computed again from x, since keeping them would cost 4 E bytes a token. With p their softmax
(or sigmoid), s_k the chosen entries of p, and dw_k the gradient of w_k = scale s_k (/ sum_j s_j):

    ds_k       = scale dw_k
                 (scale dw_k - sum_j scale dw_j s_j / S) / S,  S = sum_j s_j + 1e-20       normalised
    dlogit_e   = sum_k [e = id_k] ds_k s_k - p_e sum_k ds_k s_k                 softmax
    dlogit_e   = sum_k [e = id_k] ds_k s_k (1 - s_k)                            sigmoid
    dx         = dlogits Wr + dz w_g (+ the rest of dx),  dz = dg g (1 - g)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels import routing
from flex_kernels.triton.direct import launch
from flex_kernels.triton.route import block_hidden
from flex_kernels.triton.tiles import ceil_div, next_power_of_2


@triton.jit
def gate_part(x_th, dz_t, part_ptr, h_h, inside_h):
    """Stores this program's part of one gate's gradient, sum_t dz_t x_t, on the columns of ``x_th``."""
    tl.store(part_ptr + h_h, tl.sum(x_th.to(tl.float32) * dz_t[:, None], axis=0), mask=inside_h)


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    x_ptr,  # (T, H) contiguous
    weight_ptr,  # (E, H), any strides
    gate_weight_ptr,  # (G, H) float32 contiguous
    ids_ptr,  # (T, K) int32
    grad_weights_ptr,  # (T, K) float32
    grad_gates_ptr,  # (G, T) float32
    grad_logits_ptr,  # (T, E) float32, or unused
    gates_ptr,  # (G, T) float32
    other_dx_ptr,  # (T, H) to be added to dx, or unused
    dx_ptr,  # (T, H), or unused
    dlogits_ptr,  # (T, E) float32, or unused
    dz_ptr,  # (G, T) float32, or unused
    gate_parts_ptr,  # (P, G, H) float32, or unused
    T,
    stride_we,
    stride_wh,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_GRAD_LOGITS: tl.constexpr,
    HAS_OTHER_DX: tl.constexpr,
    WRITE_DX: tl.constexpr,
    WRITE_DLOGITS: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    WRITE_PARTS: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: P = ceil(T / BT); a program owns BT tokens and all experts.

    Reads 2 H bytes a token of 16-bit x and the router's rows from L2, writes as much for dx; where another
    part of dx comes from elsewhere, that is read and added before the one rounding. In 16 bits, dlogits enter
    dx as a sum of two 16-bit parts, the second what the first rounded away.
    """
    program = tl.program_id(0)
    t_t = program * BT + tl.arange(0, BT)
    inside_t = t_t < T
    t_t = t_t.to(tl.int64)
    e_e = tl.arange(0, BE)
    h_h = tl.arange(0, BK)
    dz0_t = tl.zeros((BT,), dtype=tl.float32)
    dz1_t = tl.zeros((BT,), dtype=tl.float32)
    if G > 0:
        g_t = tl.load(gates_ptr + t_t, mask=inside_t, other=0.0)
        dz0_t = tl.load(grad_gates_ptr + t_t, mask=inside_t, other=0.0) * g_t * (1.0 - g_t)
        if WRITE_DZ:
            tl.store(dz_ptr + t_t, dz0_t, mask=inside_t)
    if G > 1:
        second_t = T.to(tl.int64) + t_t
        g_t = tl.load(gates_ptr + second_t, mask=inside_t, other=0.0)
        dz1_t = tl.load(grad_gates_ptr + second_t, mask=inside_t, other=0.0) * g_t * (1.0 - g_t)
        if WRITE_DZ:
            tl.store(dz_ptr + second_t, dz1_t, mask=inside_t)
    parts_ptr = gate_parts_ptr + program.to(tl.int64) * (G * H)
    weight_e = weight_ptr + e_e.to(tl.int64) * stride_we
    dlogit_te = tl.zeros((BT, BE), dtype=tl.float32)
    if E > 0 or WRITE_PARTS:
        logit_te = tl.zeros((BT, BE), dtype=tl.float32)
        for h in range(0, H, BK):
            inside_h = h_h < H - h
            x_th = tl.load(
                x_ptr + t_t[:, None] * H + h + h_h[None, :],
                mask=inside_t[:, None] & inside_h[None, :],
                other=0.0,
            )
            if E > 0:
                w_he = tl.load(
                    weight_e[None, :] + (h + h_h).to(tl.int64)[:, None] * stride_wh,
                    mask=inside_h[:, None] & (e_e < E)[None, :],
                    other=0.0,
                )
                if x_th.dtype == w_he.dtype:
                    logit_te = tl.dot(x_th, w_he, logit_te, input_precision="ieee")
                else:
                    logit_te = tl.dot(
                        x_th.to(tl.float32), w_he.to(tl.float32), logit_te, input_precision="ieee"
                    )
            if WRITE_PARTS:
                gate_part(x_th, dz0_t, parts_ptr, h + h_h, inside_h)
                if G > 1:
                    gate_part(x_th, dz1_t, parts_ptr + H, h + h_h, inside_h)
        if E > 0:
            if SOFTMAX:
                shifted_te = tl.where((e_e < E)[None, :], logit_te, float("-inf"))
                exp_te = tl.exp(shifted_te - tl.max(shifted_te, axis=1)[:, None])
                p_te = exp_te / tl.sum(exp_te, axis=1)[:, None]
            else:
                p_te = tl.sigmoid(logit_te)
            chosen_t = tl.zeros((BT,), dtype=tl.float32)
            weighted_t = tl.zeros((BT,), dtype=tl.float32)
            if NORMALIZE:
                for k in range(K):
                    id_t = tl.load(ids_ptr + t_t * K + k, mask=inside_t, other=0)
                    dw_t = scale * tl.load(grad_weights_ptr + t_t * K + k, mask=inside_t, other=0.0)
                    s_t = tl.sum(tl.where(e_e[None, :] == id_t[:, None], p_te, 0.0), axis=1)
                    chosen_t += s_t
                    weighted_t += dw_t * s_t
                chosen_t += 1e-20
                weighted_t /= chosen_t
            inner_t = tl.zeros((BT,), dtype=tl.float32)
            for k in range(K):
                id_t = tl.load(ids_ptr + t_t * K + k, mask=inside_t, other=0)
                ds_t = scale * tl.load(grad_weights_ptr + t_t * K + k, mask=inside_t, other=0.0)
                taken_te = e_e[None, :] == id_t[:, None]
                s_t = tl.sum(tl.where(taken_te, p_te, 0.0), axis=1)
                if NORMALIZE:
                    ds_t = (ds_t - weighted_t) / chosen_t
                ds_t *= s_t
                if not SOFTMAX:
                    ds_t *= 1.0 - s_t
                inner_t += ds_t
                dlogit_te += tl.where(taken_te, ds_t[:, None], 0.0)
            if SOFTMAX:
                dlogit_te -= inner_t[:, None] * p_te
            te = t_t[:, None] * E + e_e[None, :]
            inside_te = inside_t[:, None] & (e_e < E)[None, :]
            if HAS_GRAD_LOGITS:
                dlogit_te += tl.load(grad_logits_ptr + te, mask=inside_te, other=0.0)
            if WRITE_DLOGITS:
                tl.store(dlogits_ptr + te, dlogit_te, mask=inside_te)
    if WRITE_DX:
        for h in range(0, H, BK):
            inside_h = h_h < H - h
            dx_th = tl.zeros((BT, BK), dtype=tl.float32)
            if E > 0:
                w_eh = tl.load(
                    weight_e[:, None] + (h + h_h).to(tl.int64)[None, :] * stride_wh,
                    mask=(e_e < E)[:, None] & inside_h[None, :],
                    other=0.0,
                )
                if w_eh.dtype == x_ptr.dtype.element_ty and w_eh.dtype != tl.float32:
                    high_te = dlogit_te.to(w_eh.dtype)
                    low_te = (dlogit_te - high_te.to(tl.float32)).to(w_eh.dtype)
                    dx_th = tl.dot(high_te, w_eh, dx_th)
                    dx_th = tl.dot(low_te, w_eh, dx_th)
                else:
                    dx_th = tl.dot(dlogit_te, w_eh.to(tl.float32), dx_th, input_precision="ieee")
            if G > 0:
                g_h = tl.load(gate_weight_ptr + h + h_h, mask=inside_h, other=0.0)
                dx_th += dz0_t[:, None] * g_h[None, :]
            if G > 1:
                g_h = tl.load(gate_weight_ptr + H + h + h_h, mask=inside_h, other=0.0)
                dx_th += dz1_t[:, None] * g_h[None, :]
            inside_th = inside_t[:, None] & inside_h[None, :]
            th = t_t[:, None] * H + h + h_h[None, :]
            if HAS_OTHER_DX:
                dx_th += tl.load(other_dx_ptr + th, mask=inside_th, other=0.0).to(tl.float32)
            tl.store(dx_ptr + th, dx_th.to(dx_ptr.dtype.element_ty), mask=inside_th)


def route_backward(
    grad_weights_TK: Tensor,
    grad_gates_GT: Tensor,
    grad_logits_TE: Tensor,
    x_TH: Tensor,
    weight_EH: Tensor,
    gate_weight_GH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gates_GT: Tensor,
    normalize: bool,
    score: str,
    scale: float,
    needs: list[bool],
    other_grad_x_TH: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`flex_kernels.routing.route_backward`, in one launch where only x and the gates train."""
    (T, H), E, G = x_TH.shape, weight_EH.shape[0], gate_weight_GH.shape[0]
    need_x, need_weight, need_gate_weight, need_gate_bias = needs
    if not T or not (E or G):
        return routing.route_backward(
            *(grad_weights_TK, grad_gates_GT, grad_logits_TE, x_TH, weight_EH, gate_weight_GH, ids_TK),
            *(weights_TK, gates_GT, normalize, score, scale, needs, other_grad_x_TH),
        )
    f32, device = torch.float32, x_TH.device
    block_e = max(16, next_power_of_2(max(E, 1)))
    # float32 products, and all that take part in them, stay on the plain cores, where large tiles spill.
    plain = x_TH.element_size() == 4 or weight_EH.dtype != x_TH.dtype
    # Few tokens need many small programs to fill the chip; many need large ones, which read Wr less often.
    # Not 64 rows, where sm_90 would multiply dlogits from registers by wgmma: ptxas 12.8 and 12.9, which come
    # with Triton, may reuse such registers too early (triton-lang/triton#11781).
    block_t = 32 if T >= 4096 and block_e <= 128 and not plain else 16
    programs = ceil_div(T, block_t)
    want_dz, want_parts = need_gate_bias and G > 0, need_gate_weight and G > 0
    dx_TH = torch.empty_like(x_TH) if need_x else x_TH.new_empty(0)
    dlogits_TE = torch.empty(T if need_weight else 0, E, dtype=f32, device=device)
    dz_GT = torch.empty(G, T if want_dz else 0, dtype=f32, device=device)
    parts_PGH = torch.empty(programs if want_parts else 0, G, H, dtype=f32, device=device)
    with torch.cuda.device_of(x_TH):
        launch(
            route_backward_kernel,
            x_TH.device,
            (programs, 1),
            (
                *(x_TH, weight_EH, gate_weight_GH.contiguous(), ids_TK),
                *(grad_weights_TK, grad_gates_GT, grad_logits_TE, gates_GT),
                *(other_grad_x_TH, dx_TH, dlogits_TE, dz_GT, parts_PGH),
            ),
            (T,),
            (*weight_EH.stride(), float(scale)),
            H=H,
            E=E,
            K=ids_TK.shape[1],
            G=G,
            NORMALIZE=normalize,
            SOFTMAX=score == "softmax",
            HAS_GRAD_LOGITS=grad_logits_TE.numel() > 0,
            HAS_OTHER_DX=need_x and other_grad_x_TH is not None,
            WRITE_DX=need_x,
            WRITE_DLOGITS=need_weight,
            WRITE_DZ=want_dz,
            WRITE_PARTS=want_parts,
            BT=block_t,
            BE=block_e,
            BK=block_hidden(block_e, plain),
            num_warps=4 if block_e < 128 and not plain else 8,
        )
    empty = x_TH.new_empty
    return (
        dx_TH,
        routing.weight_gradient(dlogits_TE, x_TH).to(weight_EH.dtype) if need_weight else empty(0),
        parts_PGH.sum(0) if need_gate_weight else empty(0),
        dz_GT.sum(1) if need_gate_bias else empty(0),
    )
