"""Gradient checkpointing that does not re-route.

A checkpointed layer runs its forward pass again during backward. If anything upstream rounds differently the
second time, a token near a tie would go to another expert, and the gradients would belong to a function that
was never evaluated. Keeping the outputs of the ``route`` op (8 K bytes a token), or of ``keep_ids`` where the
choice was made by other code, removes that possibility.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


@torch.library.custom_op("flex_kernels::keep_ids", mutates_args=())
def keep_ids(ids_TK: Tensor) -> Tensor:
    """A copy of ``ids_TK`` that a replay under :func:`checkpoint_contexts` gets back unchanged, whatever it
    is given.

    An op of its own, so that the policy below can recognise it. Integers: no gradient.
    """
    return ids_TK.clone()


@keep_ids.register_fake
def _(ids_TK: Tensor) -> Tensor:
    return torch.empty_like(ids_TK)


def keep_routing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in (torch.ops.flex_kernels.route.default, torch.ops.flex_kernels.keep_ids.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_contexts() -> tuple[Any, Any]:
    """``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``: replay keeps the
    routing.

    With transformers: ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn":
    flex_kernels.checkpoint_contexts})``.
    """
    return create_selective_checkpoint_contexts(keep_routing)
