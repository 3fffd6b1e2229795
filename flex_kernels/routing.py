"""Router and gates in plain torch, forward and backward: what backends without a routing kernel of their own
share.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates, R = E + G rows of the thin product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Elements of x that are converted to float32 at a time: the copy takes 2 MiB and stays in cache.
CHUNK = 1 << 19


def chunks(x_TH: Tensor) -> list[slice]:
    T, H = x_TH.shape
    step = max(1, CHUNK // max(1, H))
    return [slice(start, start + step) for start in range(0, T, step)]


def thin_product(x_TH: Tensor, rows_RH: Tensor) -> Tensor:
    """x @ rows^T with float32 operands and result, [T, R]."""
    rows_HR = rows_RH.float().t()
    out_TR = torch.empty(x_TH.shape[0], rows_RH.shape[0], dtype=torch.float32, device=x_TH.device)
    for rows in chunks(x_TH):
        torch.mm(x_TH[rows].float(), rows_HR, out=out_TR[rows])
    return out_TR


def weight_gradient(drows_TR: Tensor, x_TH: Tensor) -> Tensor:
    """drows^T @ x in float32, [R, H]."""
    out_RH = torch.zeros(drows_TR.shape[1], x_TH.shape[1], dtype=torch.float32, device=x_TH.device)
    for rows in chunks(x_TH):
        out_RH.addmm_(drows_TR[rows].t(), x_TH[rows].float())
    return out_RH


def logits_gradient(
    grad_weights_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, normalize: bool, score: str, scale: float
) -> Tensor:
    """d loss / d logits [T, E] for the choice that was made; the choice itself has no gradient.

    With s the chosen scores: w = scale * s, or scale * s / sum(s) when normalised.
    """
    ids_TK = ids_TK.long()
    p_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    p_TK = p_TE.gather(1, ids_TK)
    ds_TK = grad_weights_TK * scale
    if normalize:
        total_T1 = p_TK.sum(-1, keepdim=True) + 1e-20
        ds_TK = (ds_TK - (ds_TK * p_TK).sum(-1, keepdim=True) / total_T1) / total_T1
    if score == "sigmoid":
        return torch.zeros_like(logits_TE).scatter_(1, ids_TK, ds_TK * p_TK * (1 - p_TK))
    inner_T1 = (ds_TK * p_TK).sum(-1, keepdim=True)
    return (-inner_T1 * p_TE).scatter_add_(1, ids_TK, ds_TK * p_TK)


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
    empty_like: Callable[[Tensor], Tensor] = torch.empty_like,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, router weight, gate weights, gate biases); zero elements where ``needs`` is false.

    The logits are computed again from x: keeping them would cost 4 E bytes a token. ``other_grad_x_TH`` is
    added to the gradient of x, in float32. ``empty_like`` makes that gradient.
    """
    need_x, need_weight, need_gate_weight, need_gate_bias = needs
    dgates_TG = (grad_gates_GT * gates_GT * (1 - gates_GT)).t()
    dlogits_TE = dgates_TG[:, :0]
    if weight_EH.shape[0]:
        logits_TE = thin_product(x_TH, weight_EH)
        dlogits_TE = logits_gradient(grad_weights_TK, logits_TE, ids_TK, normalize, score, scale)
        if grad_logits_TE.numel():
            dlogits_TE += grad_logits_TE
    dx_TH = x_TH.new_empty(0)
    if need_x:
        dx_TH = empty_like(x_TH)
        drows_TR = torch.cat([dlogits_TE, dgates_TG], dim=1)
        rows_RH = torch.cat([weight_EH.float(), gate_weight_GH.float()])
        for rows in chunks(x_TH):
            if other_grad_x_TH is None:
                dx_TH[rows] = drows_TR[rows] @ rows_RH
            else:
                dx_TH[rows] = torch.addmm(other_grad_x_TH[rows].float(), drows_TR[rows], rows_RH)
    dweight_EH = weight_gradient(dlogits_TE, x_TH).to(weight_EH.dtype) if need_weight else x_TH.new_empty(0)
    dgate_weight_GH = weight_gradient(dgates_TG, x_TH) if need_gate_weight else x_TH.new_empty(0)
    dgate_bias_G = dgates_TG.sum(0) if need_gate_bias else x_TH.new_empty(0)
    return dx_TH, dweight_EH, dgate_weight_GH, dgate_bias_G
