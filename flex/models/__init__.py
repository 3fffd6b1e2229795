"""The architectures that can be grafted: one small adapter each, found by the class of the MoE block."""

from __future__ import annotations

from typing import Any

from torch import nn

from flex.models import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    granitemoe,
    lfm2_moe,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
)
from flex.models.base import Adapter, Unsupported, check_experts

ADAPTERS: tuple[Adapter, ...] = (
    mixtral.ADAPTER,
    qwen2_moe.ADAPTER,
    qwen3_moe.ADAPTER,
    olmoe.ADAPTER,
    deepseek_v2.ADAPTER,
    deepseek_v3.ADAPTER,
    glm4_moe.ADAPTER,
    dots1.ADAPTER,
    ernie4_5_moe.ADAPTER,
    granitemoe.ADAPTER,
    granitemoe.SHARED_ADAPTER,
    flex_olmo.ADAPTER,
    lfm2_moe.ADAPTER,
    qwen3_next.ADAPTER,
)

__all__ = ["ADAPTERS", "Adapter", "Unsupported", "adapter_for", "check_experts", "find_blocks", "packs"]


def supported() -> str:
    return ", ".join(adapter.architecture for adapter in ADAPTERS)


def packs(config: Any) -> bool:
    """Whether examples can lie end to end in one row of a model with this configuration."""
    return all(adapter.packs for adapter in ADAPTERS if adapter.architecture == config.model_type)


def adapter_for(module: nn.Module) -> Adapter:
    """The adapter of an MoE block, by its exact class.

    Raises:
        Unsupported: no adapter knows the class; the message names it and lists the supported architectures.
    """
    for adapter in ADAPTERS:
        if adapter.recognises(module):
            return adapter
    cls = type(module)
    raise Unsupported(
        f"{cls.__module__}.{cls.__qualname__} is not the MoE block of a supported architecture "
        f"({supported()}); docs/add-a-model.md says how to add one"
    )


def find_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    """Every MoE block of ``model`` in order: name -> (block, adapter), each checked.

    Raises:
        Unsupported: the model has no block that an adapter knows, or one with a setting that cannot be
            reproduced; the message names the model's class, or the block and the setting.
    """
    found: dict[str, tuple[nn.Module, Adapter]] = {}
    strange = ""
    for name, module in model.named_modules():
        adapter = next((a for a in ADAPTERS if a.recognises(module)), None)
        if adapter is not None:
            try:
                adapter.check(module)
            except Unsupported as error:
                raise Unsupported(f"{name or type(module).__name__}: {error}") from error
            found[name] = (module, adapter)
        elif not strange and isinstance(getattr(module, "experts", None), nn.Module):
            strange = f" (its block {name} is a {type(module).__name__})"
    if not found:
        raise Unsupported(
            f"{type(model).__name__} has no MoE block of a supported architecture{strange}; "
            f"supported: {supported()}; docs/add-a-model.md says how to add one"
        )
    return found
