"""The ``experts`` op on the CPU: plan the groups, run them on the fastest engine here, assemble what comes
out.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, N = T*K rows in expert order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flex_kernels.cpu import blocks, fused, ops
from flex_kernels.cpu.plan import WEIGHT_ROWS, Block, Group, Plan, attach_preacts, make_plan
from flex_kernels.quantize import Quantized


def weights_of(stored: Tensor, scales: Tensor | None, columns: int) -> Tensor | Quantized:
    return stored if scales is None else Quantized(stored, scales, columns)


def dense_weights(
    gate_up: Tensor | None,
    down: Tensor | None,
    x_TH: Tensor,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> tuple[Tensor | Quantized, Tensor | Quantized] | None:
    """The weights of an expert that every token passes through: plain ones in x's dtype."""
    if gate_up is None or down is None:
        return None
    columns = x_TH.shape[1], gate_up.shape[0] // 2
    return (
        gate_up.to(x_TH.dtype) if gate_up_scales is None else Quantized(gate_up, gate_up_scales, columns[0]),
        down.to(x_TH.dtype) if down_scales is None else Quantized(down, down_scales, columns[1]),
    )


def experts_forward(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    personal_gate_up_2IH: Tensor | None,
    personal_down_HI: Tensor | None,
    gate_T: Tensor | None,
    shared_gate_up_2IH: Tensor | None,
    shared_down_HI: Tensor | None,
    shared_gate_up_scales: Tensor | None,
    shared_down_scales: Tensor | None,
    shared_gate_T: Tensor | None,
    mix: str,
    save_preact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TH, routed [N, 2I], personal [T, 2Ip] and shared [T, 2Is] pre-activations, no order); see
    ``autograd.experts``.
    """
    ops.warn_if_missing()
    personal = dense_weights(personal_gate_up_2IH, personal_down_HI, x_TH)
    shared = dense_weights(
        shared_gate_up_2IH, shared_down_HI, x_TH, shared_gate_up_scales, shared_down_scales
    )
    gate_up = weights_of(gate_up_E2IH, gate_up_scales, x_TH.shape[1])
    down = weights_of(down_EHI, down_scales, gate_up_E2IH.shape[1] // 2)
    plan = make_plan(ids_TK, weights_TK, gate_up, down, personal, gate_T, shared, shared_gate_T, mix)

    def kept(rows: int, gate_up: Tensor | None) -> Tensor:
        if not save_preact or gate_up is None:
            return x_TH.new_empty(0)
        return ops.kernels.empty(rows, gate_up.shape[-2], dtype=x_TH.dtype)

    tokens = x_TH.shape[0]
    preacts = (
        kept(ids_TK.numel(), gate_up_E2IH),
        kept(tokens, personal_gate_up_2IH),
        kept(tokens, shared_gate_up_2IH),
    )
    attach_preacts(plan, *preacts)
    groups = plan.routed_groups() + [b.group() for b in (plan.shared, plan.personal) if b is not None]
    sum_TH = ops.kernels.empty(*x_TH.shape, dtype=torch.float32).zero_()
    engine = fused if fused.serves(groups) else blocks
    engine.forward(x_TH, groups, sum_TH)
    return sum_TH.to(x_TH.dtype), *preacts, ids_TK.new_empty(0)


def experts_backward(
    grad_y_TH: Tensor,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    personal_gate_up_2IH: Tensor | None,
    personal_down_HI: Tensor | None,
    gate_T: Tensor | None,
    shared_gate_up_2IH: Tensor | None,
    shared_down_HI: Tensor | None,
    shared_gate_up_scales: Tensor | None,
    shared_down_scales: Tensor | None,
    shared_gate_T: Tensor | None,
    preact_N2I: Tensor,
    personal_preact_T2I: Tensor,
    shared_preact_T2I: Tensor,
    order: Tensor,
    mix: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (x, weights, gate_up, down, personal gate_up, personal down, gate, shared gate_up, shared
    down,
    shared gate); zero elements where ``needs`` is false. See ``autograd.experts_backward``."""
    need_x, need_weights, need_up, need_down, need_p_up, need_p_down, need_gate, *need_shared = needs
    need_s_up, need_s_down, need_s_gate = need_shared
    personal = dense_weights(personal_gate_up_2IH, personal_down_HI, x_TH)
    shared = dense_weights(
        shared_gate_up_2IH, shared_down_HI, x_TH, shared_gate_up_scales, shared_down_scales
    )
    gate_up = weights_of(gate_up_E2IH, gate_up_scales, x_TH.shape[1])
    down = weights_of(down_EHI, down_scales, gate_up_E2IH.shape[1] // 2)
    plan = make_plan(ids_TK, weights_TK, gate_up, down, personal, gate_T, shared, shared_gate_T, mix)
    attach_preacts(plan, preact_N2I, personal_preact_T2I, shared_preact_T2I)
    tokens = x_TH.shape[0]

    def buffer(needed: bool, like: Tensor | None) -> Tensor | None:
        if not needed or like is None:
            return None
        if 0 < tokens <= WEIGHT_ROWS:
            # One product writes all of it.
            return torch.empty(like.shape, dtype=like.dtype)
        return torch.zeros(like.shape, dtype=like.dtype if not tokens else torch.float32)

    plan.routed.dscale_N = torch.zeros(ids_TK.numel())
    # Stacks keep their own dtype: a second, wider buffer of that size would dwarf everything else.
    plan.routed.dgate_up_E2IH = torch.zeros_like(gate_up_E2IH) if need_up else None
    plan.routed.ddown_EHI = torch.zeros_like(down_EHI) if need_down else None
    dp_gate_up, dp_down = buffer(need_p_up, personal_gate_up_2IH), buffer(need_p_down, personal_down_HI)
    ds_gate_up, ds_down = buffer(need_s_up, shared_gate_up_2IH), buffer(need_s_down, shared_down_HI)

    groups: list[Group] = []
    gate_needs_rest = need_gate and plan.closed_T is not None
    if need_x or need_weights or need_up or need_down or gate_needs_rest:
        groups += plan.routed_groups()
    if plan.shared is not None and (need_x or any(need_shared) or gate_needs_rest):
        groups.append(dense_group(plan.shared, ds_gate_up, ds_down))
    if plan.personal is not None and (need_x or need_p_up or need_p_down or need_gate):
        groups.append(dense_group(plan.personal, dp_gate_up, dp_down))
    dx_TH = ops.kernels.empty(*x_TH.shape, dtype=torch.float32).zero_() if need_x else None
    engine = fused if fused.serves(groups) else blocks
    engine.backward(grad_y_TH, x_TH, groups, dx_TH)

    dweights_TK, dgate_T, ds_gate_T = scale_gradients(
        plan, weights_TK, gate_T, shared_gate_T, need_weights, need_gate, need_s_gate
    )

    # Outputs of a custom op may not alias each other: each absent gradient is an empty tensor of its own.
    def result(gradient: Tensor | None, like: Tensor | None) -> Tensor:
        return x_TH.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)

    if dx_TH is not None and dx_TH.dtype != x_TH.dtype:
        dx_TH = ops.kernels.empty_like(x_TH).copy_(dx_TH)
    return (
        result(dx_TH, x_TH),
        result(dweights_TK, weights_TK),
        result(plan.routed.dgate_up_E2IH, gate_up_E2IH),
        result(plan.routed.ddown_EHI, down_EHI),
        result(dp_gate_up, personal_gate_up_2IH),
        result(dp_down, personal_down_HI),
        result(dgate_T, gate_T),
        result(ds_gate_up, shared_gate_up_2IH),
        result(ds_down, shared_down_HI),
        result(ds_gate_T, shared_gate_T),
    )


def dense_group(block: Block, dgate_up_2IH: Tensor | None, ddown_HI: Tensor | None) -> Group:
    """All rows of a block of one expert, with room for its gradients."""
    block.dscale_N = torch.zeros(block.tokens_N.shape[0])
    block.dgate_up_E2IH = None if dgate_up_2IH is None else dgate_up_2IH[None]
    block.ddown_EHI = None if ddown_HI is None else ddown_HI[None]
    return block.group()


def scale_gradients(
    plan: Plan,
    weights_TK: Tensor,
    gate_T: Tensor | None,
    shared_gate_T: Tensor | None,
    need_weights: bool,
    need_gate: bool,
    need_shared_gate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (weights_TK, gate_T, shared_gate_T) from those of each row's scale.

    mix="convex" scales the routed and shared parts r by (1 - g): their gradients carry that factor, and
    dg = <dy, E_p(x)> - <dy, r>, with <dy, r> = sum_k s_k ds_k + s_shared ds_shared.
    """
    closed_T = plan.closed_T
    dweights_TK: Tensor | None = None
    dgate_T: Tensor | None = None
    dshared_T: Tensor | None = None
    dslot_TK: Tensor | None = None
    if need_weights or (need_gate and closed_T is not None):
        used = plan.offsets[-1]
        dslot_TK = ops.routing.unsort_rows(plan.routed.dscale_N, plan.order_N, used, weights_TK.shape)
    if need_weights and dslot_TK is not None:
        dweights_TK = dslot_TK if closed_T is None else dslot_TK * closed_T[:, None]
    if need_shared_gate and plan.shared is not None:
        dshared_T = plan.shared.dscale_N if closed_T is None else plan.shared.dscale_N * closed_T
    if need_gate and plan.personal is not None:
        dgate_T = plan.personal.dscale_N
        if closed_T is not None and dslot_TK is not None:
            dgate_T = dgate_T - (weights_TK * dslot_TK).sum(-1)
            if plan.shared is not None:
                gate: Tensor | float = 1.0 if shared_gate_T is None else shared_gate_T
                dgate_T = dgate_T - gate * plan.shared.dscale_N
    return dweights_TK, dgate_T, dshared_T
