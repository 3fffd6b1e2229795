"""Quantised routed experts as a quantiser of transformers: its loader loads, this says what becomes of the
experts' weights.

transformers streams a checkpoint tensor by tensor, in either layout (one tensor an expert as on the Hub, or
one a layer), and hands each finished weight to a quantiser before it asks for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flex.importance import Importance, check_importance
from flex.memory import give_back_freed
from flex.models import find_blocks
from flex.quantized import WEIGHTS, check_kind, hold
from flex_kernels.modules import QuantizedWeight
from flex_kernels.quantize import Kind, empty, quantize

METHOD = "flex_kernels"


class Unfit(ValueError):
    """A checkpoint's tensor cannot take its place in the model; the message names it."""


@register_quantization_config(METHOD)
class ExpertsConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model whose routed experts are held in ``experts``: "int8" or "nf4".

    Attributes:
        importance: of columns, for the loading alone: no part of a written configuration.
    """

    def __init__(self, experts: Kind, quant_method: str = METHOD, importance: Importance | None = None):
        check_kind(experts)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.experts = experts
        self.importance = importance

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "experts": self.experts}


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """Quantises experts while a checkpoint is read, or makes room for codes that are read as they are.

    Raises:
        TypeError, ValueError: before loading, an importance that does not fit the model.
        Unfit: at the end of loading, a tensor of another shape than the configuration's, or weights that are
            not finite.
    """

    def __init__(self, quantization_config: ExpertsConfig, **options: Any):
        super().__init__(quantization_config, **options)
        self.kind: Kind = quantization_config.experts
        # Taken from the configuration, which the model keeps.
        self.importance, quantization_config.importance = quantization_config.importance, None
        self.shapes: dict[str, torch.Size] = {}
        self.weights: frozenset[str] = frozenset()
        # The first weight that could not be quantised, and why.
        self.problem = ""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        """The model has no memory yet: note its shapes, put codes where a checkpoint has codes."""
        layers = {name: adapter.experts(block) for name, (block, adapter) in find_blocks(model).items()}
        check_importance(self.importance, self.kind, layers)
        self.weights = frozenset(name for name, _, _ in expert_weights(model))
        if self.pre_quantized:
            for _, module, name in list(expert_weights(model)):
                shape = module.get_parameter(name).shape
                hold(module, name, QuantizedWeight(empty(shape, self.kind, "meta")))
        self.shapes = {name: t.shape for name, t in model.state_dict().items()}
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        return param_name in self.weights

    def importance_of(self, param_name: str) -> Tensor | None:
        if self.importance is None:
            return None
        block, _, name = param_name.rpartition(".experts.")
        return self.importance[block][WEIGHTS.index(name)]

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeExperts(self)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        """Shapes are left to the quantiser by transformers."""
        if self.problem:
            raise Unfit(self.problem)
        for name, t in model.state_dict().items():
            if name in self.shapes and t.shape != self.shapes[name]:
                raise Unfit(f"{name} is {list(t.shape)}, the configuration wants {list(self.shapes[name])}")
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
    """A finished experts weight [E, R, C] becomes codes and scales, in the model itself."""

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
        weight: Tensor = value[0] if isinstance(value, list) else value
        home, _, name = full_layer_name.rpartition(".")
        wanted = self.quantizer.shapes[full_layer_name]
        try:
            if weight.shape != wanted:
                raise Unfit(f"the files have {list(weight.shape)}, the configuration wants {list(wanted)}")
            of_columns = self.quantizer.importance_of(full_layer_name)
            codes = quantize(weight, self.quantizer.kind, of_columns)
            hold(model.get_submodule(home), name, QuantizedWeight(codes))
        except (ValueError, TypeError) as error:
            # Raised once loading ends: transformers would go on, with full-precision weights in its place.
            self.quantizer.problem = self.quantizer.problem or f"{full_layer_name}: {error}"
        del weight, value
        give_back_freed()
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def expert_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, experts module, name in it) of every routed experts weight.

    Raises:
        Unsupported: no supported MoE block.
    """
    for block, (module, adapter) in find_blocks(model).items():
        for name in WEIGHTS:
            yield f"{block}.experts.{name}", adapter.part(module, "experts"), name


def refuse_save_pretrained(model: nn.Module, kind: Kind) -> None:
    """Let ``save_pretrained`` of a model that was quantised in place end with :func:`flex.save` named."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.hf_quantizer = ExpertsQuantizer(ExpertsConfig(kind))  # type: ignore[assignment]
