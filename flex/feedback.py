"""NF4 with error feedback (GPTQ, arXiv 2210.17323) for the routed experts of a model, layer by layer.

The tokens of all batches go through the model together, once. On reaching a layer its experts are rounded by
what they are multiplied with there, and what leaves the layer is what the rounded ones compute: later layers
make up for earlier ones as well.

Letters: B sequences, S positions, T tokens (padding left out), n of them that chose an expert, H hidden,
I expert width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flex.block import GraftedBlock
from flex.experts_implementation import NAME
from flex.hf_quantizer import refuse_save_pretrained
from flex.memory import give_back_freed
from flex.models import Adapter, find_blocks
from flex.quantized import WEIGHTS, check_can_become, hold, kind_of
from flex.select import Batch, checked_batches, prepare, watch_batches
from flex.watch import body_of
from flex_kernels import Router
from flex_kernels.modules import QuantizedWeight
from flex_kernels.quantize import empty, quantize
from flex_kernels.reference import route


def gptq(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Round the routed experts of a Hugging Face model to "nf4" with error feedback, in place.

    Format, bytes and kernels are those of ``flex.load(..., experts="nf4")``. The model that is left runs on
    the fused layer; :func:`flex.graft` and :func:`flex.save` take it as it is. Second moments are held of one
    expert at a time (8 max(H, I)^2 bytes in float64, and a few copies); activations are those of one forward
    pass over all tokens of ``batches``, of which a few thousand are enough.

    Args:
        model: of a supported architecture with plain experts, not grafted; LoRA adapters stay active.
        batches: token ids as for :func:`flex.select_experts`.

    Raises:
        Unsupported: the architecture or a setting of it; nothing has been changed.
        TypeError, ValueError: the model (grafted, or quantised already) or ``batches``; nothing has been
            changed.
        ValueError: what a layer's experts see is not finite; names the layer. The layers before it have been
            rounded by then: load the model anew.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a loaded Hugging Face model, got {type(model).__name__}")
    if any(isinstance(module, GraftedBlock) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is grafted already: quantise it before flex.graft")
    blocks = find_blocks(model)
    layers = {name: adapter.experts(block) for name, (block, adapter) in blocks.items()}
    held = kind_of(layers.values())
    if held is not None:
        raise ValueError(f"the routed experts are quantised already, to {held!r}: load the original")
    check_can_become("nf4", held, layers)
    # Each layer's float weights are let go in turn.
    del layers
    everything = together(batches, body_of(model))
    outer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if outer is not None:
        outer.set_experts_implementation(NAME)
    watch_batches(model, [everything], blocks, lambda _, name, x_TH: round_layer(name, *blocks[name], x_TH))
    refuse_save_pretrained(model, "nf4")


def together(batches: Iterable[Batch], body: nn.Module) -> dict[str, Tensor]:
    """All batches as one, checked; shorter ones are padded at the right."""
    checked = [prepare(batch, number, body) for number, batch in enumerate(checked_batches(batches))]
    if not checked:
        raise ValueError("calibration holds no batch: at least one batch of token ids is needed")
    longest = max(batch["input_ids"].shape[1] for batch in checked)
    padded = any(batch["input_ids"].shape[1] < longest or "attention_mask" in batch for batch in checked)
    placed = any("position_ids" in batch for batch in checked)
    parts: dict[str, list[Tensor]] = {}
    for batch in checked:
        ids_BS = batch["input_ids"]
        whole = {"input_ids": ids_BS}
        if padded:
            whole["attention_mask"] = batch.get("attention_mask", torch.ones_like(ids_BS))
        if placed:
            counted_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
            whole["position_ids"] = batch.get("position_ids", counted_BS)
        for key, values_BS in whole.items():
            parts.setdefault(key, []).append(F.pad(values_BS, (0, longest - ids_BS.shape[1])))
    return {key: torch.cat(rows) for key, rows in parts.items()}


def round_layer(name: str, block: nn.Module, adapter: Adapter, x_TH: Tensor) -> None:
    """Round the experts of one layer, of which ``x_TH`` is the input, one after the other."""
    experts, router = adapter.experts(block), adapter.route(block, x_TH)
    ids_TK = route(x_TH, router)[0] if isinstance(router, Router) else router.ids
    of_gate_up, of_down = (empty(w.shape, "nf4", x_TH.device) for w in (experts.gate_up, experts.down))
    for e in range(experts.count):
        gate_up, down = experts.expert(e)
        x_nH = x_TH[(ids_TK == e).any(-1)].float()
        rounded = quantize(gate_up, "nf4", second_moments(x_nH, name))
        of_gate_up.codes[e], of_gate_up.scales[e] = rounded.codes, rounded.scales
        # What down will see: the outputs of the rounded projections.
        gate_nI, up_nI = F.linear(x_nH, rounded.dequantize()).chunk(2, dim=-1)
        rounded = quantize(down, "nf4", second_moments(F.silu(gate_nI) * up_nI, name))
        of_down.codes[e], of_down.scales[e] = rounded.codes, rounded.scales
    module = adapter.part(block, "experts")
    for part, weight in zip(WEIGHTS, (of_gate_up, of_down), strict=True):
        hold(module, part, QuantizedWeight(weight))
    give_back_freed()


def second_moments(x_nC: Tensor, layer: str) -> Tensor:
    """The mean [C, C] of x x^T; zeros without a row."""
    moments_CC = x_nC.mT @ x_nC / max(1, len(x_nC))
    if not moments_CC.isfinite().all():
        raise ValueError(f"the inputs of layer {layer} or of its experts' down projections are not finite")
    return moments_CC
