"""Packing and tokenising: what lies where, and that a packed model computes what separate examples give.

Letters: B packed rows, L tokens in a packed row, N answer tokens.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, make_tokenizer

from flex.batching import (
    Example,
    arrange,
    encode,
    evaluation_batches,
    pack,
    padded_batches,
    prompt_ids,
    training_batches,
    without_middle,
)
from flex.rows import Row

TOKENIZER = make_tokenizer()


def test_a_packed_batch_by_hand():
    # 4 + 2 + 3 tokens in rows of 6: two rows, [4] then [3, 2], and one token of filling in the first.
    batch = pack([Example([5, 6, 7, 8], 2), Example([9, 10], 1), Example([11, 12, 13], 1)], 6)
    assert batch.ids_BL.tolist() == [[5, 6, 7, 8, 0], [11, 12, 13, 9, 10]]
    assert batch.positions_BL.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.where_N.tolist() == [1, 2, 5, 6, 8]
    assert batch.targets_N.tolist() == [7, 8, 12, 13, 10]
    assert batch.lengths == ((4, 1), (3, 2))
    assert (batch.tokens, batch.examples) == (9, 3)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_every_example_is_placed_once_and_rows_do_not_overflow(lengths):
    rows = arrange(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)


def test_short_examples_leave_next_to_no_padding():
    lengths = [30 + (7 * i) % 50 for i in range(64)]
    rows = arrange(lengths, 512)
    width = max(sum(lengths[i] for i in row) for row in rows)
    assert sum(lengths) / (len(rows) * width) > 0.97


# transformers' eager attention takes its softmax in float32, whatever the model's dtype.
@pytest.mark.parametrize("attention, tolerance", [("sdpa", 1e-9), ("eager", 1e-5)])
def test_packed_hidden_states_equal_those_of_separate_examples(attention, tolerance):
    model = make_model().double()
    model.set_experts_implementation("eager")
    model.set_attn_implementation(attention)
    torch.manual_seed(0)
    examples = [Example(torch.randint(4, 260, (n,)).tolist(), 1) for n in (7, 12, 1, 20, 3, 12)]
    batch = pack(examples, 24)
    with torch.no_grad():
        packed = model.model(input_ids=batch.ids_BL, position_ids=batch.positions_BL, use_cache=False)
        hidden_BLH = packed.last_hidden_state
        for row, members in enumerate(m for m in arrange([len(e.ids) for e in examples], 24) if m):
            at = 0
            for i in members:
                size = len(examples[i].ids)
                alone = model.model(
                    input_ids=torch.tensor([examples[i].ids]), use_cache=False
                ).last_hidden_state[0]
                torch.testing.assert_close(
                    hidden_BLH[row, at : at + size], alone, rtol=tolerance, atol=tolerance
                )
                at += size


def test_examples_apart_have_a_row_each_in_their_order():
    batch = pack([Example([5, 6], 1), Example([7, 8, 9, 10], 2), Example([11, 12, 13], 1)], 64, apart=True)
    assert batch.ids_BL.tolist() == [[5, 6, 0, 0], [7, 8, 9, 10], [11, 12, 13, 0]]
    assert batch.positions_BL.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.where_N.tolist() == [0, 5, 6, 8, 9] and batch.targets_N.tolist() == [6, 9, 10, 12, 13]
    assert batch.lengths == ((2, 2), (4,), (3, 1)) and (batch.tokens, batch.examples) == (9, 3)


def test_slices_cover_the_batch():
    batch = pack([Example(list(range(10, 10 + n)), 1) for n in (9, 8, 7, 4, 3)], 12)
    parts = list(batch.slices(2))
    assert [len(p.ids_BL) for p in parts] == [2, 1]
    assert parts[0].lengths + parts[1].lengths == batch.lengths
    assert torch.cat([p.targets_N for p in parts]).tolist() == batch.targets_N.tolist()
    for part in parts:
        flat = part.ids_BL.flatten()
        assert flat[part.where_N + 1].tolist() == part.targets_N.tolist()
    assert list(batch.slices(0)) == [batch]


def test_only_the_answer_and_the_end_of_the_turn_are_learned():
    example = encode(Row("say hi", "hi!"), TOKENIZER, 64)
    assert TOKENIZER.decode(example.ids) == "<|user|>say hi<|end|>\n<|assistant|>hi!<|end|>"
    assert TOKENIZER.decode(example.ids[example.start :]) == "hi!<|end|>"
    assert example.ids[: example.start] == prompt_ids(TOKENIZER, "say hi")


def test_a_template_that_rewrites_the_answer_still_ends_it_with_the_end_token():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] | upper }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    example = encode(Row("q", "yes"), tokenizer, 64)
    assert tokenizer.decode(example.ids) == "[Q]>yes<|end|>"


def test_without_a_chat_template_the_text_is_plain():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    example = encode(Row("q", "yes"), tokenizer, 64)
    assert tokenizer.decode(example.ids) == "q\nyes<|end|>"


def test_a_long_prompt_loses_its_middle_and_keeps_its_frame():
    example = encode(Row("x" * 50 + "question?", "answer"), TOKENIZER, 40)
    text = TOKENIZER.decode(example.ids)
    assert example.cut and len(example.ids) == 40
    assert text.startswith("<|user|>xxx") and text.endswith("?<|end|>\n<|assistant|>answer<|end|>")
    assert without_middle(list(range(10)), 5) == [0, 1, 2, 8, 9]


def test_a_long_answer_is_cut_at_its_end():
    example = encode(Row("q" * 30, "a" * 100), TOKENIZER, 40)
    assert len(example.ids) == 40 and len(example.ids) - example.start == 20
    short_prompt = encode(Row("q", "a" * 100), TOKENIZER, 40)
    assert TOKENIZER.decode(short_prompt.ids).startswith("<|user|>q<|end|>\n<|assistant|>aaa")
    assert len(short_prompt.ids) == 40


ROWS = [Row(f"q{i}", f"{i}") for i in range(10)]


def batches(**changes):
    settings = {"max_length": 64, "batch_size": 4, "steps": 0, "epochs": 0, "seed": (0, "x")} | changes
    return list(training_batches(ROWS, TOKENIZER, **settings))


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own():
    first, second = batches(epochs=1), batches(epochs=2)
    assert [b.examples for b in second] == [4, 4, 2, 4, 4, 2]
    assert sum(b.tokens for b in first) == sum(b.tokens for b in second[3:])
    assert first[0].ids_BL.equal(second[0].ids_BL) and not first[0].ids_BL.equal(second[3].ids_BL)


def test_steps_go_through_the_rows_again_when_they_run_out():
    assert [b.examples for b in batches(steps=5)] == [4, 4, 2, 4, 4]
    assert [b.examples for b in batches(steps=2)] == [4, 4]


def test_the_order_depends_on_the_seed_alone():
    assert all(a.ids_BL.equal(b.ids_BL) for a, b in zip(batches(steps=3), batches(steps=3)))
    assert not batches(steps=1)[0].ids_BL.equal(batches(steps=1, seed=(1, "x"))[0].ids_BL)


def test_evaluation_keeps_the_order_and_every_row():
    assert [b.examples for b in evaluation_batches(ROWS, TOKENIZER, 64, 4)] == [4, 4, 2]


def test_padded_batches_mask_their_padding():
    for batch in padded_batches([Row("a" * n, "b") for n in (9, 1, 5)], TOKENIZER, 64, 2):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="examples is empty"):
        pack([], 8)
