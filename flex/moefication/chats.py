"""Samples conversations from the dense model and writes ``chats.jsonl``, which comes with the package.

    python -m flex.moefication.chats chats.jsonl

The model makes up the user's turns too (Magpie, arXiv 2406.08464). The file is shipped because sampling
takes longer than the whole conversion. The text is output of SmolLM2-135M-Instruct (Apache-2.0): fluent, and
often wrong.

Letters: B sequences, L tokens a sequence, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gguf_llama import load_dense

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CANDIDATES = 50


@torch.no_grad()
def sample_chats(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Conversations that the model makes up, user's turns included (Magpie, arXiv 2406.08464).

    Returns: ids_BL [sequences, length], int64.
    """
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    prompt = str(tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)).split(
        "\0"
    )[0]
    prompt_L = torch.tensor(tokenizer(prompt).input_ids)
    ids_BL = prompt_L.expand(sequences, -1)
    cache = DynamicCache(config=model.config)
    step_BL = ids_BL
    while ids_BL.shape[1] < length:
        logits_BV = model(input_ids=step_BL, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        top_BV, candidate_BV = logits_BV.topk(CANDIDATES, dim=-1)
        pick_B1 = torch.multinomial(top_BV.softmax(-1), 1, generator=generator)
        step_BL = candidate_BV.gather(1, pick_B1)
        ids_BL = torch.cat([ids_BL, step_BL], dim=1)
    return ids_BL


def main(target: Path, calibration: int = 64, held_out: int = 8, length: int = 256) -> None:
    """Writes ``calibration`` and ``held_out`` conversations, sampled with the seeds 0 and 77."""
    model, tokenizer = load_dense()
    torch.nn.Module.to(model, torch.bfloat16)
    with target.open("w", encoding="utf-8") as file:
        for count, seed, kept_back in ((calibration, 0, False), (held_out, 77, True)):
            for ids_L in sample_chats(model, tokenizer, count, length, seed):
                file.write(json.dumps({"held_out": kept_back, "text": tokenizer.decode(ids_L)}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
