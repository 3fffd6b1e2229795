"""The ``route`` op on the CPU: native kernels on x and the router as stored, or torch's products where there
are none.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates, R = E + G rows of the thin product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flex_kernels import routing
from flex_kernels.cpu import ops


def as_multiplied(weight_EH: Tensor, x_TH: Tensor) -> Tensor:
    """The router as the kernels read it: as stored in x's dtype or float32, a float32 copy of others."""
    return (weight_EH if weight_EH.dtype == x_TH.dtype else weight_EH.float()).contiguous()


def logits_of(x_TH: Tensor, weight_EH: Tensor, gate_weight_GH: Tensor) -> Tensor:
    """x @ [router, gates]^T in float32, [T, R]."""
    if ops.fused():
        return ops.routing.router_product(x_TH, weight_EH, gate_weight_GH)
    return routing.thin_product(x_TH, torch.cat([weight_EH.float(), gate_weight_GH]))


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
    """(ids_TK int32, weights_TK float32, gates_GT float32, logits_TE float32 or [0, E]); see
    ``autograd.route``.
    """
    ops.warn_if_missing()
    tokens, experts = x_TH.shape[0], weight_EH.shape[0]
    logits_TR = logits_of(x_TH, as_multiplied(weight_EH, x_TH), gate_weight_GH.float().contiguous())
    if experts:
        ids_TK, weights_TK = ops.routing.choose(logits_TR, experts, bias_E, top_k, normalize, score, scale)
    else:
        ids_TK, weights_TK = torch.empty(tokens, top_k, dtype=torch.int32), torch.empty(tokens, top_k)
    gates_GT = ops.routing.open_gates(logits_TR, experts, gate_bias_G)
    logits_TE = logits_TR[:, :experts].contiguous() if want_logits else logits_TR.new_empty(0, experts)
    return ids_TK, weights_TK, gates_GT, logits_TE


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
    """As :func:`flex_kernels.routing.route_backward`, in kernels that read x as stored."""
    if not ops.fused():
        return routing.route_backward(
            grad_weights_TK,
            grad_gates_GT,
            grad_logits_TE,
            x_TH,
            weight_EH,
            gate_weight_GH,
            ids_TK,
            weights_TK,
            gates_GT,
            normalize,
            score,
            scale,
            needs,
            other_grad_x_TH,
            ops.kernels.empty_like,
        )
    need_x, need_weight, need_gate_weight, need_gate_bias = needs
    weight, gate_weight = as_multiplied(weight_EH, x_TH), gate_weight_GH.float().contiguous()
    experts, columns = weight.shape[0], weight.shape[0] + gate_weight.shape[0]
    if experts and (need_x or need_weight):
        d_TR = logits_of(x_TH, weight, gate_weight)
        grad_weights = grad_weights_TK.float().contiguous()
        added_TE = grad_logits_TE.contiguous() if grad_logits_TE.numel() else None
        ops.routing.choose_backward(
            d_TR, ids_TK.contiguous(), grad_weights, added_TE, experts, normalize, score, scale
        )
    else:
        d_TR = torch.zeros(x_TH.shape[0], columns)
    dbias_G = ops.routing.open_gates_backward(gates_GT.contiguous(), grad_gates_GT.contiguous(), d_TR)

    def rows_gradient(needed: bool, first: int, last: int) -> Tensor:
        if not needed:
            return x_TH.new_empty(0)
        return ops.routing.router_rows_gradient(d_TR, range(first, last), x_TH)

    dx_TH = x_TH.new_empty(0)
    if need_x:
        dx_TH = ops.kernels.empty_like(x_TH)
        other = None if other_grad_x_TH is None else other_grad_x_TH.to(x_TH.dtype).contiguous()
        ops.routing.router_input_gradient(d_TR, weight, gate_weight, other, dx_TH)
    return (
        dx_TH,
        rows_gradient(need_weight, 0, experts).to(weight_EH.dtype),
        rows_gradient(need_gate_weight, experts, columns),
        dbias_G if need_gate_bias else x_TH.new_empty(0),
    )
