"""The trained part of a grafted layer: the client's expert and gate, in full or low-rank.

Letters: H hidden, E routed experts, I expert width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flex.quantized import compute_dtype
from flex_kernels import Experts, Personal
from flex_kernels.modules import PersonalExpert
from flex_kernels.quantize import Quantized

# Elements of a weight that are widened at a time.
PIECE = 1 << 19


class PersonalCopy(PersonalExpert):
    """A personal expert trained in full: starts as a copy of routed expert ``expert``.

    Args:
        experts: gate_up [E, 2I, H] and down [E, H, I]; of quantised ones the decoded weights are copied.
        expert: which one to copy; kept in the buffer ``expert``, an int64 scalar.
        gate_weight: [H], the gate's start: that expert's router row.
        dtype: of the two matrices; None keeps the experts' (``gate_weight``'s, where they are quantised). The
            gate is always float32.
    """

    expert: Tensor

    def __init__(self, experts: Experts, expert: int, gate_weight: Tensor, dtype: torch.dtype | None = None):
        dtype = dtype or compute_dtype(experts, gate_weight)
        super().__init__(*experts.expert(expert, dtype), gate_weight, dtype)
        self.register_buffer("expert", torch.tensor(expert, device=experts.gate_up.device))

    def record_over(self, experts: Experts) -> Personal:
        """The layer's argument; ``experts`` is not read, a full copy stands alone."""
        return self.record()

    @torch.no_grad()
    def restart(
        self, experts: Experts, expert: int, gate_weight: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Become a fresh copy of ``expert`` in the parameters that exist; ``generator`` is not used."""
        gate_up, down = experts.expert(expert)
        self.gate_up.copy_(gate_up)
        self.down.copy_(down)
        self.gate_weight.copy_(gate_weight)
        self.gate_bias.zero_()
        self.expert.fill_(expert)


class AdaptedWeight(torch.autograd.Function):
    """frozen + scale out @ in in ``frozen``'s dtype, summed in float32 and rounded once.

    Args:
        frozen_AB: [A, B], not differentiated. out_AR: [A, R]. in_RB: [R, B].
    """

    @staticmethod
    def forward(ctx: Any, frozen_AB: Tensor, out_AR: Tensor, in_RB: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(out_AR, in_RB)
        ctx.scale = scale
        adapted_AB = torch.empty_like(frozen_AB)
        in_RB = in_RB.float()
        for rows in row_pieces(frozen_AB):
            sum_aB = torch.addmm(frozen_AB[rows].float(), out_AR[rows].float(), in_RB, alpha=scale)
            adapted_AB[rows] = sum_aB
        return adapted_AB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AB: Tensor) -> tuple[Tensor | None, ...]:
        out_AR, in_RB = ctx.saved_tensors
        wide_RB = in_RB.float()
        dout_AR, din_RB = torch.empty_like(out_AR), torch.zeros_like(wide_RB)
        for rows in row_pieces(grad_AB):
            grad_aB = grad_AB[rows].float()
            dout_AR[rows] = (grad_aB @ wide_RB.t()).mul_(ctx.scale)
            din_RB.addmm_(out_AR[rows].float().t(), grad_aB, alpha=ctx.scale)
        return None, dout_AR, din_RB.to(in_RB.dtype), None


def row_pieces(t_AB: Tensor) -> Iterator[slice]:
    """Rows of which a float32 copy stays in the cache; all of them on a GPU, which pays by the launch."""
    step = max(1, PIECE // max(1, t_AB.shape[1])) if t_AB.device.type == "cpu" else max(1, t_AB.shape[0])
    return (slice(start, start + step) for start in range(0, t_AB.shape[0], step))


def adapted_weight(frozen_AB: Tensor, out_AR: Tensor, in_RB: Tensor, scale: float) -> Tensor:
    """:class:`AdaptedWeight`, or an expression that torch.compile sees through."""
    if torch.compiler.is_compiling():
        return (frozen_AB + scale * (out_AR @ in_RB)).to(frozen_AB.dtype)
    return AdaptedWeight.apply(frozen_AB, out_AR, in_RB, scale)


class PersonalLoRA(nn.Module):
    """A personal expert trained through LoRA (arXiv 2106.09685): W = W_expert + (alpha / R) out @ in.

    The frozen W_expert is a view of the layer's own routed expert, never a copy. The sum is formed at each
    call, 3 I H elements for one expert; autograd holds it between forward and backward.

    Where the routed experts are quantised, W_expert is decoded once, when the expert is chosen or loaded, and
    kept: 3 I H elements in ``gate_weight``'s dtype a layer, in no state dict, neither trained nor sent.

    Args:
        experts, expert, gate_weight, dtype: as for :class:`PersonalCopy`; ``dtype`` of the low-rank matrices.
        rank: R, at least 1.
        alpha: the usual LoRA numerator.
        generator: draws the ``in`` matrices (uniform, Kaiming, as in LoRA); ``out`` starts at zero.
    """

    expert: Tensor
    frozen_gate_up: Tensor | None
    frozen_down: Tensor | None

    def __init__(
        self,
        experts: Experts,
        expert: int,
        gate_weight: Tensor,
        dtype: torch.dtype | None = None,
        rank: int = 16,
        alpha: float = 16.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        _, rows, hidden = experts.gate_up.shape
        self.frozen_dtype = compute_dtype(experts, gate_weight)
        device, dtype = experts.gate_up.device, dtype or self.frozen_dtype
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        self.gate_up_in = empty(rank, hidden)
        self.gate_up_out = empty(rows, rank)
        self.down_in = empty(rank, rows // 2)
        self.down_out = empty(hidden, rank)
        self.gate_weight = nn.Parameter(torch.empty(hidden, dtype=torch.float32, device=device))
        self.gate_bias = nn.Parameter(torch.empty((), dtype=torch.float32, device=device))
        self.register_buffer("expert", torch.tensor(expert, device=device))
        self.register_buffer("frozen_gate_up", None, persistent=False)
        self.register_buffer("frozen_down", None, persistent=False)
        # A Python copy of the buffer, so that forward needs no read back from the device.
        self.expert_index = expert
        self.decoded_index: int | None = None
        self.register_load_state_dict_post_hook(lambda module, keys: module.follow_buffer())
        self.restart(experts, expert, gate_weight, generator)

    def follow_buffer(self) -> None:
        """Take the expert's index from the buffer, after the buffer was loaded."""
        self.expert_index = int(self.expert)

    @torch.no_grad()
    def restart(
        self, experts: Experts, expert: int, gate_weight: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Become ``expert`` itself (``out`` zero, ``in`` drawn anew) in the parameters that exist."""
        for matrix in (self.gate_up_in, self.down_in):
            bound = matrix.shape[1] ** -0.5
            # Drawn on the CPU in float32: the same seed gives the same start on every device and dtype.
            drawn = torch.rand(matrix.shape, generator=generator) * (2 * bound) - bound
            matrix.copy_(drawn)
        self.gate_up_out.zero_()
        self.down_out.zero_()
        self.gate_weight.copy_(gate_weight)
        self.gate_bias.zero_()
        self.expert.fill_(expert)
        self.expert_index = expert
        self.frozen(experts)

    def frozen(self, experts: Experts) -> tuple[Tensor, Tensor]:
        """(gate_up [2I, H], down [H, I]) of the adapted expert: views, or the decoded weights kept here."""
        if not isinstance(experts.gate_up, Quantized):
            return experts.expert(self.expert_index)
        if self.decoded_index != self.expert_index or self.frozen_gate_up is None or self.frozen_down is None:
            with torch.no_grad():
                decoded = experts.expert(self.expert_index, self.frozen_dtype)
                self.frozen_gate_up, self.frozen_down = decoded
            self.decoded_index = self.expert_index
        return self.frozen_gate_up, self.frozen_down

    def record_over(self, experts: Experts) -> Personal:
        """The layer's argument: the adapted expert, formed over the frozen one of ``experts``."""
        frozen_gate_up, frozen_down = self.frozen(experts)
        # Autograd keeps these two: not in float32 beside bf16 experts.
        gate_up = adapted_weight(frozen_gate_up, self.gate_up_out, self.gate_up_in, self.scale)
        down = adapted_weight(frozen_down, self.down_out, self.down_in, self.scale)
        return Personal(gate_up, down, self.gate_weight, self.gate_bias)
