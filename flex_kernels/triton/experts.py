"""The feed-forward blocks of the layer on Triton kernels, forward and backward.

Letters: T tokens, H hidden, E experts, K chosen, I expert width, N = T*K rows in expert order, B column
tiles.

The routed experts, the personal expert and the shared expert run through the same three products; a dense
expert is a group of its own that owns every token. No step asks the device for a number, so all of it can be
captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flex_kernels.quantize import Quantized
from flex_kernels.row_order import part_sizes
from flex_kernels.triton.codes import Weights, decodable
from flex_kernels.triton.combine import combine
from flex_kernels.triton.down_backward import down_backward
from flex_kernels.triton.grouped_gemm import grouped_gemm
from flex_kernels.triton.groups import Groups, dense, sort_rows, sorted_groups
from flex_kernels.triton.score_grads import score_grads
from flex_kernels.triton.tiles import Plan
from flex_kernels.triton.tune import plan_for, weights_text
from flex_kernels.triton.up_swiglu import up_swiglu
from flex_kernels.triton.weight_grad import weight_grad


@dataclass(frozen=True)
class Helpers:
    """What another backend may put in place of this one's own: sorting the slots, and the last pass.

    Attributes:
        sort: (ids_TK int32 contiguous, E, rows a tile) -> a RowOrder in one piece, as
            :func:`groups.sort_rows`.
        combine: (y_NH, inverse_TK, weights_TK, personal_TH, gate_T, shared_TH, shared_gate_T, mix) -> [T, H],
            as :func:`combine.combine`; every argument from weights_TK to shared_gate_T may be None.
    """

    sort: Callable[[Tensor, int, int], Tensor] = sort_rows
    combine: Callable[..., Tensor] = combine


TRITON = Helpers()


class Block(NamedTuple):
    """One set of experts (routed, personal or shared) with its rows and its tiles; E = 1 for a dense
    expert."""

    gate_up_E2IH: Weights
    down_EHI: Weights
    groups: Groups
    plan: Plan


def weights_of(stored: Tensor, scales: Tensor | None, columns: int) -> Weights:
    """Weights as they are, or the codes and scales of quantised ones as one."""
    return stored if scales is None else Quantized(stored, scales, columns)


def routed_block(
    x_TH: Tensor,
    ids_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    helpers: Helpers,
    known: Tensor | None = None,
) -> tuple[Block, Tensor, Tensor]:
    """(the routed experts with their rows, the row of each slot, the order of the rows in one piece).

    ``known`` is the order that an earlier call gave for the same ids; it is found anew where there is none,
    or where it is for tiles of another height: a plan may have been tuned since.
    """
    E, two_I, _ = gate_up.shape
    (T, K), H, I = ids_TK.shape, x_TH.shape[1], two_I // 2
    gate_up_E2IH, down_EHI = weights_of(gate_up, gate_up_scales, H), weights_of(down, down_scales, I)
    stored = plan_for(x_TH.device, x_TH.dtype, H, I, E, K, T, weights_text(gate_up_E2IH, down_EHI))
    plan = decodable(stored, (gate_up_E2IH, down_EHI), x_TH)
    if known is None or known.numel() != sum(part_sizes(T * K, E, plan.m)):
        known = helpers.sort(ids_TK.contiguous(), E, plan.m)
    groups, inverse_TK = sorted_groups(known, ids_TK, E, plan.m)
    return Block(gate_up_E2IH, down_EHI, groups, plan), inverse_TK, known


def dense_block(
    x_TH: Tensor,
    gate_up_2IH: Tensor | None,
    down_HI: Tensor | None,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Block | None:
    """An expert that every token passes through; plain weights are cast to x's dtype."""
    if gate_up_2IH is None or down_HI is None:
        return None
    (T, H), I = x_TH.shape, gate_up_2IH.shape[0] // 2
    gate_up_E2IH = alone(x_TH.dtype, gate_up_2IH, gate_up_scales, H)
    down_EHI = alone(x_TH.dtype, down_HI, down_scales, I)
    stored = plan_for(x_TH.device, x_TH.dtype, H, I, 1, 1, T, weights_text(gate_up_E2IH, down_EHI))
    plan = decodable(stored, (gate_up_E2IH, down_EHI), x_TH)
    return Block(gate_up_E2IH, down_EHI, dense(T, plan.m), plan)


def alone(dtype: torch.dtype, weight_AB: Tensor, scales: Tensor | None, columns: int) -> Weights:
    """The weight of a dense expert as a stack of one, in ``dtype`` where it is plain."""
    if scales is not None:
        return Quantized(weight_AB.unsqueeze(0), scales.unsqueeze(0), columns)
    return (weight_AB if weight_AB.dtype == dtype else weight_AB.to(dtype)).unsqueeze(0)


def block_forward(x_TH: Tensor, block: Block | None, save_preact: bool) -> tuple[Tensor | None, Tensor]:
    """(rows of expert outputs [N, H], pre-activations [N, 2I] or zero elements); (None, zero elements)
    without experts."""
    if block is None:
        return None, x_TH.new_empty(0)
    act_NI, preact_N2I = up_swiglu(x_TH, block.gate_up_E2IH, block.groups, block.plan.up, True, save_preact)
    return grouped_gemm(act_NI, block.down_EHI, True, block.groups, block.plan.down), preact_N2I


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
    helpers: Helpers = TRITON,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TH, pre-activations routed [N, 2I], personal [T, 2Ip], shared [T, 2Is], the order of the rows).

    Arguments as in :func:`flex_kernels.autograd.experts`; ``helpers`` is the seam for other backends.
    """
    T = ids_TK.shape[0]
    if T == 0:
        widths = [
            None if w is None else w.shape[-2]
            for w in (gate_up_E2IH, personal_gate_up_2IH, shared_gate_up_2IH)
        ]
        z, zp, zs = (x_TH.new_empty((0, w) if save_preact and w is not None else (0,)) for w in widths)
        return torch.empty_like(x_TH), z, zp, zs, ids_TK.new_empty(0)
    with torch.cuda.device_of(x_TH):
        routed, inverse_TK, order = routed_block(
            x_TH, ids_TK, gate_up_E2IH, down_EHI, gate_up_scales, down_scales, helpers
        )
        y_NH, preact_N2I = block_forward(x_TH, routed, save_preact)
        personal_TH, personal_preact = block_forward(
            x_TH, dense_block(x_TH, personal_gate_up_2IH, personal_down_HI), save_preact
        )
        shared_TH, shared_preact = block_forward(
            x_TH,
            dense_block(x_TH, shared_gate_up_2IH, shared_down_HI, shared_gate_up_scales, shared_down_scales),
            save_preact,
        )
        y_TH = helpers.combine(
            y_NH,
            inverse_TK,
            weights_TK.contiguous(),
            personal_TH,
            gate_T,
            shared_TH,
            shared_gate_T,
            mix,
        )
    return y_TH, preact_N2I, personal_preact, shared_preact, order


class BlockNeeds(NamedTuple):
    """Which gradients of one block are asked for: of x, of its weights, and of the factor of each row's
    output."""

    x: bool
    gate_up: bool
    down: bool
    score: bool


class BlockGrads(NamedTuple):
    """Gradients of one block, None where not asked for.

    Attributes:
        dx_NH: of x, by row.
        dgate_up_E2IH, ddown_EHI: of the weights, in their shapes.
        dscore_BN: of the factor of each row's output: float32 parts to be summed over B.
    """

    dx_NH: Tensor | None = None
    dgate_up_E2IH: Tensor | None = None
    ddown_EHI: Tensor | None = None
    dscore_BN: Tensor | None = None


def block_backward(
    dy_TH: Tensor,
    x_TH: Tensor,
    block: Block | None,
    preact_N2I: Tensor,
    score: Tensor | None,
    damp_T: Tensor | None,
    needs: BlockNeeds,
) -> BlockGrads:
    """The gradients that are asked for. Pre-activations that were not saved are computed again.

    The block's output row enters the layer's output times ``score`` (one a slot, or None for 1) and times
    1 - ``damp_T`` where that is given.
    """
    if block is None or not any(needs):
        return BlockGrads()
    groups, plan = block.groups, block.plan
    recomputed = not preact_N2I.numel()
    if recomputed:
        _, preact_N2I = up_swiglu(x_TH, block.gate_up_E2IH, groups, plan.up, False, True)
    dz_N2I, act_NI, dscore_BN = down_backward(
        dy_TH,
        block.down_EHI,
        preact_N2I,
        groups,
        plan.down_backward,
        score,
        damp_T,
        needs.x or needs.gate_up,
        needs.down,
        needs.score,
        overwrite=recomputed,
    )
    del preact_N2I
    dx_NH = dgate_up = ddown = None
    if needs.x:
        dx_NH = grouped_gemm(dz_N2I, block.gate_up_E2IH, False, groups, plan.up_backward)
    if needs.gate_up:
        dgate_up = (
            weight_grad(dz_N2I, False, x_TH, True, groups) if groups.grouped else (dz_N2I.t() @ x_TH)[None]
        )
    if needs.down:
        ddown = (
            weight_grad(dy_TH, True, act_NI, False, groups) if groups.grouped else (dy_TH.t() @ act_NI)[None]
        )
    return BlockGrads(dx_NH, dgate_up, ddown, dscore_BN if needs.score else None)


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
    helpers: Helpers = TRITON,
) -> tuple[Tensor, ...]:
    """The ten gradients of :func:`flex_kernels.autograd.experts_backward`; zero elements where ``needs`` is
    false."""
    T = ids_TK.shape[0]
    inputs = (
        *(x_TH, weights_TK, gate_up_E2IH, down_EHI, personal_gate_up_2IH, personal_down_HI, gate_T),
        *(shared_gate_up_2IH, shared_down_HI, shared_gate_T),
    )
    if T == 0:
        return tuple(zeros_unless_skipped(n, x_TH if t is None else t) for n, t in zip(needs, inputs))
    x, weights, gate_up, down, p_gate_up, p_down, gate, s_gate_up, s_down, s_gate = needs
    convex = mix == "convex" and gate_T is not None
    damp_T = gate_T if convex else None
    with torch.cuda.device_of(x_TH):
        weights_TK = weights_TK.contiguous()
        block, inverse_TK, _ = routed_block(
            x_TH, ids_TK, gate_up_E2IH, down_EHI, gate_up_scales, down_scales, helpers, order
        )
        routed = block_backward(
            grad_y_TH,
            x_TH,
            block,
            preact_N2I,
            weights_TK,
            damp_T,
            BlockNeeds(x, gate_up, down, weights or (gate and convex)),
        )
        personal = block_backward(
            grad_y_TH,
            x_TH,
            dense_block(x_TH, personal_gate_up_2IH, personal_down_HI),
            personal_preact_T2I,
            gate_T,
            None,
            BlockNeeds(x, p_gate_up, p_down, gate),
        )
        shared = block_backward(
            grad_y_TH,
            x_TH,
            dense_block(x_TH, shared_gate_up_2IH, shared_down_HI, shared_gate_up_scales, shared_down_scales),
            shared_preact_T2I,
            shared_gate_T,
            damp_T,
            BlockNeeds(x, s_gate_up, s_down, s_gate or (gate and convex)),
        )
        dx_TH = x_TH.new_empty(0)
        if x:
            dx_TH = helpers.combine(
                routed.dx_NH, inverse_TK, None, personal.dx_NH, None, shared.dx_NH, None, "add"
            )
        dweights_TK, dgate_T, dshared_gate_T = score_grads(
            routed.dscore_BN,
            inverse_TK,
            weights_TK,
            personal.dscore_BN,
            gate_T,
            shared.dscore_BN,
            shared_gate_T,
            mix,
            weights,
            gate,
            s_gate,
        )
    # A custom op may not return one tensor twice, so every absent gradient is a tensor of its own.
    return (
        dx_TH,
        dweights_TK,
        *(x_TH.new_empty(0) if g is None else g for g in (routed.dgate_up_E2IH, routed.ddown_EHI)),
        dense_gradient(personal.dgate_up_E2IH, personal_gate_up_2IH, x_TH),
        dense_gradient(personal.ddown_EHI, personal_down_HI, x_TH),
        dgate_T,
        dense_gradient(shared.dgate_up_E2IH, shared_gate_up_2IH, x_TH),
        dense_gradient(shared.ddown_EHI, shared_down_HI, x_TH),
        dshared_gate_T,
    )


def dense_gradient(gradient_1AB: Tensor | None, weight_AB: Tensor | None, x_TH: Tensor) -> Tensor:
    """[A, B] in the weight's own dtype, or zero elements where there is none."""
    if gradient_1AB is None or weight_AB is None:
        return x_TH.new_empty(0)
    return gradient_1AB[0].to(weight_AB.dtype)


def zeros_unless_skipped(needed: bool, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape if needed else (0,))
