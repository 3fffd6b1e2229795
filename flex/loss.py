"""Cross entropy on the answer's tokens alone, without a [tokens, vocabulary] tensor.

Letters: B packed rows, L tokens in a row, H hidden, N answer tokens, V vocabulary.

The body of the model runs on everything; only the N positions that predict an answer token go through the
output layer, a slice at a time. The gradient of the hidden rows is made in the same pass (the loss is the
last thing that happens, so its gradient is known up to a factor), and no logits are kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flex.batching import Batch

LOGITS_AT_ONCE = 1 << 23
"""Elements of the largest slice of logits: 32 MiB in float32."""


class LinearCrossEntropy(torch.autograd.Function):
    """sum_n -log softmax(hidden_n weight^T)[target_n] for a frozen ``weight``."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, rows: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        if hidden_NH.dtype == torch.float64:
            total = total.double()
        d_hidden_NH = torch.empty_like(hidden_NH) if needs_gradient else None
        for first in range(0, hidden_NH.shape[0], rows):
            part = slice(first, first + rows)
            logits_nV = (hidden_NH[part] @ weight_VH.t()).to(total.dtype)
            column_n1 = targets_N[part, None]
            chosen_n1 = logits_nV.gather(1, column_n1)
            norm_n1 = logits_nV.logsumexp(dim=1, keepdim=True)
            total += (norm_n1 - chosen_n1).sum()
            if d_hidden_NH is not None:
                p_nV = logits_nV.sub_(norm_n1).exp_()
                p_nV.scatter_add_(1, column_n1, torch.full_like(chosen_n1, -1.0))
                d_hidden_NH[part] = p_nV.to(weight_VH.dtype) @ weight_VH
        if d_hidden_NH is not None:
            ctx.save_for_backward(d_hidden_NH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (d_hidden_NH,) = ctx.saved_tensors
        return d_hidden_NH * grads[0].to(d_hidden_NH.dtype), None, None, None


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, rows: int = 0) -> Tensor:
    """Summed cross entropy of ``hidden_NH weight_VH^T`` against ``targets_N``, a scalar in float32 (float64
    for float64).

    Args:
        hidden_NH: [N, H]; gets a gradient. weight_VH: [V, H], frozen, same dtype. targets_N: [N] int64.
        rows: rows of logits at once; 0 chooses 32 MiB of logits.

    Raises:
        ValueError: ``weight_VH`` requires a gradient (and gradients are on), or shapes do not fit.
    """
    if weight_VH.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight_VH requires a gradient; this loss is for a frozen output layer")
    if (
        hidden_NH.ndim != 2
        or targets_N.shape != hidden_NH.shape[:1]
        or weight_VH.shape[1:] != hidden_NH.shape[1:]
    ):
        raise ValueError(
            f"hidden_NH {list(hidden_NH.shape)}, weight_VH {list(weight_VH.shape)} and targets_N "
            f"{list(targets_N.shape)} do not fit; expected [N, H], [V, H] and [N]"
        )
    rows = rows or max(1, LOGITS_AT_ONCE // weight_VH.shape[0])
    return LinearCrossEntropy.apply(hidden_NH, weight_VH, targets_N, rows)


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Summed loss over the answer tokens of ``batch``; divide by ``len(batch.targets_N)`` for the mean.

    The same number as ``model(ids, labels=labels).loss`` times the number of labelled tokens, each example
    run alone.

    Raises:
        ValueError: the output layer has a bias, or is trained.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"the output layer of {type(model).__name__} has a bias; only a plain linear layer is supported"
        )
    out = model.base_model(
        input_ids=batch.ids_BL,
        position_ids=batch.positions_BL,
        example_lengths=batch.lengths,
        use_cache=False,
    )
    hidden_NH = out.last_hidden_state.flatten(0, 1).index_select(0, batch.where_N)
    # Granite's logits are divided by this.
    divisor = getattr(model.config, "logits_scaling", 1.0)
    if divisor != 1.0:
        hidden_NH = hidden_NH / divisor
    return linear_cross_entropy(hidden_NH, head.weight, batch.targets_N)
