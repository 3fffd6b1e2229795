"""Frozen routed experts in 8 or 4 bits inside a Hugging Face model.

The experts module keeps its place and its names; ``gate_up_proj`` and ``down_proj`` become
:class:`flex_kernels.modules.QuantizedWeight`, whose codes and scales are buffers of the state dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flex.memory import give_back_freed
from flex_kernels import Experts
from flex_kernels.modules import QuantizedWeight
from flex_kernels.quantize import KINDS, Kind, Quantized, quantize

WEIGHTS = ("gate_up_proj", "down_proj")


def check_kind(name: str, kind: object) -> None:
    """Raise ValueError unless ``kind``, given as ``name``, is None or a way to quantise."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"{name}={kind!r} is not one of None, {', '.join(map(repr, KINDS))}")


def kind_of(experts: Iterable[Experts]) -> Kind | None:
    """How these layers hold their experts; None: as plain tensors.

    Raises:
        ValueError: not all in one way.
    """
    return one_kind("routed", (weight for layer in experts for weight in (layer.gate_up, layer.down)))


def one_kind(which: str, weights: Iterable[object]) -> Kind | None:
    """How these weights of the ``which`` experts are held; None: not quantised.

    Raises:
        ValueError: not all in one way.
    """
    kinds = {weight.kind if isinstance(weight, Quantized) else None for weight in weights}
    if len(kinds) > 1:
        named = ", ".join(sorted("plain" if kind is None else kind for kind in kinds))
        raise ValueError(
            f"the {which} experts are held in different ways ({named}): quantise all of them alike"
        )
    return kinds.pop() if kinds else None


def quantize_experts(module: nn.Module, kind: Kind, importance: tuple[Tensor, Tensor] | None = None) -> None:
    """Quantise an experts module in place, one weight after the other; each float weight is let go.

    ``importance``: of columns, as :meth:`flex_kernels.Experts.quantize` takes it.
    """
    for name, of_columns in zip(WEIGHTS, importance or (None, None), strict=True):
        weight = quantize(module.get_parameter(name), kind, of_columns)
        hold(module, name, QuantizedWeight(weight))
    give_back_freed()


def hold(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Put ``weight`` in the place of the parameter ``name``."""
    module._parameters.pop(name, None)
    setattr(module, name, weight)
    # transformers would otherwise draw new values for what it takes to be a missing parameter.
    for held in (module, weight, weight.codes, weight.scales):
        held._is_hf_initialized = True  # type: ignore[union-attr]


def check_can_become(kind: Kind | None, held: Kind | None, layers: Mapping[str, Experts]) -> None:
    """Raise ValueError if ``layers``, held as ``held``, cannot be quantised to ``kind`` (None: left alone).

    They are quantised in another way, or a weight is not finite and has nothing to be rounded to.
    """
    if kind is None or kind == held:
        return
    if held is not None:
        raise ValueError(f"experts={kind!r}: the model's routed experts are quantised already, to {held!r}")
    for name, experts in layers.items():
        for index in range(experts.count):
            for part, weight in zip(("gate_up", "down"), experts.expert(index)):
                check_finite(weight, f"{part} of expert {index} of layer {name}")


def check_finite(weight: Tensor, what: str) -> None:
    """Raise ValueError if there is nothing that a value of ``weight`` could be rounded to."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"{what} has values that are not finite")


def expert_bytes(experts: Iterable[Experts]) -> int:
    """Bytes that the routed experts of these layers hold."""
    return sum(weight.nbytes for layer in experts for weight in (layer.gate_up, layer.down))


def frozen_weights(model: nn.Module) -> int:
    """Number of weights that are not trained; a quantised weight counts as one, whatever its codes hold."""
    plain = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    held = (m.record() for m in model.modules() if isinstance(m, QuantizedWeight))
    return plain + sum(weight.shape.numel() for weight in held)


def compute_dtype(experts: Experts, beside: Tensor) -> torch.dtype:
    """The dtype in which the layer computes: the experts' own, or that of a plain tensor beside codes."""
    weight: Any = experts.gate_up
    return beside.dtype if isinstance(weight, Quantized) else weight.dtype
