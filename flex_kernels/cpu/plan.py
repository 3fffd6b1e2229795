"""What one call must compute, as a list of groups of rows: y[tokens[n]] += scale[n] * E(x[tokens[n]]).

Routed, personal and shared experts differ only in which tokens they see and with what scale, so every engine
below this file knows groups and their blocks alone.

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
class Block:
    """Experts stored together, and their rows one after another: all routed ones, or a single expert that
    every token passes through (E = 1).

    Attributes:
        gate_up_E2IH, down_EHI: the weights, as stored.
        tokens_N: int32 rows of x, ascending within an expert.
        scale_N: float32 factor of each row in y.
        everyone: ``tokens_N`` counts up from zero: rows need no gathering.
        preact_N2I: where pre-activations are kept, or None.
        dscale_N: float32, made by the caller and filled by the backward pass with <dy, E(x)> of each row.
        dgate_up_E2IH, ddown_EHI: where weight gradients go, or None when not asked for.
    """

    gate_up_E2IH: Tensor | Quantized
    down_EHI: Tensor | Quantized
    tokens_N: Tensor
    scale_N: Tensor
    everyone: bool = False
    preact_N2I: Tensor | None = None
    dscale_N: Tensor = field(default_factory=lambda: torch.empty(0))
    dgate_up_E2IH: Tensor | None = None
    ddown_EHI: Tensor | None = None

    @property
    def width(self) -> int:
        return self.down_EHI.shape[2]

    @property
    def trained(self) -> bool:
        return self.dgate_up_E2IH is not None or self.ddown_EHI is not None

    def group(self) -> Group:
        """The only expert of a block of one, with all rows."""
        return Group(self, 0, 0, self.tokens_N.shape[0], self.width)


@dataclass(slots=True)
class Group:
    """Rows [first, first + rows) of a block, which one expert serves. Its tensors are views made when asked
    for: with a hundred experts they take longer than a kernel.
    """

    block: Block
    expert: int
    first: int
    rows: int
    width: int

    def of_rows(self, t: Tensor) -> Tensor:
        """Its rows of a tensor [N, ...]."""
        return t[self.first : self.first + self.rows]

    @property
    def gate_up_2IH(self) -> Tensor | Quantized:
        return self.block.gate_up_E2IH[self.expert]

    @property
    def down_HI(self) -> Tensor | Quantized:
        return self.block.down_EHI[self.expert]

    @property
    def tokens_n(self) -> Tensor:
        return self.of_rows(self.block.tokens_N)

    @property
    def scale_n(self) -> Tensor:
        return self.of_rows(self.block.scale_N)

    @property
    def dscale_n(self) -> Tensor:
        return self.of_rows(self.block.dscale_N)

    @property
    def preact_n2I(self) -> Tensor | None:
        return None if self.block.preact_N2I is None else self.of_rows(self.block.preact_N2I)

    @property
    def dgate_up_2IH(self) -> Tensor | None:
        stack = self.block.dgate_up_E2IH
        return None if stack is None else stack[self.expert]

    @property
    def ddown_HI(self) -> Tensor | None:
        stack = self.block.ddown_EHI
        return None if stack is None else stack[self.expert]

    def rows_of(self, source_TH: Tensor, rows: slice) -> Tensor:
        """The rows of ``source_TH`` that rows [start, stop) of this group stand for."""
        if self.block.everyone:
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
    """The blocks of a call.

    Attributes:
        offsets: E + 1 row numbers of the sorted routed slots.
        order_N: int32, the flat slot t*K + k of each sorted row.
        closed_T: float32 1 - g for mix="convex", else None: the factor of the routed and shared parts.
        routed, personal, shared: the blocks; None without such an expert.
    """

    offsets: list[int]
    order_N: Tensor
    closed_T: Tensor | None
    routed: Block
    personal: Block | None = None
    shared: Block | None = None

    def routed_groups(self) -> list[Group]:
        """The routed experts with at least one token."""
        rows, width = enumerate(itertools.pairwise(self.offsets)), self.routed.width
        return [Group(self.routed, e, start, end - start, width) for e, (start, end) in rows if start < end]


def make_plan(
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2IH: Tensor | Quantized,
    down_EHI: Tensor | Quantized,
    personal: tuple[Tensor | Quantized, Tensor | Quantized] | None,
    gate_T: Tensor | None,
    shared: tuple[Tensor | Quantized, Tensor | Quantized] | None,
    shared_gate_T: Tensor | None,
    mix: str,
) -> Plan:
    closed_T = 1 - gate_T.float() if mix == "convex" and gate_T is not None else None
    offsets, order_N, tokens_N, scale_N = ops.routing.sort_rows(
        ids_TK, weights_TK.float().contiguous(), closed_T, gate_up_E2IH.shape[0]
    )
    routed = Block(gate_up_E2IH, down_EHI, tokens_N, scale_N)
    plan = Plan(offsets, order_N, closed_T, routed)
    tokens = ids_TK.shape[0]
    everyone_T = torch.arange(tokens, dtype=torch.int32)

    def dense(weights: tuple[Tensor | Quantized, Tensor | Quantized], scale_T: Tensor) -> Block:
        gate_up_2IH, down_HI = weights
        return Block(gate_up_2IH[None], down_HI[None], everyone_T, scale_T.contiguous(), everyone=True)

    if shared is not None:
        scale_T = torch.ones(tokens) if shared_gate_T is None else shared_gate_T.float()
        plan.shared = dense(shared, scale_T if closed_T is None else scale_T * closed_T)
    if personal is not None and gate_T is not None:
        plan.personal = dense(personal, gate_T.float())
    return plan


def attach_preacts(plan: Plan, preact_N2I: Tensor, personal_T2I: Tensor, shared_T2I: Tensor) -> None:
    """Give each block its kept pre-activations; tensors with zero elements mean that none are kept."""
    blocks = (plan.routed, plan.personal, plan.shared)
    for block, kept in zip(blocks, (preact_N2I, personal_T2I, shared_T2I)):
        if block is not None and kept.numel():
            block.preact_N2I = kept
