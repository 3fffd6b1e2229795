"""Models with quantised experts: loaded piece by piece from any checkpoint, saved, loaded again."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from flex.block import moe_blocks
from flex.deferred import defer_experts
from flex.feedback import gptq_deferred, together
from flex.files import flush_to_disk, save_tensors
from flex.hf_quantizer import METHOD, ExpertsConfig, Unfit
from flex.importance import Importance
from flex.models import ADAPTERS, Unsupported, find_blocks
from flex.quantized import check_kind, kind_of
from flex.select import Batch
from flex.shards import FLOATS, INDEX, first_few, open_shards, shard_files
from flex.shared_experts import quantize_shared, shared_kind_of, shared_modules
from flex_kernels.quantize import KINDS, Kind

LARGEST_SHARD = "5GB"


def load(
    path: str | os.PathLike,
    experts: Kind | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    importance: Importance | None = None,
    shared_experts: Kind | None = None,
    gptq: Iterable[Batch] | None = None,
) -> Any:
    """A causal language model whose routed experts are held in 8 or 4 bits; the whole never has to fit.

    The checkpoint is read tensor by tensor: the experts' weights of one layer are put together in ``dtype``,
    quantised and let go before the next ones. The model is the one that ``from_pretrained`` in the same
    ``dtype`` and ``flex.graft(..., experts=experts)`` make, bit for bit; its layers run on the fused layer,
    and :func:`flex.graft` takes it as it is.

    Args:
        path: a folder or a Hugging Face id, in the Hub's layout (a tensor an expert) or in that of
            transformers 5 (a tensor a layer); or a folder that :func:`save` wrote, whose codes are read as
            they are.
        experts: "int8" or "nf4"; None takes the checkpoint as it is, quantised by :func:`save` or plain (then
            this is ``AutoModelForCausalLM.from_pretrained``).
        dtype: of everything else; None keeps the checkpoint's.
        attn_implementation, revision: as for ``from_pretrained``.
        importance: of :func:`flex.column_importance`, for ``experts="nf4"`` of a plain checkpoint: rounding
            spares the columns that count most. A model that this function loaded without one can tell it.
        shared_experts: "int8" or "nf4" holds the shared experts so too, beside quantised routed ones; None as
            the checkpoint has them. See :func:`flex.graft`.
        gptq: batches of token ids, for ``experts="nf4"`` of a plain checkpoint: the experts are rounded with
            error feedback on them, to the bits that :func:`flex.gptq` gives of the model in memory.
            Everything else is read first; then the tokens go through the layers, and the experts of each are
            read when they reach it.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        Unsupported: an architecture whose experts the fused layer does not know.
        FileNotFoundError, ValueError, OSError: no such checkpoint; a shard that is missing, truncated or not
            the one that the index describes (named); tensors that are missing or have another shape; a
            checkpoint whose experts are quantised otherwise; an ``importance`` or ``gptq`` without use, both
            of them, or of another model; ``shared_experts`` of a model without any, or beside plain routed
            experts; what the experts of a layer (named) see of ``gptq`` is not finite.
        TypeError: ``importance`` is no mapping of pairs of float tensors, or ``gptq`` no batches.
    """
    check_kind("experts", experts)
    check_kind("shared_experts", shared_experts)
    path = os.fspath(path)
    check_folder(path)
    config = AutoConfig.from_pretrained(path, revision=revision)
    check_kinds(path, config, experts, shared_experts)
    stored, stored_shared = stored_kinds(config)
    check_calibration(path, experts, stored, importance, gptq)
    tokens = None if gptq is None else together(gptq, config.get_text_config().vocab_size)
    options: dict[str, Any] = (
        {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    )
    if experts is None and stored not in KINDS:
        plain = dict(revision=revision, dtype=dtype or "auto")
        return AutoModelForCausalLM.from_pretrained(path, **plain, **options)
    if stored is None:
        wanted = ExpertsConfig(experts, importance=importance, shared_experts=shared_experts)  # type: ignore[arg-type]
        options["quantization_config"] = wanted
    with open_shards(shard_files(path, revision)) as tensors:
        model = load_tensors_into_model(path, config, tensors, dtype, options, tokens)
    if stored is not None and shared_experts is not None and stored_shared is None:
        for block, adapter in find_blocks(model).values():
            quantize_shared(block, adapter.shared or "", shared_experts)
    model.config.name_or_path = model.name_or_path = path
    # Without a file the model keeps the one that its configuration implies.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
    return model


def check_folder(path: str) -> None:
    """Raise FileNotFoundError for a path that is no folder and cannot be a Hugging Face id either."""
    if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: there is no such folder (and a Hugging Face id is NAMESPACE/NAME)")


def check_calibration(
    path: str, experts: Kind | None, stored: str | None, importance: Any, gptq: Any
) -> None:
    """Raise ValueError if what :func:`load` is given to round by has no use."""
    named = {"importance": importance, "gptq": gptq}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise ValueError("importance and gptq are two ways of rounding: give one of them")
    if given and (experts != "nf4" or stored is not None):
        what = f"experts={experts!r}" if stored is None else f"{path} is quantised already"
        raise ValueError(f"{given[0]} is for a plain checkpoint and experts='nf4', but {what}: leave it out")


def check_kinds(path: str, config: PreTrainedConfig, experts: Kind | None, shared: Kind | None) -> None:
    """Raise ValueError if the checkpoint ``path`` cannot be held in the way that :func:`load` is asked."""
    stored, stored_shared = stored_kinds(config)
    if experts is not None and stored not in (None, experts):
        raise ValueError(
            f"experts={experts!r}: {path} is quantised already, with {stored!r}; load the original"
        )
    if shared is None:
        return
    if any(a.architecture == config.model_type and a.shared is None for a in ADAPTERS):
        raise ValueError(f"shared_experts={shared!r}: {path}, a {config.model_type}, has no shared experts")
    if experts is None and stored not in KINDS:
        raise ValueError(
            f"shared_experts={shared!r} goes with quantised routed experts: give experts='int8' or 'nf4' too"
        )
    if stored_shared not in (None, shared):
        raise ValueError(
            f"shared_experts={shared!r}: those of {path} are quantised already, with {stored_shared!r}; "
            "load the original"
        )


def load_tensors_into_model(
    path: str,
    config: PreTrainedConfig,
    tensors: dict[str, Any],
    dtype: torch.dtype | None,
    options: Any,
    tokens: Batch | None = None,
) -> Any:
    """transformers' own loading, from slices that are read when their turn comes.

    Args:
        path: for messages.
        tensors: name -> something that gives its tensor when indexed with ``...``.
        options: of ``from_pretrained``; ``quantization_config`` unless the configuration has one.
        tokens: to round routed experts with error feedback on, of :func:`flex.feedback.together`.

    Raises:
        Unsupported, ValueError: as :func:`load`.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(
            f"{path}: {type(config).__name__} is not the configuration of a causal language model"
        )
    dtype = dtype or getattr(config, "dtype", None) or first_float(tensors)
    if tokens is not None:
        adapter = next((a for a in ADAPTERS if a.architecture == config.model_type), None)
        tensors = defer_experts(tensors, () if adapter is None else adapter.stored)
    # Nothing is left to initialise, but what transformers draws for a missing tensor must not move a seed.
    try:
        with torch.random.fork_rng():
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model, found = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                experts_implementation=METHOD,
                # They are refused below, by name.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except Unfit as error:
        raise ValueError(f"{path}: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path}: its tensors do not fit {type(config).__name__}: {error}") from error
    for name, given, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"{path}: {name} is {list(given)}, its configuration wants {list(wanted)}")
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{path} lacks tensors of {type(model).__name__}: {first_few(missing)}")
    if tokens is not None:
        gptq_deferred(model, tokens, model.hf_quantizer.deferred)
        model.hf_quantizer.deferred = {}
    return model


def stored_kinds(config: PreTrainedConfig) -> tuple[str | None, str | None]:
    """How :func:`save` left a checkpoint's routed and shared experts, or the name of another way of
    quantising; None: plain.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None, None
    settings = given if isinstance(given, dict) else given.to_dict()
    method = settings.get("quant_method")
    if method != METHOD:
        return str(method), None
    return settings.get("experts"), settings.get("shared_experts")


def first_float(tensors: dict[str, Any]) -> torch.dtype:
    """The dtype of the first float tensor of a checkpoint, where its configuration names none."""
    return next((FLOATS[t.get_dtype()] for t in tensors.values() if t.get_dtype() in FLOATS), torch.float32)


def save(model: PreTrainedModel, folder: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write a model with quantised experts, codes and scales as they are, for :func:`load`.

    Of a grafted model the pretrained part is written: personal experts, gates and LoRA have files of their
    own (:func:`flex.save_personal`, :func:`flex.shared_state`). The folder appears complete or not at all.

    Args:
        folder: must not exist, or be empty.
        tokenizer: saved beside the model, where one is given.

    Raises:
        ValueError: the experts are not quantised.
        FileExistsError: ``folder`` holds something.
        OSError: the disk is full or not writable.
    """
    blocks = moe_blocks(model)
    kind = kind_of(adapter.experts(block) for block, adapter in blocks.values())
    if kind is None:
        raise ValueError(
            f"the routed experts of {type(model).__name__} are not quantised: use save_pretrained"
        )
    shared_kind = shared_kind_of(shared_modules(blocks).values())
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        save_weights(pretrained_tensors(model), temporary)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = model.dtype
        config.quantization_config = ExpertsConfig(kind, shared_experts=shared_kind).to_dict()
        config.save_pretrained(temporary)
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            flush_to_disk(file)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_to_disk(target.parent)


def pretrained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the names that it had before LoRA and grafting; a tied tensor once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    found = {}
    for name, t in model.state_dict().items():
        parts = name.split(".")
        added = "personal" in parts or any(part.startswith("lora_") for part in parts)
        if not added and name not in tied:
            found[".".join(p for p in parts if p not in ("base_layer", "_orig_mod"))] = t
    return found


def save_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Safetensors shards, and their index where there are several."""
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=LARGEST_SHARD)
    for file, names in plan.filename_to_tensors.items():
        save_tensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
