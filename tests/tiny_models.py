"""Tiny random models of every supported architecture, and what tests of grafting share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCABULARY = 64
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
BEHIND_DENSE = COMMON | dict(
    intermediate_size=40,
    moe_intermediate_size=24,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
)
DEEPSEEK = BEHIND_DENSE | dict(
    num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
)
# DeepSeek-V3's block on plain attention.
GROUPED = BEHIND_DENSE | dict(head_dim=8, n_group=1, topk_group=1, norm_topk_prob=True)
GRANITE = COMMON | dict(
    intermediate_size=28,
    num_local_experts=6,
    num_experts_per_tok=2,
    residual_multiplier=0.7,
    embedding_multiplier=1.5,
    attention_multiplier=0.3,
    logits_scaling=3.0,
)
QWEN = COMMON | dict(moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3)
BUILDERS = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        COMMON | dict(intermediate_size=28, num_local_experts=6, num_experts_per_tok=2),
    ),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, QWEN | dict(shared_expert_intermediate_size=40)),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | dict(norm_topk_prob=True, head_dim=8)),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig,
        COMMON | dict(intermediate_size=24, num_experts=6, num_experts_per_tok=3),
    ),
    "deepseek_v2": (DeepseekV2ForCausalLM, DeepseekV2Config, DEEPSEEK | dict(q_lora_rank=None)),
    "deepseek_v2_groups": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        DEEPSEEK | dict(q_lora_rank=None, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        DEEPSEEK | dict(q_lora_rank=16, n_group=1, topk_group=1),
    ),
    "deepseek_v3_groups": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        DEEPSEEK | dict(q_lora_rank=16, n_group=4, topk_group=2),
    ),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig, GROUPED),
    "dots1_groups": (Dots1ForCausalLM, Dots1Config, GROUPED | dict(n_group=4, topk_group=2)),
    "ernie4_5_moe": (
        Ernie4_5_MoeForCausalLM,
        Ernie4_5_MoeConfig,
        COMMON
        | dict(
            intermediate_size=40,
            moe_intermediate_size=24,
            moe_num_experts=6,
            moe_k=3,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
        ),
    ),
    "granitemoe": (GraniteMoeForCausalLM, GraniteMoeConfig, GRANITE),
    "granitemoeshared": (
        GraniteMoeSharedForCausalLM,
        GraniteMoeSharedConfig,
        GRANITE | dict(shared_intermediate_size=20),
    ),
    "flex_olmo": (
        FlexOlmoForCausalLM,
        FlexOlmoConfig,
        COMMON | dict(intermediate_size=24, num_experts=6, num_experts_per_tok=3),
    ),
    "lfm2_moe": (
        Lfm2MoeForCausalLM,
        Lfm2MoeConfig,
        QWEN
        | dict(num_dense_layers=1, intermediate_size=40, layer_types=["conv", "full_attention"])
        | dict(tie_word_embeddings=False, routed_scaling_factor=1.7),
    ),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        QWEN
        | dict(shared_expert_intermediate_size=40, norm_topk_prob=True, head_dim=8)
        | dict(layer_types=["linear_attention", "full_attention"])
        | dict(
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
        ),
    ),
}
ARCHITECTURES = tuple(BUILDERS)


def tiny(architecture: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random float32 model in evaluation mode, on transformers' eager experts."""
    model_class, config_class, settings = BUILDERS[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class(**(settings | overrides))).eval()
    model.set_experts_implementation("eager")
    for name, bias in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            # Zero in a new model; trained models choose by it.
            bias.data.uniform_(-0.3, 0.3)
    return model


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padded(batch: int = 2, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Ids and a mask; the last row begins with four positions of padding."""
    ids, mask = tokens(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    ids[-1, :4], mask[-1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def runnable_backends() -> tuple[str, ...]:
    from flex_kernels.dispatch import unavailable

    return ("reference",) + (("cpu",) if not unavailable("cpu", "cpu") else ())
