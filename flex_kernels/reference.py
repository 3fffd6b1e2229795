"""The layer in plain torch: the specification that every backend is tested against.

Letters: T tokens, H hidden, E routed experts, K chosen, I width of any one expert.
Runs in any float dtype up to float64 and is differentiable in every float input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flex_kernels.checkpoint import keep_ids
from flex_kernels.types import Experts, Mix, Personal, Routed, Router, Shared, plain


def at_least_float32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def swiglu_ffn(x_TH: Tensor, gate_up_2IH: Tensor, down_HI: Tensor) -> Tensor:
    """down (silu(gate x) * (up x)), [T, H] in x's dtype, to which the weights are cast."""
    gate_TI, up_TI = F.linear(x_TH, gate_up_2IH.to(x_TH.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TI) * up_TI, down_HI.to(x_TH.dtype))


def sigmoid_gate(x_TH: Tensor, weight_H: Tensor, bias: Tensor | None) -> Tensor:
    """sigmoid(x . w + b) in float32 or wider, [T]."""
    logit_T = at_least_float32(x_TH) @ at_least_float32(weight_H)
    return torch.sigmoid(logit_T if bias is None else logit_T + at_least_float32(bias))


def route(x_TH: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, choice and weights of the router: (ids_TK int64, weights_TK, logits_TE)."""
    logits_TE = F.linear(at_least_float32(x_TH), at_least_float32(router.weight))
    p_TE = logits_TE.softmax(-1) if router.score == "softmax" else logits_TE.sigmoid()
    choice_TE = p_TE.detach() if router.bias is None else p_TE.detach() + router.bias
    # A stable descending sort gives ties to the lowest index; torch.topk promises no order.
    ids_TK = keep_ids(choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : router.top_k])
    weights_TK = p_TE.gather(1, ids_TK)
    if router.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * router.scale, logits_TE


def routed_sum(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
    """sum_k s_k E_{i_k}(x), accumulated in float32 or wider, [T, H]."""
    out_TH = at_least_float32(torch.zeros_like(x_TH))
    for e in range(experts.count):
        token_n, slot_n = torch.where(ids_TK == e)
        y_nH = swiglu_ffn(x_TH[token_n], *experts.expert(e, x_TH.dtype))
        weighted_nH = at_least_float32(y_nH) * at_least_float32(weights_TK[token_n, slot_n, None])
        out_TH = out_TH.index_add(0, token_n, weighted_nH)
    return out_TH


def moe(
    x_TH: Tensor,
    router: Router | Routed,
    experts: Experts,
    personal: Personal | None,
    shared: Shared | None,
    mix: Mix,
) -> tuple[Tensor, Tensor | None]:
    """y and the router's logits (None for :class:`Routed`): the equations of the layer, one line each."""
    if isinstance(router, Router):
        ids_TK, weights_TK, logits_TE = route(x_TH, router)
    else:
        ids_TK, weights_TK, logits_TE = router.ids, router.weights, None
    r_TH = routed_sum(x_TH, ids_TK, weights_TK, experts)
    if shared is not None:
        weights = (plain(shared.gate_up, x_TH.dtype), plain(shared.down, x_TH.dtype))
        s_TH = at_least_float32(swiglu_ffn(x_TH, *weights))
        if shared.gate_weight is not None:
            s_TH = sigmoid_gate(x_TH, shared.gate_weight, None)[:, None] * s_TH
        r_TH = r_TH + s_TH
    if personal is not None:
        g_T1 = sigmoid_gate(x_TH, personal.gate_weight, personal.gate_bias)[:, None]
        p_TH = at_least_float32(swiglu_ffn(x_TH, personal.gate_up, personal.down))
        r_TH = (r_TH if mix == "add" else (1 - g_T1) * r_TH) + g_T1 * p_TH
    return r_TH.to(x_TH.dtype), logits_TE
