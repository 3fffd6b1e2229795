"""LoRA on attention, the shared part of FLEx, through peft; the model keeps its class."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flex.block import moe_blocks
from flex.state import lora_tensors


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Add LoRA adapters (arXiv 2106.09685) to the attention of an MoE model, in place.

    Freezes everything else but personal experts and gates. Works before and after :func:`flex.graft`.

    Args:
        rank: of the adapters.
        alpha: their outputs are scaled by alpha / rank.
        dropout: on their inputs, in training.
        targets: names of Linear modules (``"q_proj"``); None takes the architecture's query, key, value and
            output projections (for DeepSeek those of its latent attention; where other layers mix positions
            as well, their projections too).

    Returns:
        The full names of the adapted modules. Adapter weights are float32; A is drawn from torch's global
        generator, B is zero.

    Raises:
        Unsupported: not a supported architecture.
        ValueError: an argument out of range; a target that is not in the model, or lies inside an MoE block
            (whose fused layer would pass over it); adapters are there already. The model is unchanged.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r} must be an integer of at least 1")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha!r} must be positive")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be at least 0 and below 1")
    if lora_tensors(model):
        raise ValueError(f"{type(model).__name__} has LoRA adapters already")
    blocks = moe_blocks(model)
    if targets is None:
        wanted = {target for _, adapter in blocks.values() for target in adapter.attention}
    else:
        wanted = {targets} if isinstance(targets, str) else set(targets)
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in wanted
    ]
    check_targets(model, names, set() if targets is None else wanted, tuple(blocks))

    trainable = [p for n, p in model.named_parameters() if p.requires_grad and ".personal." in n]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        bias="none",
    )
    inject_adapter_in_model(config, model)
    # peft freezes everything but its own adapters, and gives those the base layer's dtype.
    for parameter in trainable:
        parameter.requires_grad_(True)
    for adapter_weight in lora_tensors(model).values():
        adapter_weight.data = adapter_weight.data.float()
    return tuple(names)


def check_targets(model: nn.Module, names: list[str], wanted: set[str], blocks: tuple[str, ...]) -> None:
    found = {name.rpartition(".")[2] for name in names}
    absent = sorted(wanted - found)
    if absent or not names:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"targets: no Linear module is called {', '.join(absent) or 'any of the defaults'}; "
            f"{type(model).__name__} has {', '.join(linear)}"
        )
    inside = next((n for n in names if n.startswith(tuple(f"{block}." for block in blocks))), None)
    if inside is not None:
        raise ValueError(
            f"targets: {inside} lies inside an MoE block, whose fused layer would pass over the adapter"
        )
