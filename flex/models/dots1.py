"""dots.llm1: DeepSeek-V3's block on plain attention."""

from __future__ import annotations

from flex.models.deepseek_v3 import DeepseekV3Adapter

ADAPTER = DeepseekV3Adapter("dots1", ("Dots1MoE",), shared="shared_experts")
