"""Text for calibration and for held-out measurements, all of it made offline.

Four sources: reasoning-gym tasks (Apache-2.0), the Python language reference that comes with every
interpreter (``pydoc_data.topics``, PSF licence), a public-domain short story that ships with reasoning-gym,
and conversations sampled from the dense model itself. Calibration and held-out text share no task seed, no
topic and no chapter, and some skills appear in the held-out text alone.

Letters: B sequences, L tokens a sequence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALIBRATION_SKILLS = (
    "basic_arithmetic",
    "bitwise_arithmetic",
    "caesar_cipher",
    "calendar_arithmetic",
    "chain_sum",
    "coin_flip",
    "count_bits",
    "family_relationships",
    "gcd",
    "gsm_symbolic",
    "isomorphic_strings",
    "knights_knaves",
    "leg_counting",
    "letter_counting",
    "number_sequence",
    "number_sorting",
    "polynomial_equations",
    "propositional_logic",
    "sentence_reordering",
    "simple_equations",
    "simple_geometry",
    "spell_backward",
    "string_manipulation",
    "syllogism",
    "time_intervals",
    "word_sorting",
    "zebra_puzzles",
)
HELD_OUT_SKILLS = (
    "acre",
    "aiw",
    "base_conversion",
    "course_schedule",
    "fraction_simplification",
    "letter_jumble",
    "number_filtering",
    "palindrome_generation",
    "products",
    "ransom_note",
    "self_reference",
    "word_sequence_reversal",
)


def skill_messages(skill: str, count: int, seed: int) -> list[list[dict[str, str]]]:
    """``count`` question-and-answer conversations of one reasoning-gym skill."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset(skill, size=count, seed=seed)
    return [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": str(row["answer"])}]
        for row in rows
    ]


def skill_texts(
    tokenizer: PreTrainedTokenizerFast, skills: Iterable[str], count: int, seed: int, longest: int = 2_500
) -> list[str]:
    """Conversations of several skills in the chat template, shuffled, none over ``longest`` characters."""
    conversations = [chat for skill in skills for chat in skill_messages(skill, count, seed)]
    random.Random(seed).shuffle(conversations)
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in conversations]
    return [text for text in texts if len(text) <= longest]


def reference_texts(held_out: bool, seed: int) -> list[str]:
    """Topics of the Python language reference; every fourth, in alphabetical order, is held out."""
    from pydoc_data.topics import topics

    chosen = [topics[name] for i, name in enumerate(sorted(topics)) if (i % 4 == 3) == held_out]
    random.Random(seed).shuffle(chosen)
    return chosen


def story_texts(held_out: bool) -> list[str]:
    """Jules Verne, "In the Year 2889" (Project Gutenberg, public domain): the last third is held out."""
    from importlib.resources import files

    lines = (
        (files("reasoning_gym") / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8").splitlines()
    )
    paragraphs = [
        " ".join(p.split()) for p in "\n".join(line.strip() for line in lines).split("\n\n") if p.strip()
    ]
    cut = len(paragraphs) * 2 // 3
    return ["\n\n".join(paragraphs[cut:] if held_out else paragraphs[:cut])]


def chat_texts(held_out: bool) -> list[str]:
    """Conversations that the dense model made up itself, in the chat template (see ``chats.py``)."""
    from importlib.resources import files

    lines = (files(__package__) / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if row["held_out"] == held_out]


def pack(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], sequences: int, length: int) -> Tensor:
    """Texts tokenised, joined by newlines and cut into ``sequences`` rows of ``length`` tokens.

    Returns: ids_BL [sequences, length], int64.

    Raises:
        ValueError: the texts hold too few tokens.
    """
    needed = sequences * length
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text if text.endswith("\n") else text + "\n").input_ids
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(sequences, length)
    raise ValueError(f"texts hold {len(ids)} tokens; {sequences} sequences of {length} need {needed}")


def pack_all(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], length: int) -> Tensor:
    """As ``pack``, with as many rows as the texts fill: ids_BL [B, length], int64."""
    ids = [i for text in texts for i in tokenizer(text if text.endswith("\n") else text + "\n").input_ids]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)


def interleave(parts: list[Tensor]) -> Tensor:
    """Rows of several [B, L] tensors, taken in turn until all are used up."""

    def rows() -> Iterator[Tensor]:
        for i in range(max(part.shape[0] for part in parts)):
            yield from (part[i] for part in parts if i < part.shape[0])

    return torch.stack(list(rows()))
