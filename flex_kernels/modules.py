"""The layer as an ``nn.Module``.

Letters: H hidden, E routed experts, I expert width, Ip personal width, Is shared width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flex_kernels.check import check_module
from flex_kernels.layer import flex_moe
from flex_kernels.quantize import Quantized
from flex_kernels.types import Experts, Mix, Personal, Router, Save, Score, Shared


class PersonalExpert(nn.Module):
    """One client's expert and adaptive gate: the part of the layer that is trained and stays with the client.

    Args:
        gate_up: [2 Ip, H], down: [H, Ip]: the expert to start from (copied).
        gate_weight: [H], the gate's start; FLEx takes the copied expert's router row.
        dtype: of the parameters; None keeps that of ``gate_up``.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, gate_weight: Tensor, dtype: torch.dtype | None = None):
        super().__init__()
        dtype = dtype or gate_up.dtype
        self.gate_up = nn.Parameter(gate_up.detach().to(dtype, copy=True))
        self.down = nn.Parameter(down.detach().to(dtype, copy=True))
        self.gate_weight = nn.Parameter(gate_weight.detach().to(torch.float32, copy=True))
        self.gate_bias = nn.Parameter(torch.zeros((), dtype=torch.float32, device=gate_up.device))

    def record(self) -> Personal:
        return Personal(self.gate_up, self.down, self.gate_weight, self.gate_bias)


class QuantizedWeight(nn.Module):
    """A frozen weight in 8 or 4 bits: the buffers ``codes`` and ``scales``, saved and loaded as they are.

    Moving the module to another device moves both; a change of dtype leaves both alone.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Quantized):
        super().__init__()
        self.columns = weight.columns
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)

    def record(self) -> Quantized:
        return Quantized(self.codes, self.scales, self.columns)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        weight = self.record()
        return f"{weight.kind}, {list(weight.shape)}, {weight.nbytes} bytes"


class FlexMoE(nn.Module):
    """A frozen Mixture-of-Experts layer with room for one personal expert.

    Frozen weights are registered as they are, without a copy.

    Args:
        router: its tensors become frozen parameters ``router_weight`` and the buffer ``router_bias``.
        experts: become the frozen parameters ``gate_up`` and ``down``; quantised ones the buffers
            ``gate_up.codes``, ``gate_up.scales``, ``down.codes`` and ``down.scales``.
        shared: optional; becomes ``shared_gate_up``, ``shared_down``, ``shared_gate_weight``, likewise.
        mix, save, backend: as in :func:`flex_kernels.flex_moe`.

    Shapes: forward takes and returns [..., H].

    Raises:
        TypeError, ValueError: an argument does not fit the others.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: Shared | None = None,
        mix: Mix = "add",
        save: Save = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        check_module(router, experts, shared, mix, save, backend)
        self.top_k, self.normalize, self.scale = router.top_k, router.normalize, router.scale
        self.score: Score = router.score
        self.mix: Mix = mix
        self.save: Save = save
        self.backend = backend
        self.router_weight = frozen(router.weight)
        self.router_bias: Tensor | None
        self.register_buffer("router_bias", router.bias)
        self.gate_up, self.down = held(experts.gate_up), held(experts.down)
        self.shared_gate_up = None if shared is None else held(shared.gate_up)
        self.shared_down = None if shared is None else held(shared.down)
        gate_weight = None if shared is None else shared.gate_weight
        self.shared_gate_weight = None if gate_weight is None else frozen(gate_weight)
        self.personal: PersonalExpert | None = None

    def personalize(self, expert: int, dtype: torch.dtype | None = None) -> PersonalExpert:
        """Give the layer a personal expert: a copy of routed expert ``expert``, gated by that expert's router
        row.

        Raises:
            TypeError: ``expert`` is not an integer. IndexError: there is no such expert.
        """
        experts = self.experts()
        if not isinstance(expert, int) or isinstance(expert, bool):
            raise TypeError(f"expert must be an integer from 0 to {experts.count - 1}, got {expert!r}")
        if not 0 <= expert < experts.count:
            raise IndexError(f"expert={expert} is not one of the {experts.count} routed experts (from 0)")
        gate_up, down = experts.expert(expert)
        self.personal = PersonalExpert(gate_up, down, self.router_weight[expert], dtype)
        return self.personal

    def experts(self) -> Experts:
        """The routed experts as the layer takes them; nothing is copied."""
        return Experts(record_of(self.gate_up), record_of(self.down))

    def forward(self, x: Tensor, return_router_logits: bool = False) -> Any:
        """y [..., H]; with ``return_router_logits`` the pair (y, logits [T, E])."""
        shared = None
        if self.shared_gate_up is not None and self.shared_down is not None:
            weights = record_of(self.shared_gate_up), record_of(self.shared_down)
            shared = Shared(*weights, self.shared_gate_weight)
        return flex_moe(
            x,
            Router(self.router_weight, self.top_k, self.normalize, self.score, self.scale, self.router_bias),
            self.experts(),
            None if self.personal is None else self.personal.record(),
            shared,
            self.mix,
            self.save,
            self.backend,
            return_router_logits,
        )


def frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)


def held(weight: Tensor | Quantized) -> nn.Parameter | QuantizedWeight:
    """A frozen weight as something that a module can hold."""
    return QuantizedWeight(weight) if isinstance(weight, Quantized) else frozen(weight)


def record_of(weight: Tensor | QuantizedWeight) -> Tensor | Quantized:
    return weight.record() if isinstance(weight, QuantizedWeight) else weight
