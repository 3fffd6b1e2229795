"""Qwen3-Next: Qwen2-MoE's block, between attention and linear attention."""

from __future__ import annotations

from flex.models.base import Adapter

ADAPTER = Adapter(
    "qwen3_next",
    ("Qwen3NextSparseMoeBlock",),
    shared="shared_expert",
    shared_gate="shared_expert_gate",
    attention=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"),
    packs=False,
)
