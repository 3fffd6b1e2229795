"""Router and gates in one pass over x: scores, top-k, weights, and the sigmoid gates.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates (at most 2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.triton.direct import launch
from flex_kernels.triton.tiles import ceil_div, next_power_of_2

# No score counts as less than this, so that an expert that was taken (-inf) is never chosen again.
LOWEST = tl.constexpr(-3.0e38)
# Tokens a program: the least that a tensor core takes, since small programs are what fills the chip at small
# T.
BLOCK_T = 16


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    x_ptr,  # (T, H) contiguous
    weight_ptr,  # (E, H), any strides
    bias_ptr,  # (E,), or unused
    gate_weight_ptr,  # (G, H) float32 contiguous
    gate_bias_ptr,  # (G,) float32
    ids_ptr,  # (T, K) int32
    weights_ptr,  # (T, K) float32
    gates_ptr,  # (G, T) float32
    logits_ptr,  # (T, E) float32, or unused
    T,
    stride_we,
    stride_wh,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    G: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WRITE_LOGITS: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: ceil(T / BT); a program owns BT tokens and all experts, and reads its rows of x once.

    Products accumulate in float32; operands of different types, and float32 ones, are multiplied in full
    float32. Ties go to the lowest index. A NaN score ranks above every number, as in torch.sort, and so shows
    in the weights.
    """
    t_t = tl.program_id(0) * BT + tl.arange(0, BT)
    inside_t = t_t < T
    t_t = t_t.to(tl.int64)
    e_e = tl.arange(0, BE)
    h_h = tl.arange(0, BK)
    logit_te = tl.zeros((BT, BE), dtype=tl.float32)
    gate0_t = tl.zeros((BT,), dtype=tl.float32)
    gate1_t = tl.zeros((BT,), dtype=tl.float32)
    for h in range(0, H, BK):
        inside_h = h_h < H - h
        x_th = tl.load(
            x_ptr + t_t[:, None] * H + h + h_h[None, :], mask=inside_t[:, None] & inside_h[None, :], other=0.0
        )
        if E > 0:
            w_he = tl.load(
                weight_ptr
                + e_e.to(tl.int64)[None, :] * stride_we
                + (h + h_h).to(tl.int64)[:, None] * stride_wh,
                mask=inside_h[:, None] & (e_e < E)[None, :],
                other=0.0,
            )
            if x_th.dtype == w_he.dtype:
                logit_te = tl.dot(x_th, w_he, logit_te, input_precision="ieee")
            else:
                logit_te = tl.dot(x_th.to(tl.float32), w_he.to(tl.float32), logit_te, input_precision="ieee")
        if G > 0:
            g_h = tl.load(gate_weight_ptr + h + h_h, mask=inside_h, other=0.0)
            gate0_t += tl.sum(x_th.to(tl.float32) * g_h[None, :], axis=1)
        if G > 1:
            g_h = tl.load(gate_weight_ptr + H + h + h_h, mask=inside_h, other=0.0)
            gate1_t += tl.sum(x_th.to(tl.float32) * g_h[None, :], axis=1)
    if G > 0:
        tl.store(gates_ptr + t_t, tl.sigmoid(gate0_t + tl.load(gate_bias_ptr)), mask=inside_t)
    if G > 1:
        tl.store(
            gates_ptr + T.to(tl.int64) + t_t, tl.sigmoid(gate1_t + tl.load(gate_bias_ptr + 1)), mask=inside_t
        )
    if E > 0:
        if WRITE_LOGITS:
            tl.store(
                logits_ptr + t_t[:, None] * E + e_e[None, :],
                logit_te,
                mask=inside_t[:, None] & (e_e < E)[None, :],
            )
        if SOFTMAX:
            shifted_te = tl.where((e_e < E)[None, :], logit_te, float("-inf"))
            exp_te = tl.exp(shifted_te - tl.max(shifted_te, axis=1)[:, None])
            score_te = exp_te / tl.sum(exp_te, axis=1)[:, None]
        else:
            score_te = tl.sigmoid(logit_te)
        choice_te = score_te
        if HAS_BIAS:
            choice_te += tl.load(bias_ptr + e_e, mask=e_e < E, other=0.0).to(tl.float32)[None, :]
        choice_te = tl.where(choice_te == choice_te, tl.maximum(choice_te, LOWEST), float("inf"))
        choice_te = tl.where((e_e < E)[None, :], choice_te, float("-inf"))
        k_k = tl.arange(0, KP)
        ids_tk = tl.zeros((BT, KP), dtype=tl.int32)
        weights_tk = tl.zeros((BT, KP), dtype=tl.float32)
        for k in range(K):
            id_t = tl.argmax(choice_te, axis=1, tie_break_left=True)
            taken_te = e_e[None, :] == id_t[:, None]
            w_t = tl.sum(tl.where(taken_te, score_te, 0.0), axis=1)
            choice_te = tl.where(taken_te, float("-inf"), choice_te)
            ids_tk = tl.where(k_k[None, :] == k, id_t[:, None], ids_tk)
            weights_tk = tl.where(k_k[None, :] == k, w_t[:, None], weights_tk)
        if NORMALIZE:
            weights_tk /= tl.sum(weights_tk, axis=1)[:, None] + 1e-20
        out_tk = t_t[:, None] * K + k_k[None, :]
        mask_tk = inside_t[:, None] & (k_k < K)[None, :]
        tl.store(ids_ptr + out_tk, ids_tk.to(tl.int32), mask=mask_tk)
        tl.store(weights_ptr + out_tk, weights_tk * scale, mask=mask_tk)


def block_hidden(block_e: int, plain: bool) -> int:
    """Columns of x at a time. ``plain`` products have float32 operands, of which three stages of ``block_e``
    router rows must fit 99 KiB."""
    if plain and block_e > 256:
        return 16
    return 32 if plain or block_e > 128 else 64


def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    gate_weight_GH: Tensor,
    gate_bias_G: Tensor,
    top_k: int,
    normalize: bool,
    score: str,
    scale: float,
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids_TK int32, weights_TK float32, gates_GT float32, logits_TE float32 or [0, E] when not asked for).

    Arguments as in :func:`flex_kernels.autograd.route`; E and G may be 0.
    """
    (T, H), E, G = x_TH.shape, weight_EH.shape[0], gate_weight_GH.shape[0]
    ids_TK = torch.empty(T, top_k, dtype=torch.int32, device=x_TH.device)
    weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=x_TH.device)
    gates_GT = torch.empty(G, T, dtype=torch.float32, device=x_TH.device)
    logits_TE = torch.empty(T if want_logits else 0, E, dtype=torch.float32, device=x_TH.device)
    if not T or not (E or G):
        return ids_TK, weights_TK, gates_GT, logits_TE
    block_e = max(16, next_power_of_2(E))
    plain = x_TH.element_size() == 4 or weight_EH.dtype != x_TH.dtype
    with torch.cuda.device_of(x_TH):
        launch(
            route_kernel,
            x_TH.device,
            (ceil_div(T, BLOCK_T), 1),
            (
                *(x_TH, weight_EH, bias_E, gate_weight_GH.contiguous(), gate_bias_G.contiguous()),
                *(ids_TK, weights_TK, gates_GT, logits_TE),
            ),
            (T,),
            (*weight_EH.stride(), float(scale)),
            H=H,
            E=E,
            K=top_k,
            KP=next_power_of_2(max(top_k, 1)),
            G=G,
            HAS_BIAS=bias_E is not None,
            NORMALIZE=normalize,
            SOFTMAX=score == "softmax",
            WRITE_LOGITS=want_logits,
            BT=BLOCK_T,
            BE=block_e,
            BK=block_hidden(block_e, plain),
            num_warps=4 if block_e <= 128 else 8,
        )
    return ids_TK, weights_TK, gates_GT, logits_TE
