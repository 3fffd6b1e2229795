"""Grafting: every MoE block of a pretrained model gets the fused layer and a personal expert."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flex.block import GraftedBlock, grafted_blocks, pass_checkpointing_on
from flex.hf_quantizer import refuse_save_pretrained
from flex.importance import Importance, check_importance
from flex.models import find_blocks
from flex.personal import PersonalCopy, PersonalLoRA
from flex.quantized import (
    check_can_become,
    check_kind,
    compute_dtype,
    expert_bytes,
    frozen_weights,
    kind_of,
    quantize_experts,
)
from flex.select import Batch, Selection, select_experts
from flex.shared_experts import (
    check_shared_can_become,
    held_bytes,
    quantize_shared,
    shared_kind_of,
    shared_modules,
)
from flex_kernels.check import DTYPES, check_option
from flex_kernels.dispatch import resolve_backend
from flex_kernels.quantize import Kind
from flex_kernels.types import Mix, Save

PersonalKind = Literal["full", "lora"]


@dataclass(frozen=True)
class GraftReport:
    """What :func:`graft` did.

    Attributes:
        start: layer name -> the expert its personal one began as; None without personal experts.
        selection: the errors behind the choice; None when ``start`` was given.
        mix, personal: as asked for.
        trainable: number of parameters that will be trained in the whole model, LoRA adapters included.
        frozen: number of weights that will not, quantised ones included.
        experts: how the frozen routed experts are held: "int8", "nf4", or None in the model's own dtype.
        expert_bytes_before, expert_bytes: what they held before and hold now.
        shared_experts, shared_expert_bytes_before, shared_expert_bytes: likewise of the shared experts.
    """

    start: dict[str, int | None]
    selection: Selection | None
    mix: Mix
    personal: PersonalKind | None
    trainable: int
    frozen: int
    experts: Kind | None
    expert_bytes_before: int
    expert_bytes: int
    shared_experts: Kind | None
    shared_expert_bytes_before: int
    shared_expert_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "start": dict(self.start),
            "selection": None if self.selection is None else self.selection.to_dict(),
            "mix": self.mix,
            "personal": self.personal,
            "trainable": self.trainable,
            "frozen": self.frozen,
            "experts": self.experts,
            "expert_bytes_before": self.expert_bytes_before,
            "expert_bytes": self.expert_bytes,
            "shared_experts": self.shared_experts,
            "shared_expert_bytes_before": self.shared_expert_bytes_before,
            "shared_expert_bytes": self.shared_expert_bytes,
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows of strings, the header first."""
        if self.selection is not None:
            return self.selection.table()
        rows = [(name, "none" if expert is None else str(expert)) for name, expert in self.start.items()]
        return [("layer", "expert"), *rows]


def graft(
    model: nn.Module,
    calibration: Iterable[Batch] | None = None,
    *,
    mix: Mix = "add",
    save: Save = "auto",
    backend: str = "auto",
    personal: PersonalKind | None = "full",
    rank: int = 16,
    alpha: float = 16.0,
    start: Sequence[int] | None = None,
    experts: Kind | None = None,
    shared_experts: Kind | None = None,
    importance: Importance | None = None,
    personal_dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> GraftReport:
    """Put the fused FLEx layer in every MoE block of a Hugging Face model, in place, and freeze the rest.

    The pretrained weights are neither copied nor renamed (``experts`` and ``shared_experts`` may quantise
    some). LoRA adapters that :func:`flex.add_lora` put in before stay trainable. With its gates shut the
    grafted model computes what it did before (in bf16 and fp16 up to the router's rounding: the fused layer
    scores experts in float32).

    Args:
        model: of a supported architecture (``flex.models.ADAPTERS``).
        calibration: batches of the client's tokens for :func:`flex.select_experts`; or give ``start``.
            The experts are chosen before they are quantised: the question is which of them reproduces the
            pretrained layer, and rounding should not answer it. A model whose experts were loaded quantised
            has no others to choose by.
        mix, backend: of the layer, see :func:`flex_kernels.flex_moe`.
        save: likewise; "auto" also keeps pre-activations where gradient checkpointing runs the layer again,
            so that backward need not compute them once more.
        personal: "full" trains a whole copy of the expert, "lora" low-rank changes to it; None grafts the
            fused layer alone.
        rank, alpha: of the low-rank matrices with ``personal="lora"``.
        start: the expert to start from in every MoE layer, in order; skips selection.
        experts: "int8" or "nf4" quantises the frozen routed experts in place, layer by layer (see
            :mod:`flex_kernels.quantize`); personal experts then begin as the decoded expert. None leaves them
            as they are. :func:`flex.load` quantises while it loads, so that the model never has to fit first.
        shared_experts: likewise of the shared experts of an architecture that has them, beside quantised
            routed ones. Every token passes through them: their rounding weighs more, and "int8" loses next to
            nothing.
        importance: of :func:`flex.column_importance`, for ``experts="nf4"``: rounding spares the columns that
            count. None counts all alike.
        personal_dtype: of the personal experts' matrices; None keeps the model's. float32 is what an
            optimiser wants beside a bf16 model. Gates are float32 always.
        generator: draws the low-rank start.

    Returns:
        A :class:`GraftReport`: which expert each layer took, and its error.

    Raises:
        Unsupported: the architecture or a setting of it; nothing has been changed.
        TypeError, ValueError: an argument, or the calibration data; nothing has been changed.
        RuntimeError: the backend asked for cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a loaded Hugging Face model, got {type(model).__name__}")
    if any(isinstance(module, GraftedBlock) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is already grafted: "
            "flex.personalize(model, selection) restarts its personal experts"
        )
    check_option("mix", mix, ("add", "convex"))
    check_option("save", save, ("auto", "recompute", "preact"))
    if personal is not None:
        check_option("personal", personal, ("full", "lora"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank={rank!r} must be an integer of at least 1")
    if not isinstance(alpha, float | int) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha!r} must be a number above 0, and finite")
    if personal_dtype is not None and personal_dtype not in DTYPES:
        raise TypeError(f"personal_dtype={personal_dtype!r} is not one of {', '.join(map(str, DTYPES))}")
    check_kind("experts", experts)
    check_kind("shared_experts", shared_experts)
    check_one_source(calibration, start, personal)

    blocks = find_blocks(model)
    layers = {name: adapter.experts(block) for name, (block, adapter) in blocks.items()}
    for (block, adapter), layer in zip(blocks.values(), layers.values()):
        resolve_backend(backend, layer.gate_up.device, compute_dtype(layer, adapter.router(block).weight))
    held = kind_of(layers.values())
    check_can_become(experts, held, layers)
    check_importance(importance, None if experts == held else experts, layers)
    counts = {name: layer.count for name, layer in layers.items()}
    shared = shared_modules(blocks)
    shared_held = shared_kind_of(shared.values())
    check_shared_can_become(shared_experts, shared_held, experts or held, shared)
    bytes_before, shared_bytes_before = expert_bytes(layers.values()), held_bytes(shared.values())
    # Float weights are let go layer by layer below: nothing here may hold on to them.
    del layers, layer, shared
    selection = None if calibration is None else select_experts(model, calibration, backend)
    chosen = [None] * len(blocks) if personal is None else resolve(selection or start, counts)

    for name, parameter in model.named_parameters():
        if not any(part.startswith("lora_") for part in name.split(".")):
            parameter.requires_grad_(False)
    for (name, (block, adapter)), expert in zip(blocks.items(), chosen):
        if experts is not None and experts != held:
            of_columns = None if importance is None else importance[name]
            quantize_experts(adapter.part(block, "experts"), experts, of_columns)
        if shared_experts is not None and shared_experts != shared_held:
            quantize_shared(block, adapter.shared or "", shared_experts)
        grafted = GraftedBlock(block, adapter, mix, save, backend)
        if expert is not None:
            frozen, row = adapter.experts(grafted), adapter.router(grafted).weight[expert]
            if personal == "full":
                grafted.personal = PersonalCopy(frozen, expert, row, personal_dtype)
            else:
                grafted.personal = PersonalLoRA(frozen, expert, row, personal_dtype, rank, alpha, generator)
        model.set_submodule(name, grafted)
    pass_checkpointing_on(model)
    if experts is not None or shared_experts is not None:
        refuse_save_pretrained(model, experts or held)  # type: ignore[arg-type]
    return GraftReport(
        start=dict(zip(blocks, chosen)),
        selection=selection,
        mix=mix,
        personal=personal,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=frozen_weights(model),
        experts=experts or held,
        expert_bytes_before=bytes_before,
        expert_bytes=expert_bytes(adapter.experts(block) for block, adapter in blocks.values()),
        shared_experts=shared_experts or shared_held,
        shared_expert_bytes_before=shared_bytes_before,
        shared_expert_bytes=held_bytes(shared_modules(blocks).values()),
    )


def personalize(
    model: nn.Module, selection: Selection | Sequence[int], generator: torch.Generator | None = None
) -> None:
    """Restart every personal expert and gate of a grafted model from the chosen experts, in place.

    This is how one model serves many simulated clients: no trained tensor is made or moved.

    Args:
        selection: of :func:`flex.select_experts`, or the expert of every MoE layer in order.
        generator: draws the low-rank start of ``personal="lora"``.

    Raises:
        ValueError, TypeError: the model is not grafted with personal experts, or the choice does not fit its
            layers.
    """
    blocks = grafted_blocks(model)
    bare = next((name for name, block in blocks.items() if block.personal is None), None)
    if bare is not None:
        raise ValueError(
            f"layer {bare} has no personal expert: graft the model with personal='full' or 'lora'"
        )
    counts = {name: block.adapter.experts(block).count for name, block in blocks.items()}
    for block, expert in zip(blocks.values(), resolve(selection, counts)):
        assert block.personal is not None
        row = block.adapter.router(block).weight[expert]
        block.personal.restart(block.adapter.experts(block), expert, row, generator)


def check_one_source(calibration: Any, start: Any, personal: str | None) -> None:
    given = [n for n, v in (("calibration", calibration), ("start", start)) if v is not None]
    if personal is None and given:
        raise ValueError(f"personal=None makes no personal experts, so {given[0]} has no use: leave it out")
    if personal is not None and len(given) != 1:
        raise ValueError(
            f"give one of calibration (batches of token ids) and start (an index per MoE layer), got "
            f"{'both' if given else 'neither'}; personal=None grafts without personal experts"
        )


def resolve(choice: Any, counts: Mapping[str, int]) -> list[int]:
    """The expert of every layer, checked against how many each layer has."""
    if isinstance(choice, Selection):
        names = [layer.layer.replace("_orig_mod.", "") for layer in choice.layers]
        if names != list(counts):
            raise ValueError(f"the selection is of the layers {names}, the model has {list(counts)}")
        choice = choice.experts
    if not isinstance(choice, Sequence) or isinstance(choice, str):
        raise TypeError(f"start must be a list of {len(counts)} indices, got {type(choice).__name__}")
    if len(choice) != len(counts):
        raise ValueError(f"start has {len(choice)} indices, the model has {len(counts)} MoE layers")
    for (name, count), expert in zip(counts.items(), choice):
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < count:
            raise ValueError(
                f"start: {expert!r} is not an expert of layer {name}, which has 0 to {count - 1}"
            )
    return list(choice)
