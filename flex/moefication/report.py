"""The report of a conversion: every measure that docs/demo-model.md shows."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import texts
from .layers import Recipe, convert_layers
from .measure import answer, differing_layers, exactness, perplexity, selected_experts
from .pipeline import Progress, compute_dtype

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerFast

QUESTIONS = (
    "What is the capital of France?",
    "Give me three tips for staying healthy.",
    "Write one sentence about the sea.",
    "What is the opposite of hot?",
)
SELECTION_SKILLS = ("simple_equations", "family_relationships", "spell_backward", "gsm_symbolic")
HELD_OUT_SEED = 10_000


def p3_texts(path: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[str]]:
    """Rows of an instruction file (``instruction``, ``output``, ``category``) in the chat template."""
    texts_by_category: dict[str, list[str]] = {}
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as lines
    ):
        for line in lines:
            row = json.loads(line)
            chat = [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
            texts_by_category.setdefault(row["category"], []).append(text)
    return texts_by_category


def held_out_ids(tokenizer: PreTrainedTokenizerFast, p3: Path | None) -> dict[str, Tensor]:
    """Text that calibration did not see, by kind: ids_BL each."""
    skills = texts.skill_texts(tokenizer, texts.HELD_OUT_SKILLS, count=20, seed=HELD_OUT_SEED)
    held_out = {
        "tasks of unseen skills": texts.pack(tokenizer, skills, 4, 512),
        "Python reference": texts.pack(tokenizer, texts.reference_texts(held_out=True, seed=0), 4, 512),
        "story": texts.pack(tokenizer, texts.story_texts(held_out=True), 4, 512),
        "sampled chats": texts.pack(tokenizer, texts.chat_texts(held_out=True), 7, 256),
    }
    if p3:
        rows = [text for row in zip(*p3_texts(p3, tokenizer).values(), strict=False) for text in row]
        held_out["P3"] = texts.pack(tokenizer, rows, 8, 512)
    return held_out


def selection_ids(tokenizer: PreTrainedTokenizerFast, p3: Path | None) -> dict[str, dict[str, Tensor]]:
    """Groups of kinds of text whose selected experts are compared: ids_BL each."""
    skills = {
        skill: texts.pack(tokenizer, texts.skill_texts(tokenizer, [skill], 40, HELD_OUT_SEED), 4, 256)
        for skill in SELECTION_SKILLS
    }
    prose = {
        "Python reference": texts.pack(tokenizer, texts.reference_texts(held_out=True, seed=0), 4, 256),
        "story": texts.pack(tokenizer, texts.story_texts(held_out=True), 4, 256),
    }
    groups = {"reasoning-gym skills": skills, "prose": prose}
    if p3:
        groups["P3 categories"] = {
            category: texts.pack(tokenizer, rows, 4, 256)
            for category, rows in p3_texts(p3, tokenizer).items()
        }
    return groups


class Report:
    """A JSON file that is rewritten after every measure, so that an interrupted run keeps what it has.

    Args:
        target: the file.
        tokenizer: of the dense model.
        p3: instruction data as a further held-out set, or None.
    """

    def __init__(self, target: Path, tokenizer: PreTrainedTokenizerFast, p3: Path | None):
        self.target = target
        self.tokenizer = tokenizer
        self.p3 = p3
        self.held_out = held_out_ids(tokenizer, p3)
        self.content: dict[str, Any] = {
            "held_out_tokens": {kind: ids.numel() for kind, ids in self.held_out.items()},
            "perplexity": {},
        }

    def add(self, **entries: Any) -> None:
        """Adds entries and writes the file."""
        self.content |= entries
        partial = self.target.with_name(self.target.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.target)

    def perplexity(self, name: str, model: torch.nn.Module) -> None:
        """Perplexity of one model on every kind of held-out text."""
        self.content["perplexity"][name] = {
            kind: perplexity(model, ids, skip=1, rows=2, compute_dtype=compute_dtype())
            for kind, ids in self.held_out.items()
        }
        self.add()

    def outcome(self, dense: LlamaForCausalLM, model: MixtralForCausalLM) -> None:
        """Answers and selected experts of the finished model, and the exactness of the split."""
        answers = {
            question: {
                "dense": answer(dense, self.tokenizer, question),
                "moe": answer(model, self.tokenizer, question),
            }
            for question in QUESTIONS
        }
        self.add(answers=answers)
        selections = {
            group: {kind: selected_experts(model, ids) for kind, ids in kinds.items()}
            for group, kinds in selection_ids(self.tokenizer, self.p3).items()
        }
        self.add(
            selected_experts=selections,
            layers_that_select_different_experts={
                group: differing_layers(kinds) for group, kinds in selections.items()
            },
        )
        recipe = Recipe(**self.content["recipe"])
        self.add(exactness=exactness(dense, self.held_out["story"][:1, :128], recipe))

    def controls(self, dense: LlamaForCausalLM, ids_BL: Tensor, progress: Progress) -> None:
        """The conversion without refitting, and with neurons grouped at random."""
        recipe = Recipe(**self.content["recipe"])
        controls = {
            "split, down_proj not refitted": replace(recipe, refit=False),
            "random partition, refitted": replace(recipe, partition="random"),
        }
        for name, control in controls.items():
            self.perplexity(name, convert_layers(dense, ids_BL, control, progress, compute_dtype())[0])
