"""Gradient checkpointing that does not re-route.

A checkpointed layer runs its forward pass again during backward. If anything upstream rounds differently the second
time, a token near a tie would go to another expert, and the gradients would belong to a function that was never
evaluated. Keeping the outputs of the ``route`` op (8 K bytes a token) removes that possibility.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def keep_routing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.flex_kernels.route.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_contexts() -> tuple[Any, Any]:
    """``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``: replay keeps the routing.

    With transformers: ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn":
    flex_kernels.checkpoint_contexts})``.
    """
    return create_selective_checkpoint_contexts(keep_routing)
