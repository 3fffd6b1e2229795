"""Rows of text as packed batches of tokens: no padding between examples, no attention across them.

Letters: B packed rows, L tokens in a packed row, N answer tokens, V vocabulary.

Several examples lie end to end in one packed row, unless they are to be ``apart``: a model that mixes
positions otherwise than by attention would see over their borders. Their ``positions_BL`` restart at 0, from
which transformers (5.x, eager or SDPA attention, no attention mask, no cache) builds a block-diagonal causal
mask; :mod:`flex.attention` needs none.
An optimiser step always sees exactly ``batch_size`` examples, packed or not, so that packing changes speed
and never the mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flex.rows import Row
from flex.seeds import generator

Lengths = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; the answer starts at ``start``."""

    ids: list[int]
    start: int
    cut: bool = False


@dataclass(frozen=True)
class Batch:
    """One packed batch.

    Args:
        ids_BL: token ids. positions_BL: restart at 0 with every example.
        where_N: indices into the flattened [B * L] of the positions that predict an answer token.
        targets_N: the token ids to predict there.
        lengths: of each row's examples, the filling at its end among them.
        tokens: tokens that are not padding. examples: examples in the batch.
    """

    ids_BL: Tensor
    positions_BL: Tensor
    where_N: Tensor
    targets_N: Tensor
    lengths: Lengths
    tokens: int
    examples: int

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.ids_BL.to(device),
            self.positions_BL.to(device),
            self.where_N.to(device),
            self.targets_N.to(device),
            self.lengths,
            self.tokens,
            self.examples,
        )

    def slices(self, rows: int) -> Iterator[Batch]:
        """The batch as batches of at most ``rows`` packed rows (0: all); ``tokens`` and ``examples`` stay the
        whole's.
        """
        if rows == 0 or rows >= self.ids_BL.shape[0]:
            yield self
            return
        width = self.ids_BL.shape[1]
        for first in range(0, self.ids_BL.shape[0], rows):
            ids_BL = self.ids_BL[first : first + rows]
            inside_N = (self.where_N >= first * width) & (self.where_N < (first + rows) * width)
            yield Batch(
                ids_BL,
                self.positions_BL[first : first + rows],
                self.where_N[inside_N] - first * width,
                self.targets_N[inside_N],
                self.lengths[first : first + rows],
                self.tokens,
                self.examples,
            )


def prompt_text(tokenizer: Any, instruction: str) -> str:
    """The instruction as the model's chat template puts it to the model; plain text if it has no template."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": instruction}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return f"{instruction}\n"


def answer_text(tokenizer: Any, instruction: str, output: str) -> str:
    """The answer as the chat template ends it: the output and the token that ends a turn."""
    end = tokenizer.eos_token or ""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        prompt = prompt_text(tokenizer, instruction)
        # Templates that rewrite the assistant's turn are not a prefix of themselves; those get output + end
        # of sequence.
        if whole.startswith(prompt) and output.strip() in whole[len(prompt) :]:
            return whole[len(prompt) :].rstrip("\n")
    return output + end


def encode(row: Row, tokenizer: Any, max_length: int) -> Example:
    """Prompt and answer as token ids, tokenised apart so that training sees the prompt exactly as generation
    does.

    An example longer than ``max_length`` loses tokens from the middle of its prompt, so that the template's
    frame and the beginning and end of the text stay; an answer alone longer than half of ``max_length`` is
    cut at its end.
    """
    prompt = prompt_ids(tokenizer, row.instruction)
    answer = tokenizer(answer_text(tokenizer, row.instruction, row.output), add_special_tokens=False)[
        "input_ids"
    ]
    cut = len(prompt) + len(answer) > max_length
    if cut:
        answer = answer[: max(max_length // 2, max_length - len(prompt))]
        prompt = without_middle(prompt, max_length - len(answer))
    return Example(prompt + answer, len(prompt), cut)


def prompt_ids(tokenizer: Any, instruction: str, max_length: int = 0) -> list[int]:
    # A chat template writes its own special tokens; without one the tokenizer's (for example a start token)
    # are wanted.
    plain = not getattr(tokenizer, "chat_template", None)
    ids = tokenizer(prompt_text(tokenizer, instruction), add_special_tokens=plain)["input_ids"]
    if plain and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return without_middle(ids, max_length) if max_length else ids


def without_middle(ids: list[int], length: int) -> list[int]:
    if len(ids) <= length:
        return ids
    head = (length + 1) // 2
    return ids[:head] + ids[len(ids) - (length - head) :]


def arrange(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which examples share a packed row: the fewest rows of ``max_length`` that fit, filled evenly.

    Longest first into the emptiest row; even rows need next to no padding. Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = max(1, -(-sum(lengths) // max_length))
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in order:
            r = filled.index(min(filled))
            if rows[r] and filled[r] + lengths[i] > max_length:
                break
            rows[r].append(i)
            filled[r] += lengths[i]
        else:
            return rows
        count += 1


def example_lengths(positions_BL: Tensor) -> Lengths:
    """For each packed row the lengths of its examples, the filling at its end among them: L in all."""
    rows = []
    for positions in positions_BL.tolist():
        starts = [i for i, position in enumerate(positions) if position == 0]
        rows.append(tuple(b - a for a, b in zip(starts, [*starts[1:], len(positions)])))
    return tuple(rows)


def pack(examples: Sequence[Example], max_length: int, apart: bool = False) -> Batch:
    """One batch of all ``examples``, each in a row of its own if ``apart``. Raises ValueError on none.

    The end of a row shorter than the others is filled with token 0 as an example of its own that nothing
    attends to and that predicts nothing.
    """
    if not examples:
        raise ValueError("examples is empty; a batch needs at least one")
    lengths = [len(e.ids) for e in examples]
    places = [[i] for i in range(len(examples))] if apart else arrange(lengths, max_length)
    rows = [[examples[i] for i in row] for row in places if row]
    width = max(sum(len(e.ids) for e in row) for row in rows)
    ids_BL = torch.zeros(len(rows), width, dtype=torch.long)
    positions_BL = torch.zeros(len(rows), width, dtype=torch.long)
    where: list[int] = []
    targets: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for example in row:
            size = len(example.ids)
            ids_BL[r, at : at + size] = torch.tensor(example.ids)
            positions_BL[r, at : at + size] = torch.arange(size)
            # The token before the answer predicts its first token.
            first = max(example.start, 1)
            where.extend(range(r * width + at + first - 1, r * width + at + size - 1))
            targets.extend(example.ids[first:])
            at += size
        positions_BL[r, at:] = torch.arange(width - at)
    return Batch(
        ids_BL,
        positions_BL,
        torch.tensor(where),
        torch.tensor(targets),
        example_lengths(positions_BL),
        sum(len(e.ids) for e in examples),
        len(examples),
    )


def training_batches(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    steps: int,
    epochs: int,
    seed: tuple[int, ...] | tuple[Any, ...],
    apart: bool = False,
) -> Iterator[Batch]:
    """``steps`` batches of ``batch_size`` rows, or those of ``epochs`` passes; each pass in its own seeded
    order, and ``apart`` as :func:`pack` takes it.

    A pass ends with a smaller batch if need be; no batch mixes two passes. Rows are tokenised as they are
    used.
    """
    made = epoch = 0
    while made < steps or epoch < epochs:
        order = generator(*seed, "order", epoch).permutation(len(rows))
        for first in range(0, len(order), batch_size):
            if epochs == 0 and made == steps:
                return
            chosen = [encode(rows[i], tokenizer, max_length) for i in order[first : first + batch_size]]
            yield pack(chosen, max_length, apart)
            made += 1
        epoch += 1


def number_of_steps(rows: int, batch_size: int, steps: int, epochs: int) -> int:
    return steps or epochs * -(-rows // batch_size)


def evaluation_batches(
    rows: Sequence[Row], tokenizer: Any, max_length: int, batch_size: int, apart: bool = False
) -> Iterator[Batch]:
    """All rows once, in order, ``batch_size`` examples a batch, ``apart`` as :func:`pack` takes it."""
    for first in range(0, len(rows), batch_size):
        some = [encode(row, tokenizer, max_length) for row in rows[first : first + batch_size]]
        yield pack(some, max_length, apart)


def padded_batches(
    rows: Sequence[Row], tokenizer: Any, max_length: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """``input_ids`` and ``attention_mask``, padded on the right, for choosing experts; similar lengths share
    a batch.
    """
    encoded = sorted((encode(row, tokenizer, max_length).ids for row in rows), key=len)
    for first in range(0, len(encoded), batch_size):
        some = encoded[first : first + batch_size]
        width = len(some[-1])
        yield {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in some]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in some]),
        }
