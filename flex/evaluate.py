"""How good a model is on a client's held-out rows: loss, perplexity, ROUGE-L, exact match, the skill's own
verifier.

Letters: B prompts, L tokens in the longest prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from flex.batching import evaluation_batches, prompt_ids
from flex.config import Evaluation
from flex.loss import answer_loss
from flex.models import packs
from flex.rows import Row
from flex.seeds import generator


def evaluate_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], settings: Evaluation, max_length: int, generate: bool
) -> dict[str, Any]:
    """Measures ``model`` as it stands.

    Returns:
        ``rows``, ``tokens`` (answer tokens), ``loss`` (mean of an answer token, nats), ``perplexity`` (its
        exponential), ``gates`` (layer -> mean opening, 0 to 1, when gates are open), ``seconds``; with
        ``generate`` also ``generated`` (rows answered), ``rouge_l`` (mean F-measure), ``exact_match`` and, if
        every such row has a verifier, ``verifier``: all 0 to 1.

    Raises:
        ValueError: ``rows`` is empty.
    """
    if not rows:
        raise ValueError("rows is empty; there is nothing to evaluate on")
    began = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        measured = held_out_loss(model, tokenizer, rows, max_length, settings.batch_size)
        if generate:
            some = rows[: settings.generate_rows] if settings.generate_rows else rows
            answers = generate_answers(
                model,
                tokenizer,
                [r.instruction for r in some],
                settings.max_new_tokens,
                max_length,
                settings.batch_size,
            )
            measured |= {"generated": len(some), **score_answers(some, answers)}
    finally:
        model.train(was_training)
    return {"rows": len(rows), **measured, "seconds": time.perf_counter() - began}


@torch.no_grad()
def held_out_loss(
    model: Any, tokenizer: Any, rows: Sequence[Row], max_length: int, batch_size: int
) -> dict[str, Any]:
    from flex.block import GraftedBlock
    from flex.watch import record_gates

    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    grafted = any(isinstance(module, GraftedBlock) for module in model.modules())
    recorder: AbstractContextManager[dict[str, tuple[float, int]]] = (
        record_gates(model) if grafted else nullcontext({})
    )
    with recorder as gates:
        apart = not packs(model.config)
        for batch in evaluation_batches(rows, tokenizer, max_length, batch_size, apart):
            total += answer_loss(model, batch.to(device)).item()
            tokens += len(batch.targets_N)
    loss = total / tokens
    measured: dict[str, Any] = {"tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    opened = {layer: opening / count for layer, (opening, count) in gates.items() if count}
    return measured | ({"gates": opened} if opened else {})


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    instructions: Sequence[str],
    max_new_tokens: int,
    max_length: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers, in the order of ``instructions``.

    Prompts of similar length share a batch, padded on the left; keys and values are cached. ``max_length``
    bounds the prompt as in training.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    prompts = [prompt_ids(tokenizer, text, max_length) for text in instructions]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    ends.discard(None)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        eos_token_id=sorted(ends) or None,
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        width = max(len(prompts[i]) for i in some)
        ids_BL = torch.tensor(
            [[padding] * (width - len(prompts[i])) + prompts[i] for i in some], device=device
        )
        mask_BL = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in some], device=device
        )
        out = model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=config)
        for i, ids in zip(some, out[:, width:].tolist()):
            # Cut at the end token by hand: padding may be a token that decoding would show.
            stop = next((n for n, token in enumerate(ids) if token in ends), len(ids))
            answers[i] = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return answers


def score_answers(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
    """Means over the rows of ``rouge_l`` (F-measure of the longest common subsequence of stemmed words,
    rouge-score), ``exact_match`` (equal but for white space at the ends and its amount) and, where all rows
    have one, ``verifier``: the
    skill's own score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    count = len(rows)
    rouge = sum(scorer.score(row.output, answer)["rougeL"].fmeasure for row, answer in zip(rows, answers))
    exact = sum(row.output.split() == answer.split() for row, answer in zip(rows, answers))
    scores = {"rouge_l": rouge / count, "exact_match": exact / count}
    checks = [row.check for row in rows]
    if all(check is not None for check in checks):
        from flex.tasks import score

        scores["verifier"] = (
            sum(score(check, answer) for check, answer in zip(checks, answers) if check) / count
        )
    return scores


def evaluation_rows(rows: Sequence[Row], count: int, seed: int, client: str) -> list[Row]:
    """``count`` of a client's held-out rows, drawn from the seed, in their order; 0: all of them."""
    if not count or count >= len(rows):
        return list(rows)
    chosen = generator(seed, "evaluation", client).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen)]
