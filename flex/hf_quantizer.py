"""Quantised experts as a quantiser of transformers: its loader loads, this says what becomes of the
experts' weights.

transformers streams a checkpoint tensor by tensor, in either layout (one tensor an expert as on the Hub, or
one a layer), and hands each finished weight to a quantiser before it asks for the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flex.deferred import Deferred
from flex.importance import Importance, check_importance
from flex.memory import give_back_freed
from flex.models import Adapter, find_blocks
from flex.quantized import WEIGHTS, check_kind, hold
from flex.shared_experts import (
    PROJECTIONS,
    QuantizedMLP,
    check_shared_can_become,
    shared_modules,
    stack_projections,
)
from flex_kernels.modules import QuantizedWeight
from flex_kernels.quantize import Kind, empty, quantize

METHOD = "flex_kernels"


class Unfit(ValueError):
    """A checkpoint's tensor cannot take its place in the model; the message names it."""


@register_quantization_config(METHOD)
class ExpertsConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model whose routed experts are held in ``experts``: "int8" or "nf4".

    Attributes:
        shared_experts: likewise of the shared experts; None, and absent where written: as plain tensors.
        importance: of columns, for the loading alone: no part of a written configuration.
    """

    def __init__(
        self,
        experts: Kind,
        quant_method: str = METHOD,
        importance: Importance | None = None,
        shared_experts: Kind | None = None,
    ):
        check_kind("experts", experts)
        check_kind("shared_experts", shared_experts)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.experts = experts
        self.shared_experts = shared_experts
        self.importance = importance

    def to_dict(self) -> dict[str, Any]:
        written = {"quant_method": self.quant_method, "experts": self.experts}
        return written if self.shared_experts is None else written | {"shared_experts": self.shared_experts}


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """Quantises experts while a checkpoint is read, or makes room for codes that are read as they are.

    Raises:
        TypeError, ValueError: before loading, an importance that does not fit the model, or shared experts
            asked of one that has none.
        Unfit: at the end of loading, a tensor of another shape than the configuration's, or weights that are
            not finite.
    """

    def __init__(self, quantization_config: ExpertsConfig, **options: Any):
        super().__init__(quantization_config, **options)
        self.kind: Kind = quantization_config.experts
        self.shared_kind = quantization_config.shared_experts
        # Taken from the configuration, which the model keeps.
        self.importance, quantization_config.importance = quantization_config.importance, None
        self.shapes: dict[str, torch.Size] = {}
        # Full name of a weight -> what it is quantised to while it is read.
        self.kinds: dict[str, Kind] = {}
        # Full name of a weight -> what to round in its place, later, where the loader was not to read it.
        self.deferred: dict[str, Deferred] = {}
        # The first weight that could not be quantised, and why.
        self.problem = ""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        """The model has no memory yet: note its shapes, put codes where a checkpoint has codes."""
        blocks = find_blocks(model)
        layers = {name: adapter.experts(block) for name, (block, adapter) in blocks.items()}
        check_importance(self.importance, self.kind, layers)
        check_shared_can_become(self.shared_kind, self.shared_kind, self.kind, shared_modules(blocks))
        if self.pre_quantized:
            self.make_room(blocks)
        else:
            self.kinds = {f"{block}.experts.{name}": self.kind for block in blocks for name in WEIGHTS}
            if self.shared_kind is not None:
                self.kinds |= {
                    f"{block}.{adapter.shared}.{projection}.weight": self.shared_kind
                    for block, (_, adapter) in blocks.items()
                    for projection in PROJECTIONS
                }
        self.shapes = {name: t.shape for name, t in model.state_dict().items()}
        return model

    def make_room(self, blocks: Mapping[str, tuple[nn.Module, Adapter]]) -> None:
        """Codes without memory in the place of weights, for the loader to fill."""
        for block, adapter in blocks.values():
            module = adapter.part(block, "experts")
            for name in WEIGHTS:
                shape = module.get_parameter(name).shape
                hold(module, name, QuantizedWeight(empty(shape, self.kind, "meta")))
            if self.shared_kind is not None and adapter.shared is not None:
                mlp = adapter.part(block, adapter.shared)
                setattr(block, adapter.shared, QuantizedMLP.room_for(mlp, self.shared_kind))

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        return param_name in self.kinds

    def importance_of(self, param_name: str) -> Tensor | None:
        if self.importance is None or ".experts." not in param_name:
            return None
        block, _, name = param_name.rpartition(".experts.")
        return self.importance[block][WEIGHTS.index(name)]

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeExperts(self)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        """Shapes are left to the quantiser by transformers. Shared experts are whole only now."""
        if self.problem:
            raise Unfit(self.problem)
        for name, t in model.state_dict().items():
            if name in self.shapes and t.shape != self.shapes[name]:
                raise Unfit(f"{name} is {list(t.shape)}, the configuration wants {list(self.shapes[name])}")
        # Weights that were never read are named by whoever loads.
        missing = self.kinds.keys() & {name for name, _ in model.named_parameters()}
        if self.shared_kind is not None and not self.pre_quantized and not missing:
            for block, adapter in find_blocks(model).values():
                stack_projections(block, adapter.shared or "")
        return model

    def is_serializable(self) -> bool:
        raise ValueError(
            "save_pretrained would take the experts' codes for weights: "
            "flex.save(model, folder) writes a quantised model, flex.load reads it"
        )

    @property
    def is_trainable(self) -> bool:
        """What is trained stands beside the frozen experts."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class QuantizeExperts(ConversionOps):
    """A finished weight [..., R, C] becomes codes and scales, in the model itself; a deferred one, room."""

    def __init__(self, quantizer: ExpertsQuantizer):
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **options: Any,
    ) -> dict[str, list[Tensor]]:
        (value,) = input_dict.values()
        input_dict.clear()
        weight: Tensor | Deferred = value[0] if isinstance(value, list) else value
        home, _, name = full_layer_name.rpartition(".")
        wanted = self.quantizer.shapes[full_layer_name]
        try:
            if weight.shape != wanted:
                raise Unfit(f"the files have {list(weight.shape)}, the configuration wants {list(wanted)}")
            kind = self.quantizer.kinds[full_layer_name]
            if isinstance(weight, Deferred):
                self.quantizer.deferred[full_layer_name] = weight
                codes = empty(weight.shape, kind)
            else:
                codes = quantize(weight, kind, self.quantizer.importance_of(full_layer_name))
            hold(model.get_submodule(home), name, QuantizedWeight(codes))
        except (ValueError, TypeError) as error:
            # Raised once loading ends: transformers would go on, with full-precision weights in its place.
            self.quantizer.problem = self.quantizer.problem or f"{full_layer_name}: {error}"
        del weight, value
        give_back_freed()
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def refuse_save_pretrained(model: nn.Module, kind: Kind) -> None:
    """Let ``save_pretrained`` of a model that was quantised in place end with :func:`flex.save` named."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.hf_quantizer = ExpertsQuantizer(ExpertsConfig(kind))  # type: ignore[assignment]
