"""A client's whole training step on a random Qwen1.5-MoE-A2.7B: stock transformers against ours.

The model has the full configuration in bfloat16, its weights drawn on the device. What is trained (LoRA on
attention, a full personal expert and a gate a layer, in float32), the batches, the fused loss and AdamW are
the same for every layer, and are the client's own code: :func:`flex.compare.measure_model`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.full_size import DTYPE, Size, batches, configuration
from flex.compare import WARM_UP, comparable, measure_model
from flex.config import Config, Model

# A step of 8192 tokens, all rows in one pass, nothing computed twice but what the layer itself does.
FULL = Size(tokens=1024, rows=8, steps=3 + WARM_UP, checkpointing=False, personal="full")
TOY = replace(
    FULL,
    layers=2,
    hidden=64,
    heads=2,
    experts=6,
    width=48,
    shared_width=80,
    vocabulary=300,
    tokens=32,
    rows=2,
)
# The last is what is left out when time runs out.
CLIENT_LAYERS = ("flex-recompute", "grouped_mm", "eager", "flex-preact")


def random_model(size: Size, device: str) -> Any:
    """The frozen model, drawn on ``device`` by transformers' own initialisation."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(size), dtype=DTYPE, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def client_step(layer: str, device: str, backend: str) -> dict[str, Any]:
    """Tokens a second, peak memory and losses of the client's step with one of CLIENT_LAYERS; ours on
    ``backend``."""
    size = FULL if device == "cuda" else TOY
    config = comparable(Config(model=Model(dtype="bfloat16", device=device, backend=backend)))
    model = random_model(size, device)
    weights = sum(p.numel() for p in model.parameters())
    measured = measure_model(model, layer, config, list(batches(size)))
    return {
        "layer": layer,
        "weights": weights,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_a_step": size.rows * size.tokens,
    } | measured
