"""A client's local steps on the model that all simulated clients share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flex.batching import Batch
from flex.config import Training
from flex.loss import answer_loss
from flex.memory import PeakMemory


class ClientRefused(RuntimeError):
    """A client's update is not used; the message names the client and the reason."""


@dataclass(frozen=True)
class LocalResult:
    """What a client's local steps were.

    Args:
        steps, examples, tokens, answer_tokens: counts over all steps; ``tokens`` have no padding in them.
        loss_before, loss_after: mean loss of an answer token on the round's first batch, before the first and
            after the last step. loss_mean: of the training loss over the steps.
        seconds: of wall clock for the steps; peak_bytes: see :class:`flex.memory.PeakMemory`.
    """

    steps: int
    examples: int
    tokens: int
    answer_tokens: int
    loss_before: float
    loss_after: float
    loss_mean: float
    seconds: float
    peak_bytes: int


def learning_rate_factor(training: Training, round_: int, rounds: int) -> float:
    """What round ``round_`` (from 1) multiplies the learning rates by: constant within a round.

    ``cosine`` goes from 1 in the first round to ``final_fraction`` in the last.
    """
    if training.schedule == "constant" or rounds == 1:
        return 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * (round_ - 1) / (rounds - 1)))
    return training.final_fraction + (1 - training.final_fraction) * cosine


def parameter_groups(model: Any, training: Training, factor: float) -> list[dict[str, Any]]:
    """AdamW's groups: gates (never decayed), personal experts, and the shared rest, each at its own learning
    rate.

    Raises ValueError: nothing is trained, or a trained parameter is not float32.
    """
    gates: list[Tensor] = []
    personal: list[Tensor] = []
    shared: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is trained in {parameter.dtype}; trained parameters must be float32")
        parts = name.split(".")
        if "personal" in parts:
            (gates if parts[-1] in ("gate_weight", "gate_bias") else personal).append(parameter)
        else:
            shared.append(parameter)
    groups = [
        {"params": gates, "lr": training.gate_learning_rate * factor, "weight_decay": 0.0},
        {"params": personal, "lr": training.personal_learning_rate * factor},
        {"params": shared, "lr": training.learning_rate * factor},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient; call flex.graft or flex.add_lora"
        )
    return groups


def train_locally(
    model: Any,
    batches: Iterator[Batch],
    training: Training,
    *,
    name: str = "client",
    factor: float = 1.0,
    on_step: Callable[[int, float], None] = lambda tokens, loss: None,
) -> LocalResult:
    """Trains ``model``'s float32 parameters in place on ``batches``, with a fresh AdamW.

    The optimiser's state lives for one call: a client keeps no moments between rounds, as in FedAvg on LoRA
    (FedIT). The loss of a step is the mean over the answer tokens of its whole batch, however many passes it
    is computed in.

    Args:
        factor: multiplies the learning rates. on_step: called with a step's tokens and its loss.

    Raises:
        ClientRefused: there is no batch or no answer token, or a loss or gradient is not finite; names
            ``name`` and the step. Parameters hold then whatever they held: load a state before using the
            model again.
    """
    device = next(model.parameters()).device
    groups = parameter_groups(model, training, factor)
    parameters = [p for group in groups for p in group["params"]]
    # One pass over parameters and moments where torch has it, in place of a dozen.
    optimizer = torch.optim.AdamW(
        groups,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    peak = PeakMemory(device)
    began = time.perf_counter()
    first: Batch | None = None
    losses: list[float] = []
    examples = tokens = answer_tokens = 0
    model.train()
    try:
        for step, on_cpu in enumerate(batches, 1):
            batch = on_cpu.to(device)
            first = first or batch
            count = len(batch.targets_N)
            if not count:
                raise ClientRefused(
                    f"client {name!r}: no answer token in the {batch.examples} examples of step {step}"
                )
            loss = torch.zeros((), device=device)
            for part in batch.slices(training.rows_per_pass):
                part_loss = answer_loss(model, part) / count
                part_loss.backward()
                loss += part_loss.detach()
            losses.append(loss.item())
            norm = torch.nn.utils.clip_grad_norm_(parameters, training.clip or math.inf)
            if not math.isfinite(losses[-1]) or not math.isfinite(norm.item()):
                what = (
                    f"loss is {losses[-1]}"
                    if not math.isfinite(losses[-1])
                    else f"gradient norm is {norm.item()}"
                )
                raise ClientRefused(f"client {name!r}: {what} at local step {step}; its update is refused")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            examples, tokens, answer_tokens = (
                examples + batch.examples,
                tokens + batch.tokens,
                answer_tokens + count,
            )
            on_step(batch.tokens, losses[-1])
        if first is None:
            raise ClientRefused(f"client {name!r}: has no training rows")
        seconds = time.perf_counter() - began
        model.eval()
        after = mean_loss(model, first, training.rows_per_pass)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()
    if not math.isfinite(after):
        raise ClientRefused(
            f"client {name!r}: loss is {after} after the last of {len(losses)} steps; its update is refused"
        )
    return LocalResult(
        steps=len(losses),
        examples=examples,
        tokens=tokens,
        answer_tokens=answer_tokens,
        loss_before=losses[0],
        loss_after=after,
        loss_mean=sum(losses) / len(losses),
        seconds=seconds,
        peak_bytes=peak.read(),
    )


@torch.no_grad()
def mean_loss(model: Any, batch: Batch, rows_per_pass: int = 0) -> float:
    """Mean loss of an answer token of ``batch`` (on the model's device), without gradients."""
    return sum(answer_loss(model, part).item() for part in batch.slices(rows_per_pass)) / len(batch.targets_N)
