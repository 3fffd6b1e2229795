"""Skills from reasoning-gym: real tasks made from a seed, offline, each with a verifier that scores an
answer.

The settings keep the questions short and easy enough for a small model to learn something from a few hundred
rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from flex.config import ConfigError, suggestion
from flex.rows import Row
from flex.seeds import derive_seed

SKILLS: dict[str, dict[str, Any]] = {
    "calendar_arithmetic": {},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "count_bits": {"max_n": 1000},
    "family_relationships": {"min_family_size": 4, "max_family_size": 5},
    "gcd": {"min_value": 2, "max_value": 100},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "number_filtering": {"min_numbers": 3, "max_numbers": 5, "max_decimals": 1},
    "sentence_reordering": {"min_words_in_sentence": 3, "max_words_in_sentence": 6},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
    "syllogism": {},
    "word_sorting": {"min_words": 3, "max_words": 5, "max_word_length": 8},
}
"""Skill -> settings of its generator; any other name of reasoning-gym's registry runs with that task's own
defaults.
"""


def reasoning_gym_rows(
    skills: Sequence[str], train_rows: int, test_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows of every skill; category and client are the skill. No question appears twice
    in a skill.

    Raises:
        ConfigError: a name that reasoning-gym does not know, or a skill with too few different questions.
    """
    train: list[Row] = []
    test: list[Row] = []
    for skill in dict.fromkeys(skills):
        wanted = train_rows + test_rows
        # Twice as many as needed, because small settings repeat questions.
        source = generator_of(skill, 2 * wanted + 50, derive_seed(seed, "skill", skill) % 2**31)
        seen: set[str] = set()
        rows: list[Row] = []
        for entry in source:
            question = entry["question"].strip()
            if question in seen:
                continue
            seen.add(question)
            check = {"skill": skill, "entry": entry} if len(rows) < test_rows else None
            rows.append(Row(question, str(entry["answer"]), skill, skill, check))
            if len(rows) == wanted:
                break
        if len(rows) < wanted:
            raise ConfigError(
                f"data.skills: {skill!r} has only {len(rows)} different questions; "
                f"data.rows_per_skill={train_rows} and data.test_rows_per_skill={test_rows} ask for {wanted}"
            )
        test += rows[:test_rows]
        train += rows[test_rows:]
    return train, test


def score(check: Mapping[str, Any], answer: str) -> float:
    """The skill's own verifier on ``answer``: 0 to 1, where 1 is right and some skills give part credit."""
    return float(verifier_of(check["skill"]).score_answer(answer.strip(), check["entry"]))


@functools.cache
def verifier_of(skill: str) -> Any:
    return generator_of(skill, 1, 0)


def generator_of(skill: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            "data.source='reasoning_gym' needs the reasoning-gym package: pip install 'flex-kernels[demo]'"
        ) from error
    if skill not in DATASETS:
        raise ConfigError(f"data.skills: {skill!r} is not a reasoning-gym task{suggestion(skill, DATASETS)}")
    return reasoning_gym.create_dataset(skill, size=size, seed=seed, **SKILLS.get(skill, {}))
