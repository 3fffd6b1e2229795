"""The whole layer as one node of autograd's graph: what calls outside of tracers record.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates (personal first, then shared).

Between the ops ``route`` and ``experts`` autograd would put an edge for the weights and one for each gate,
and behind them a sum of two gradients of x. As one node, the router's backward pass adds what the experts'
gave, which is one kernel and one pass over [T, H] less, and the host has one node to make and to visit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flex_kernels import autograd
from flex_kernels.calls import TRACED, Calls, called


class Call(NamedTuple):
    """The arguments of one call as autograd takes them, one by one.

    Attributes:
        router_weight_EH, router_bias_E: of a router; or, of a decision made elsewhere, ids_TK int32 and
            weights_TK float32.
        personal_gate_weight_H, personal_gate_bias, shared_gate_weight_H: of the sigmoid gates, in any float
            dtype.
        gate_up_E2IH and what follows it: as :func:`flex_kernels.autograd.experts` takes them.
        top_k and what follows it: as :func:`flex_kernels.autograd.route` takes them.
    """

    x_TH: Tensor
    router_weight_EH: Tensor | None
    router_bias_E: Tensor | None
    ids_TK: Tensor | None
    weights_TK: Tensor | None
    personal_gate_weight_H: Tensor | None
    personal_gate_bias: Tensor | None
    shared_gate_weight_H: Tensor | None
    gate_up_E2IH: Tensor
    down_EHI: Tensor
    gate_up_scales: Tensor | None
    down_scales: Tensor | None
    personal_gate_up_2IH: Tensor | None
    personal_down_HI: Tensor | None
    shared_gate_up_2IH: Tensor | None
    shared_down_HI: Tensor | None
    shared_gate_up_scales: Tensor | None
    shared_down_scales: Tensor | None
    top_k: int
    normalize: bool
    score: str
    scale: float
    want_logits: bool
    mix: str
    save_preact: bool
    backend: str

    def gate_rows(self) -> Tensor:
        """The sigmoid gates as rows of one small matrix [G, H] float32, G = 0, 1 or 2."""
        gates = (self.personal_gate_weight_H, self.shared_gate_weight_H)
        rows = [weight.float().unsqueeze(0) for weight in gates if weight is not None]
        if not rows:
            return self.x_TH.new_empty(0, self.x_TH.shape[1], dtype=torch.float32)
        # One gate is a view: at few tokens, each of these small copies takes as long as a kernel.
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def gate_biases(self) -> Tensor:
        """Theirs [G], zero where a gate has none."""
        own, common = self.personal_gate_weight_H, self.shared_gate_weight_H
        rows = []
        if own is not None:
            bias = self.personal_gate_bias
            rows.append(own.new_zeros(1, dtype=torch.float32) if bias is None else bias.float().unsqueeze(0))
        if common is not None:
            rows.append(common.new_zeros(1, dtype=torch.float32))
        if not rows:
            return self.x_TH.new_empty(0, dtype=torch.float32)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def router(self) -> Tensor:
        """The router's rows; none, where the decision was made elsewhere."""
        if self.router_weight_EH is None:
            return self.x_TH.new_empty(0, self.x_TH.shape[1])
        return self.router_weight_EH


def places(first: str, last: str) -> slice:
    """The places of a Call's fields from ``first`` to ``last``."""
    return slice(Call._fields.index(first), Call._fields.index(last) + 1)


# The weights as the op ``experts`` takes them: on either side of the personal expert's gate.
BEFORE_GATE = places("gate_up_E2IH", "personal_down_HI")
BEHIND_GATE = places("shared_gate_up_2IH", "shared_down_scales")
SETTINGS = places("top_k", "backend")
# How many of the fields are tensors: all before the settings.
TENSORS = SETTINGS.start


class Outcome(NamedTuple):
    """What a call computes: y, the router's logits (or zero rows), its decision, the gates, and for backward
    the pre-activations of the routed, personal and shared experts and the order of the routed rows (or zero
    elements)."""

    y_TH: Tensor
    logits_TE: Tensor | None
    ids_TK: Tensor
    weights_TK: Tensor
    gates_GT: Tensor
    kept: tuple[Tensor, ...]


def evaluate(call: Call, calls: Calls) -> Outcome:
    """The layer's two steps: the thin products of x, then the feed-forward blocks."""
    gate_weight_GH = call.gate_rows()
    gates_GT, logits_TE = gate_weight_GH, None
    ids_TK, weights_TK = call.ids_TK, call.weights_TK
    if ids_TK is None or gate_weight_GH.shape[0]:
        found = calls.route(
            *(call.x_TH, call.router(), call.router_bias_E, gate_weight_GH, call.gate_biases(), call.top_k),
            *(call.normalize, call.score, call.scale, call.want_logits, call.backend),
        )
        if ids_TK is None:
            ids_TK, weights_TK, gates_GT, logits_TE = found
        else:
            gates_GT = found[2]
    assert ids_TK is not None and weights_TK is not None
    personal_gate_T, shared_gate_T = gates_apart(call, gates_GT)
    weights: tuple[Any, ...] = tuple(call)
    y_TH, *kept = calls.experts(
        *(call.x_TH, ids_TK, weights_TK, *weights[BEFORE_GATE], personal_gate_T, *weights[BEHIND_GATE]),
        *(shared_gate_T, call.mix, call.save_preact, calls.keep_order, call.backend),
    )
    return Outcome(y_TH, logits_TE, ids_TK, weights_TK, gates_GT, tuple(kept))


def gates_apart(call: Call, gates_GT: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(the personal expert's gate [T], the shared one's), None for one that there is not."""
    # Not by index, whose gradient in a traced graph fills and copies once a gate.
    gates = gates_GT.unbind(0) if gates_GT.shape[0] > 1 else (gates_GT.view(-1),)
    return (
        None if call.personal_gate_weight_H is None else gates[0],
        None if call.shared_gate_weight_H is None else gates[-1],
    )


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """(y_TH, logits_TE if wanted) of ``call``, recorded where gradients are on."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        found = evaluate(call, TRACED)
    elif torch.is_grad_enabled():
        return LayerNode.apply(*call)
    else:
        found = unrecorded(call)
    return found.y_TH, found.logits_TE if call.want_logits else None


def unrecorded(call: Call) -> Outcome:
    """:func:`evaluate`, recording nothing: every call of torch within skips looking whether it should."""
    with torch._C._AutoDispatchBelowAutograd():
        return evaluate(call, called(call[:TENSORS]))


class LayerNode(torch.autograd.Function):
    """(y, logits) of a :class:`Call`; logits are None unless wanted."""

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, Tensor | None]:
        call = Call(*fields)
        found = unrecorded(call)
        ctx.settings = call[SETTINGS]
        decision = (found.ids_TK, found.weights_TK, found.gates_GT)
        ctx.save_for_backward(*call[:3], *decision, *call[5:TENSORS], *found.kept)
        ctx.decided_here = call.ids_TK is None
        # Without this, backward is handed zeros for logits that nobody asked for.
        ctx.set_materialize_grads(False)
        return found.y_TH, found.logits_TE if call.want_logits else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return autograd.first_order(unrecorded_vjp, ctx, *grads)


def unrecorded_vjp(ctx: Any, *grads: Any) -> tuple:
    # Before anything is unrecorded: to have them, a checkpoint runs its part of the model again.
    saved = ctx.saved_tensors
    with torch._C._AutoDispatchBelowAutograd():
        return layer_vjp(ctx, saved, *grads)


def layer_vjp(
    ctx: Any, saved: tuple, grad_y_TH: Tensor | None, grad_logits_TE: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradient of every field of the :class:`Call`, None where there is none or none is needed."""
    need: Any = Call(*ctx.needs_input_grad)
    call: Any = Call(*saved[:5], *saved[6 : TENSORS + 1], *ctx.settings)
    gates_GT, kept = saved[5], saved[TENSORS + 1 :]
    calls = called((grad_y_TH, grad_logits_TE, *saved))
    own, common = call.personal_gate_weight_H, call.shared_gate_weight_H
    need_own = own is not None and (need.x_TH or need.personal_gate_weight_H or need.personal_gate_bias)
    need_common = common is not None and (need.x_TH or need.shared_gate_weight_H)
    scored = ctx.decided_here and (need.x_TH or need.router_weight_EH)
    needs = [need.x_TH, scored or need.weights_TK, need.gate_up_E2IH, need.down_EHI]
    needs += [need.personal_gate_up_2IH, need.personal_down_HI, need_own]
    needs += [need.shared_gate_up_2IH, need.shared_down_HI, need_common]
    found: tuple = (None,) * len(needs)
    if grad_y_TH is not None:
        personal_gate_T, shared_gate_T = gates_apart(call, gates_GT)
        found = calls.experts_backward(
            *(grad_y_TH.contiguous(), call.x_TH, call.ids_TK, call.weights_TK, *call[BEFORE_GATE]),
            *(personal_gate_T, *call[BEHIND_GATE], shared_gate_T, *kept, call.mix, needs, call.backend),
        )
        found = tuple(grad if needed else None for grad, needed in zip(found, needs))
    dx_TH, dweights_TK, dgate_up, ddown, dpersonal_up, dpersonal_down, dgate_T = found[:7]
    dshared_up, dshared_down, dshared_gate_T = found[7:]
    drouter = dgate_rows_GH = dgate_biases_G = None
    if scored or need_own or need_common:
        grad_TK, ids_TK, weights_TK = dweights_TK, call.ids_TK, call.weights_TK
        if not ctx.decided_here:
            grad_TK, ids_TK, weights_TK = (t[:, :0] for t in (weights_TK, ids_TK, weights_TK))
        opened = [(dgate_T, own), (dshared_gate_T, common)]
        dgates = [gate_gradient(grad, gates_GT) for grad, gate in opened if gate is not None]
        needs = [need.x_TH, need.router_weight_EH, need.personal_gate_weight_H or need.shared_gate_weight_H]
        needs.append(need.personal_gate_bias)
        found = calls.route_backward(
            torch.zeros_like(weights_TK) if grad_TK is None else grad_TK,
            gates_GT if not dgates else dgates[0] if len(dgates) == 1 else torch.cat(dgates),
            gates_GT.new_empty(0) if grad_logits_TE is None else grad_logits_TE.contiguous(),
            *(call.x_TH, call.router(), call.gate_rows(), ids_TK, weights_TK, gates_GT),
            *(call.normalize, call.score, call.scale, needs, dx_TH, call.backend),
        )
        dx_TH, drouter, dgate_rows_GH, dgate_biases_G = (g if n else None for g, n in zip(found, needs))
    return (
        *(dx_TH, drouter, None, None, dweights_TK if need.weights_TK else None),
        row(dgate_rows_GH, 0, own, need.personal_gate_weight_H),
        row(dgate_biases_G, 0, call.personal_gate_bias, need.personal_gate_bias),
        row(dgate_rows_GH, -1, common, need.shared_gate_weight_H),
        *(dgate_up, ddown, None, None),
        *(dpersonal_up, dpersonal_down, dshared_up, dshared_down, None, None),
        *(None,) * (len(Call._fields) - TENSORS),
    )


def gate_gradient(grad_T: Tensor | None, gates_GT: Tensor) -> Tensor:
    """[1, T], zeros where nothing depended on the gate."""
    return gates_GT.new_zeros(1, gates_GT.shape[1]) if grad_T is None else grad_T.unsqueeze(0)


def row(rows: Tensor | None, place: int, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """One gate's part of a gradient, in its parameter's dtype."""
    if not needed or rows is None or parameter is None:
        return None
    return rows.select(0, place).to(parameter.dtype)
