"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): softmax router, one shared expert behind a sigmoid gate."""

from __future__ import annotations

from flex.models.base import Adapter

ADAPTER = Adapter(
    "qwen2_moe", ("Qwen2MoeSparseMoeBlock",), shared="shared_expert", shared_gate="shared_expert_gate"
)
