"""GLM-4.5: DeepSeek-V3's block on plain attention."""

from __future__ import annotations

from flex.models.deepseek_v3 import DeepseekV3Adapter

ADAPTER = DeepseekV3Adapter("glm4_moe", ("Glm4MoeMoE",), shared="shared_experts")
