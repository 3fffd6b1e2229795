"""What one call must compute, as a list of groups of rows: y[tokens[n]] += scale[n] * E(x[tokens[n]]).

Routed, personal and shared experts differ only in which tokens they see and with what scale, so every engine
below this file knows groups alone.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, N = T*K rows in expert order, n rows
of one group.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flex_kernels.cpu import ops
from flex_kernels.quantize import Quantized

# Rows up to which a weight gradient is one product, written straight to its buffer; beyond, pieces of this
# many are summed in float32.
WEIGHT_ROWS = 4096


@dataclass
class Group:
    """One expert and the rows it serves.

    Attributes:
        gate_up_2IH, down_HI: the expert's weights, as stored.
        tokens_n: int32 rows of x, in ascending order.
        scale_n: float32 factor of each row in y.
        preact_n2I: where its pre-activations are kept, or None.
        dscale_n: float32 [n], made by the caller and filled by the backward pass with <dy, E(x)> of each row.
        dgate_up_2IH, ddown_HI: where weight gradients go, or None when not asked for.
        everyone: ``tokens_n`` counts up from zero: rows need no gathering.
        rows, width: n and I.
    """

    gate_up_2IH: Tensor | Quantized
    down_HI: Tensor | Quantized
    tokens_n: Tensor
    scale_n: Tensor
    preact_n2I: Tensor | None = None
    dscale_n: Tensor = field(default_factory=lambda: torch.empty(0))
    dgate_up_2IH: Tensor | None = None
    ddown_HI: Tensor | None = None
    everyone: bool = False
    rows: int = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows, self.width = self.tokens_n.shape[0], self.down_HI.shape[1]

    def rows_of(self, source_TH: Tensor, rows: slice) -> Tensor:
        """The rows of ``source_TH`` that rows [start, stop) of this group stand for."""
        if self.everyone:
            return source_TH[rows]
        tokens_n = self.tokens_n[rows]
        out_nH = source_TH.new_empty(tokens_n.shape[0], source_TH.shape[1])
        ops.kernels.gather_rows(source_TH, tokens_n, out_nH)
        return out_nH

    def add_gradient(self, gradient: Tensor, left_nA: Tensor, right_nB: Tensor) -> None:
        """gradient [A, B] = left^T right of all the group's rows, or += of a part of them."""
        if self.rows > left_nA.shape[0]:
            gradient += torch.mm(left_nA.t(), right_nB)
        elif gradient.dtype == left_nA.dtype:
            torch.mm(left_nA.t(), right_nB, out=gradient)
        else:
            gradient.copy_(torch.mm(left_nA.t(), right_nB))


@dataclass
class Plan:
    """The groups of a call; ``routed`` holds only experts with at least one token.

    Attributes:
        offsets: E + 1 row numbers of the sorted routed slots.
        order_N: int32, the flat slot t*K + k of each sorted row.
        closed_T: float32 1 - g for mix="convex", else None: the factor of the routed and shared parts.
        experts_used: the expert of each group in ``routed``.
    """

    offsets: list[int]
    order_N: Tensor
    closed_T: Tensor | None
    routed: list[Group] = field(default_factory=list)
    experts_used: list[int] = field(default_factory=list)
    personal: Group | None = None
    shared: Group | None = None


def make_plan(
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2IH: Tensor | Quantized,
    down_EHI: Tensor | Quantized,
    personal: tuple[Tensor, Tensor] | None,
    gate_T: Tensor | None,
    shared: tuple[Tensor, Tensor] | None,
    shared_gate_T: Tensor | None,
    mix: str,
) -> Plan:
    tokens, top_k = ids_TK.shape
    offsets_E1, order_N = ops.kernels.sort_rows(ids_TK, gate_up_E2IH.shape[0])
    offsets = offsets_E1.tolist()
    tokens_N = order_N.div(top_k, rounding_mode="floor") if top_k else order_N
    closed_T = 1 - gate_T.float() if mix == "convex" and gate_T is not None else None
    scale_TK = weights_TK.float()
    if closed_T is not None:
        scale_TK = scale_TK * closed_T[:, None]
    scale_N = scale_TK.reshape(-1)[order_N]
    plan = Plan(offsets, order_N, closed_T)
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start < end:
            plan.routed.append(Group(gate_up_E2IH[e], down_EHI[e], tokens_N[start:end], scale_N[start:end]))
            plan.experts_used.append(e)
    everyone_T = torch.arange(tokens, dtype=torch.int32)
    if shared is not None:
        scale_T = torch.ones(tokens) if shared_gate_T is None else shared_gate_T.float()
        scale_T = scale_T if closed_T is None else scale_T * closed_T
        plan.shared = Group(*shared, everyone_T, scale_T.contiguous(), everyone=True)
    if personal is not None and gate_T is not None:
        plan.personal = Group(*personal, everyone_T, gate_T.float().contiguous(), everyone=True)
    return plan


def attach_preacts(plan: Plan, preact_N2I: Tensor, personal_T2I: Tensor, shared_T2I: Tensor) -> None:
    """Give each group its slice of the kept pre-activations; tensors with zero elements mean that none are
    kept.
    """
    if preact_N2I.numel():
        for e, group in zip(plan.experts_used, plan.routed):
            group.preact_n2I = preact_N2I[plan.offsets[e] : plan.offsets[e + 1]]
    if plan.personal is not None and personal_T2I.numel():
        plan.personal.preact_n2I = personal_T2I
    if plan.shared is not None and shared_T2I.numel():
        plan.shared.preact_n2I = shared_T2I
