"""Frozen shared experts in 8 or 4 bits inside a Hugging Face model.

The module that takes the shared expert's place has its name; ``gate_proj`` and ``up_proj`` become one
``gate_up_proj``, stacked as the layer wants them.

Letters: T tokens, H hidden, Is shared width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flex.memory import give_back_freed
from flex.quantized import WEIGHTS, check_finite, hold, one_kind
from flex_kernels import Experts, Routed, Shared, flex_moe
from flex_kernels.modules import QuantizedWeight
from flex_kernels.quantize import Kind, Quantized, empty, quantize

# Of a plain shared expert: the Linears without bias that flex.models.base.check_shared asks for.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class QuantizedMLP(nn.Module):
    """down(silu(gate x) * up x) over codes: computes alone, and is read by the fused layer.

    Args:
        gate_up: [2 Is, H], gate rows first. down: [H, Is].
    """

    gate_up_proj: QuantizedWeight
    down_proj: QuantizedWeight

    def __init__(self, gate_up: Quantized, down: Quantized):
        super().__init__()
        for name, weight in zip(WEIGHTS, (gate_up, down), strict=True):
            hold(self, name, QuantizedWeight(weight))

    @classmethod
    def room_for(cls, mlp: nn.Module, kind: Kind) -> QuantizedMLP:
        """Codes without memory, of the sizes of a plain shared expert's, for a loader to fill."""
        gate, up, down = (getattr(mlp, name).weight for name in PROJECTIONS)
        gate_up = len(gate) + len(up), gate.shape[1]
        return cls(empty(gate_up, kind, "meta"), empty(down.shape, kind, "meta"))

    def record(self, gate_weight: Tensor | None) -> Shared:
        return Shared(self.gate_up_proj.record(), self.down_proj.record(), gate_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] for [..., H], without the sigmoid gate: as one expert that every token chose."""
        experts = Experts(self.gate_up_proj.record()[None], self.down_proj.record()[None])
        rows = x.numel() // x.shape[-1]
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=x.device)
        return flex_moe(x, Routed(ids, torch.ones(rows, 1, device=x.device)), experts)


def shared_modules(blocks: Mapping[str, tuple[nn.Module, Any]]) -> dict[str, nn.Module]:
    """Of each block, name -> (block, adapter), the module of its shared expert, where it has one."""
    return {n: a.part(b, a.shared) for n, (b, a) in blocks.items() if a.has_shared(b)}


def shared_kind_of(modules: Iterable[nn.Module]) -> Kind | None:
    """How these shared experts are held; None: as plain tensors.

    Raises:
        ValueError: not all in one way.
    """
    records = (m.record(None) if isinstance(m, QuantizedMLP) else None for m in modules)
    held = (None if record is None else (record.gate_up, record.down) for record in records)
    return one_kind("shared", (w for weights in held for w in weights or (None,)))


def quantize_shared(block: nn.Module, name: str, kind: Kind) -> None:
    """Quantise the shared expert ``name`` of an MoE block in place, one weight after the other."""
    mlp = block.get_submodule(name)
    for projection in PROJECTIONS:
        linear = mlp.get_submodule(projection)
        hold(linear, "weight", QuantizedWeight(quantize(linear.get_parameter("weight"), kind)))
    stack_projections(block, name)
    give_back_freed()


def stack_projections(block: nn.Module, name: str) -> None:
    """Make a :class:`QuantizedMLP` of a shared expert whose projections hold quantised weights."""
    mlp = block.get_submodule(name)
    gate, up, down = (getattr(mlp, projection).weight.record() for projection in PROJECTIONS)
    codes, scales = torch.cat((gate.codes, up.codes)), torch.cat((gate.scales, up.scales))
    setattr(block, name, QuantizedMLP(Quantized(codes, scales, gate.columns), down))


def check_shared_can_become(
    kind: Kind | None, held: Kind | None, routed: Kind | None, modules: Mapping[str, nn.Module]
) -> None:
    """Raise ValueError if the shared experts ``modules``, held as ``held``, cannot be quantised to ``kind``.

    Args:
        kind: None leaves them alone.
        routed: how the routed experts will be held; shared ones are quantised beside quantised ones only.
        modules: layer -> its shared expert.
    """
    if kind is None:
        return
    if not modules:
        raise ValueError(f"shared_experts={kind!r}: the model has no shared experts")
    if routed is None:
        raise ValueError(
            f"shared_experts={kind!r} goes with quantised routed experts: give experts='int8' or 'nf4' too"
        )
    if kind == held:
        return
    if held is not None:
        raise ValueError(
            f"shared_experts={kind!r}: the model's shared experts are quantised already, to {held!r}"
        )
    for layer, mlp in modules.items():
        for projection in PROJECTIONS:
            weight = mlp.get_submodule(projection).get_parameter("weight")
            check_finite(weight, f"{projection} of the shared expert of layer {layer}")


def held_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes that these modules hold."""
    return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))
