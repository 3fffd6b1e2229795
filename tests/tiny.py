"""A tiny random Mixtral with a tiny tokenizer, saved to a folder, and rows it can be trained on: what
federation tests share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from flex.config import Config

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Any:
    """One token a byte, and a chat template of one token a mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>", chat_template=TEMPLATE
    )


def make_model(seed: int = 0, **changes: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MixtralForCausalLM(MixtralConfig(**(settings | changes)))
    # Larger than the usual start, so that outputs and gradients are far from zero.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    return model.eval()


def save_tiny(folder: Path) -> Path:
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, clients: dict[str, int]) -> Path:
    """A JSON-lines file with the given number of rows a client; every client repeats another letter."""
    with open(path, "w") as out:
        for c, (client, count) in enumerate(clients.items()):
            letter = "abcdefghij"[c % 10]
            for i in range(count):
                row = {"instruction": f"say {letter} {i}", "output": letter * (1 + i % 3), "client": client}
                out.write(json.dumps(row | {"category": "xy"[c % 2]}) + "\n")
    return path


def tiny_config(path: Path, rows: Path, folder: Path, /, **tables: dict[str, Any]) -> Config:
    """A federation of seconds; ``tables`` change single settings."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(path), "dtype": "float32", "backend": "reference"},
        "data": {"source": "jsonl", "path": str(rows), "held_out": 0.25, "max_length": 64},
        "federation": {"rounds": 2, "strategy": "flex"},
        "training": {
            "local_steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "personal_learning_rate": 1e-2,
            "gate_learning_rate": 1e-2,
        },
        "shared": {"rank": 2},
        "evaluation": {"rows": 3, "generate_rows": 2, "max_new_tokens": 4},
        "run": {"folder": str(folder), "threads": 1},
    }
    for name, values in tables.items():
        settings[name] = settings.get(name, {}) | values
    return Config.from_dict(settings)
