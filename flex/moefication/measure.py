"""What the conversion did to the model: perplexity, exactness, and which experts different texts select.

Letters: B sequences, L tokens a sequence, T tokens, H hidden, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu

from .export import to_mixtral
from .layers import Recipe, split_without_fitting

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerBase


@torch.no_grad()
def perplexity(
    model: nn.Module, ids_BL: Tensor, skip: int = 0, rows: int = 4, compute_dtype: torch.dtype = torch.float32
) -> float:
    """exp of the mean negative log-likelihood a token, the first ``skip`` of a row as context only."""
    total, count = 0.0, 0
    for part_BL in ids_BL.split(rows):
        with torch.autocast("cpu", compute_dtype, enabled=compute_dtype != torch.float32):
            logits_BLV = model(input_ids=part_BL, use_cache=False).logits
        keep = slice(max(0, skip - 1), -1)
        logits_TV = logits_BLV[:, keep].flatten(0, 1).float()
        target_T = part_BL[:, max(1, skip) :].flatten()
        total += float(cross_entropy(logits_TV, target_T, reduction="sum"))
        count += target_T.numel()
    return math.exp(total / count)


@torch.no_grad()
def exactness(dense: LlamaForCausalLM, ids_BL: Tensor, recipe: Recipe) -> dict[str, float]:
    """Largest logit difference when all experts are chosen by a uniform router: the split alone loses
    nothing.

    In float32, and relative to the largest logit of the dense model.
    """
    mixtral = to_mixtral(split_without_fitting(dense, recipe), torch.float32)
    expected_BLV = dense(input_ids=ids_BL).logits
    difference = float((mixtral(input_ids=ids_BL).logits - expected_BLV).abs().max())
    return {"largest_difference": difference, "relative": difference / float(expected_BLV.abs().max())}


@torch.no_grad()
def selected_experts(model: MixtralForCausalLM, ids_BL: Tensor, rows: int = 4) -> list[int]:
    """For each layer argmin_c sum_b ||MoE(X_b) - E_c(X_b)||_F: FLEx's choice of the expert to copy."""
    layers = model.model.layers
    error_LE = torch.zeros(len(layers), model.config.num_local_experts)

    def hook(number: int) -> Any:
        def compare(block: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_TH, y_TH = inputs[0].flatten(0, 1), output.flatten(0, 1).float()
            for e, (gate_up, down) in enumerate(
                zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)
            ):
                gate, up = linear(x_TH, gate_up).chunk(2, dim=-1)
                error_LE[number, e] += (y_TH - linear(silu(gate) * up, down).float()).norm()

        return compare

    hooks = [layer.mlp.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        for part_BL in ids_BL.split(rows):
            model.model(input_ids=part_BL, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return error_LE.argmin(1).tolist()


def differing_layers(selections: Mapping[str, list[int]]) -> dict[str, int]:
    """How many layers select different experts, for each pair of texts."""
    return {
        f"{a} / {b}": sum(x != y for x, y in zip(selections[a], selections[b], strict=True))
        for a, b in combinations(selections, 2)
    }


@torch.no_grad()
def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, question: str, longest: int = 60) -> str:
    """Greedy answer to one question in the chat template."""
    chat = [{"role": "user", "content": question}]
    prompt = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    prompt_1L = torch.tensor([tokenizer(prompt).input_ids])
    ids_1L = model.generate(  # type: ignore[operator]
        prompt_1L, attention_mask=torch.ones_like(prompt_1L), max_new_tokens=longest, do_sample=False
    )
    return str(tokenizer.decode(ids_1L[0, prompt_1L.shape[1] :], skip_special_tokens=True))
