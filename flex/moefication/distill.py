"""Recovery: the converted model learns the dense model's next-token distributions.

Letters: B sequences, L tokens a sequence, H hidden, V vocabulary, T tokens of one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from .tied import TiedMoE

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WARMUP = 0.1


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to 0 just after the last one."""
    warmup = min((step + 1) / (WARMUP * steps + 1), 1.0)
    return warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def distill(
    student: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    ids_BL: Tensor,
    steps: int,
    rows: int,
    learning_rate: float,
    compute_dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] | None = None,
) -> list[float]:
    """Trains the experts of ``student`` in place, by Adam on KL(dense || student) over all positions.

    Args:
        student: the converted model, float32.
        dense: the teacher, float32.
        ids_BL: the text, int64; better text that no fit has seen.
        steps: number of updates; 0 leaves the student as it is.
        rows: sequences an update, taken in order, from the start again when all were used.
        learning_rate: peak.
        compute_dtype: of the matrix products; weights, optimiser and loss stay float32.

    Returns: the loss of each step, nats a token.

    Raises:
        ValueError: the student has no ``TiedMoE`` block, ``ids_BL`` is empty, or a loss is not finite.
    """
    student.requires_grad_(False)
    blocks = [module for module in student.modules() if isinstance(module, TiedMoE)]
    if not blocks:
        raise ValueError("student has no TiedMoE block: nothing to train")
    if steps and not len(ids_BL):
        raise ValueError(f"steps={steps} need text, but ids_BL is empty")
    # A router's logits are small by design: Adam's steps, all of one size, would reorder the experts long
    # before that helps the loss. So the routers stay as fitted.
    weights = [
        weight.requires_grad_(True)
        for block in blocks
        for weight in (block.gate_MH, block.up_MH, block.down_HM)
    ]
    optimizer = torch.optim.Adam(weights, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, steps)
        chosen = torch.arange(step * rows, (step + 1) * rows) % len(ids_BL)
        loss = step_loss(student, dense, ids_BL[chosen], compute_dtype)
        if not loss.isfinite():
            raise ValueError(
                f"the distillation loss is {float(loss)} at step {step}: lower learning_rate={learning_rate}"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if progress:
            progress((step + 1) / steps)
    student.requires_grad_(False)
    return losses


def step_loss(
    student: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    ids_BL: Tensor,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Mean KL(dense || student) a token, in nats."""
    head_VH = dense.lm_head.weight
    with torch.autocast("cpu", compute_dtype, enabled=compute_dtype != torch.float32):
        with torch.no_grad():
            dense_BLH = dense.model(input_ids=ids_BL, use_cache=False).last_hidden_state
            target_TV = linear(dense_BLH, head_VH).flatten(0, 1)
        student_BLH = student.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        student_TV = linear(student_BLH, head_VH).flatten(0, 1)
    return kl_div(
        log_softmax(student_TV.float(), -1),
        log_softmax(target_TV.float(), -1),
        log_target=True,
        reduction="batchmean",
    )
