"""The converted model as a Hugging Face Mixtral, and its folder on disk.

Letters: E experts, I expert width, H hidden.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .tied import TiedMoE

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerBase

PARTIAL = ".partial-"
STALE_SECONDS = 24 * 3600


def to_mixtral(model: LlamaForCausalLM, dtype: torch.dtype = torch.bfloat16) -> MixtralForCausalLM:
    """A Mixtral of the same function as a Llama whose MLPs are all ``TiedMoE``.

    Raises:
        ValueError: a layer's MLP is not a ``TiedMoE``, or the layers differ in experts, width or chosen.
    """
    from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

    blocks = [layer.mlp for layer in model.model.layers]
    for number, block in enumerate(blocks):
        if not isinstance(block, TiedMoE):
            raise ValueError(f"layer {number} has a {type(block).__name__}; expected TiedMoE in every layer")
    shapes = {(block.experts, block.width, block.chosen) for block in blocks}
    if len(shapes) > 1:
        raise ValueError(f"layers differ in (experts, width, chosen): {sorted(shapes)}")
    (experts, width, chosen), llama = shapes.pop(), model.config
    config = MixtralConfig(
        vocab_size=llama.vocab_size,
        hidden_size=llama.hidden_size,
        intermediate_size=width,
        num_hidden_layers=llama.num_hidden_layers,
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads or llama.num_attention_heads,
        head_dim=llama.head_dim,
        hidden_act=llama.hidden_act,
        max_position_embeddings=llama.max_position_embeddings,
        rms_norm_eps=llama.rms_norm_eps,
        rope_parameters=llama.rope_parameters,
        tie_word_embeddings=llama.tie_word_embeddings,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
        dtype=dtype,
    )
    state = {
        name: tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if ".mlp." not in name and not (llama.tie_word_embeddings and name == "lm_head.weight")
    }
    for number, block in enumerate(blocks):
        prefix = f"model.layers.{number}.mlp."
        gate_up, down = block.expert_tensors()
        state[prefix + "gate.weight"] = block.router_EH.detach().to(dtype)
        state[prefix + "experts.gate_up_proj"] = gate_up.detach().to(dtype)
        state[prefix + "experts.down_proj"] = down.detach().to(dtype)
    with torch.device("meta"):
        mixtral = MixtralForCausalLM(config)
    mixtral.to_empty(device="cpu")
    torch.nn.Module.to(mixtral, dtype)
    # Rotary frequencies are buffers that no checkpoint holds: they must be computed on a real device.
    mixtral.model.rotary_emb = type(mixtral.model.rotary_emb)(config)
    mixtral.tie_weights()
    missing, unexpected = mixtral.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if llama.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(
            f"this transformers version names Mixtral's tensors otherwise: {missing=} {unexpected=}"
        )
    mixtral.generation_config = GenerationConfig(
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
    )
    return mixtral.eval().requires_grad_(False)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` when the block ends without an error.

    Everything is flushed to disk before the rename, so ``target`` is either complete or absent, also after a
    power cut. If another process made ``target`` in the meantime, that one stays and this one is dropped.

    Raises:
        FileExistsError: ``target`` exists already.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{target.name}-", dir=target.parent))
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale(parent: Path) -> None:
    """Removes what processes that were killed more than a day ago left behind."""
    for partial in parent.glob(f"{PARTIAL}*"):
        if time.time() - partial.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, target: Path) -> Path:
    """Model, tokenizer and chat template as a folder for ``from_pretrained``; all of it or nothing.

    Raises:
        FileExistsError: ``target`` exists already.
    """
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(target)
