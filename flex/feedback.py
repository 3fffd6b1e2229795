"""NF4 with error feedback (GPTQ, arXiv 2210.17323) for the routed experts of a model, layer by layer.

The tokens of all batches go through the model together, once. On reaching a layer its experts are rounded by
what they are multiplied with there, and what leaves the layer is what the rounded ones compute: later layers
make up for earlier ones as well. A layer's float weights are needed only then: they are the model's own, or
are read from a checkpoint when they are.

Letters: B sequences, S positions, T tokens (padding left out), n of them that chose an expert, H hidden,
I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from flex.block import GraftedBlock
from flex.deferred import Deferred
from flex.experts_implementation import NAME
from flex.hf_quantizer import refuse_save_pretrained
from flex.memory import give_back_freed
from flex.models import Adapter, find_blocks
from flex.quantized import WEIGHTS, check_can_become, hold, kind_of
from flex.select import Batch, checked_batch, checked_batches, watch_batches
from flex.shards import first_few
from flex.watch import body_of
from flex_kernels import Experts, Router
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
    everything = together(batches, vocabulary_of(model))
    outer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if outer is not None:
        outer.set_experts_implementation(NAME)

    round_layers(model, everything, lambda name: blocks[name][1].experts(blocks[name][0]))
    refuse_save_pretrained(model, "nf4")


def gptq_deferred(model: nn.Module, tokens: Batch, deferred: Mapping[str, Deferred]) -> None:
    """As :func:`gptq`, with float experts that are read when their layer's turn comes, and let go behind it.

    Args:
        model: on the fused layer, with room for codes in the place of its routed experts.
        tokens: of :func:`together`.
        deferred: full name of each routed weight -> the weight, in the model's dtype.

    Raises:
        ValueError: a weight, or what a layer's experts see, is not finite; names the layer. No use can be
            made of the model then.
    """
    absent = {f"{name}.experts.{part}" for name in find_blocks(model) for part in WEIGHTS} - deferred.keys()
    if absent:
        raise ValueError(f"not deferred, but rounded while they were read: {first_few(sorted(absent))}")

    def read(name: str) -> Experts:
        experts = Experts(*(deferred[f"{name}.experts.{part}"].read() for part in WEIGHTS))
        check_can_become("nf4", None, {name: experts})
        return experts

    round_layers(model, tokens, read)


def round_layers(model: nn.Module, tokens: Batch, float_experts: Callable[[str], Experts]) -> None:
    """Round the experts of every layer as ``tokens`` reach it; ``float_experts`` gives them by its name."""
    blocks = find_blocks(model)
    with logging.tqdm(total=len(blocks), desc="Rounding experts") as done:

        def see(_: int, name: str, x_TH: Tensor) -> None:
            round_layer(name, *blocks[name], float_experts(name), x_TH)
            done.update()

        watch_batches(model, [tokens], blocks, see)


def vocabulary_of(model: nn.Module) -> int:
    embeddings: Any = body_of(model).get_input_embeddings()  # type: ignore[operator]
    return embeddings.weight.shape[0]


def together(batches: Iterable[Batch], vocabulary: int) -> dict[str, Tensor]:
    """All batches as one, checked, on the CPU; shorter ones are padded at the right.

    Raises:
        TypeError, ValueError: as :func:`gptq` of ``batches``.
    """
    given = enumerate(checked_batches(batches))
    checked = [checked_batch(batch, number, vocabulary) for number, batch in given]
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
            counted_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
            whole["position_ids"] = batch.get("position_ids", counted_BS)
        for key, values_BS in whole.items():
            parts.setdefault(key, []).append(F.pad(values_BS.cpu(), (0, longest - ids_BS.shape[1])))
    return {key: torch.cat(rows) for key, rows in parts.items()}


def round_layer(name: str, block: nn.Module, adapter: Adapter, experts: Experts, x_TH: Tensor) -> None:
    """Round ``experts``, those of a layer whose input is ``x_TH``, one after the other, into its block."""
    router = adapter.route(block, x_TH)
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
