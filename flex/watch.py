"""Looking at what enters the MoE blocks while a model runs: the base of selection and of the gates' record.

Letters: T tokens (padding left out), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flex.block import grafted_blocks


def body_of(model: nn.Module) -> nn.Module:
    """The innermost transformers model: embeddings and layers, without the language-model head."""
    bodies = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return bodies[-1] if bodies else model


@contextmanager
def watch_inputs(
    model: nn.Module, blocks: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, x_TH)`` whenever one of ``blocks`` runs; padded positions are left out of x_TH.

    Padding is known from the 2-D ``attention_mask`` that the model was called with; with a key-value cache
    the mask is longer than the input, and its last columns count.
    """
    mask: list[Tensor | None] = [None]

    def before_body(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask")
        mask[0] = given if isinstance(given, Tensor) and given.ndim == 2 else None

    def before_block(name: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["hidden_states"]
            real = mask[0]
            if real is None or x.ndim != 3:
                see(name, x.reshape(-1, x.shape[-1]))
            else:
                see(name, x[real[:, -x.shape[1] :].to(x.device).bool()])

        return hook

    handles = [body_of(model).register_forward_pre_hook(before_body, with_kwargs=True)]
    for name, block in blocks.items():
        handles.append(block.register_forward_pre_hook(before_block(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, tuple[float, int]]]:
    """Record how far the gates open while the model is evaluated.

    Yields a dict that is filled when the block ends: layer name -> (sum of g over the tokens, how many),
    padding left out. Their quotient is the mean opening; records of several clients or batches add up. Costs
    one product of x with one vector per layer, and nothing when not recording.

    Raises:
        ValueError: the model is not grafted.
    """
    blocks = {name: block for name, block in grafted_blocks(model).items() if block.personal is not None}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    @torch.no_grad()
    def see(name: str, x_TH: Tensor) -> None:
        personal = blocks[name].personal
        if personal is None or blocks[name].shut:
            return
        g_T = torch.sigmoid(x_TH.float() @ personal.gate_weight.float() + personal.gate_bias.float())
        sums[name] = sums.get(name, 0) + g_T.sum(dtype=torch.float64)
        counts[name] = counts.get(name, 0) + g_T.numel()

    openings: dict[str, tuple[float, int]] = {}
    with watch_inputs(model, blocks, see):
        yield openings
    openings.update((name, (float(sums[name]), counts[name])) for name in blocks if name in sums)
