"""Attention over packed rows, one example at a time: no mask, and no products across examples.

transformers' own SDPA attention meets packed rows with a mask [L, L]; it computes all of the row's scores and
throws most of them away. Importing this module registers ``attn_implementation="flex_packed"``, which is its
``"sdpa"`` but for calls that say where examples end (``example_lengths``).

Letters: B packed rows, L tokens in a packed row, N heads, M key-value heads, D head width, n tokens of one
example.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flex.batching import Lengths

PACKED = "flex_packed"
LONGEST_IN_FLOAT32 = 256
"""Tokens up to which a CPU takes an example's attention faster in float32 than in 16 bits: a few large blocks
in place of many calls of a 16-bit product (AMD EPYC, torch 2.13: 1.5 to 2.8 times as fast both ways at 60 to
256 tokens, level at 512, slower beyond)."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    example_lengths: Lengths | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example, as transformers calls it: ([B, L, N, D], None).

    Args:
        query: [B, N, L, D]. key, value: [B, M, L, D]. attention_mask: not read where lengths are given.
        example_lengths: of every row, L in all; None, or a window shorter than an example, leaves the call to
            transformers' SDPA attention and its mask.
    """
    longest = max(map(max, example_lengths)) if example_lengths else 0
    if example_lengths is None or (sliding_window is not None and sliding_window < longest):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if all(len(lengths) == 1 for lengths in example_lengths):
        return causal_attention(query, key, value, dropout, scaling).transpose(1, 2).contiguous(), None
    rows = []
    for b, lengths in enumerate(example_lengths):
        # split, not slices: its backward is one concatenation.
        parts = zip(*(t[b : b + 1].split(lengths, dim=2) for t in (query, key, value)))
        rows.append(torch.cat([causal_attention(q, k, v, dropout, scaling) for q, k, v in parts], dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def causal_attention(
    query_BNnD: Tensor, key_BMnD: Tensor, value_BMnD: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    dtype = query_BNnD.dtype
    if query_BNnD.device.type == "cpu" and dtype.itemsize == 2 and query_BNnD.shape[2] <= LONGEST_IN_FLOAT32:
        query_BNnD, key_BMnD, value_BMnD = query_BNnD.float(), key_BMnD.float(), value_BMnD.float()
    return F.scaled_dot_product_attention(
        query_BNnD,
        key_BMnD,
        value_BMnD,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query_BNnD.shape[1] != key_BMnD.shape[1],
    ).to(dtype)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
