"""Evaluation: scores worked out by hand, batched generation equal to one row at a time."""

import math

import pytest
import torch
from tiny import make_model, make_tokenizer
from tiny_models import tiny

import flex
from flex.batching import encode, prompt_ids
from flex.config import Evaluation
from flex.evaluate import evaluate_rows, evaluation_rows, generate_answers, score_answers
from flex.rows import Row
from flex.tasks import reasoning_gym_rows

TOKENIZER = make_tokenizer()
ROWS = [Row(f"say {c} {'.' * i}", c * (1 + i)) for i, c in enumerate("abcdefg")]
SETTINGS = Evaluation(rows=0, batch_size=3, max_new_tokens=6, generate_rows=4)


def test_scores_by_hand():
    rows = [Row("q", "the cat sat"), Row("q", "a  b"), Row("q", "dog")]
    scores = score_answers(rows, ["the cat ran away", " a b\n", "horse"])
    # Longest common subsequence "the cat": precision 2/4, recall 2/3, F 4/7. The second is equal but for
    # spaces.
    assert scores == {"rouge_l": pytest.approx((4 / 7 + 1 + 0) / 3), "exact_match": pytest.approx(1 / 3)}


def test_the_verifier_scores_rows_that_have_one():
    _, rows = reasoning_gym_rows(["chain_sum"], 5, 4, seed=0)
    right = [row.output for row in rows]
    assert score_answers(rows, right)["verifier"] == 1.0
    assert score_answers(rows, [*right[:2], "x", "y"])["verifier"] == pytest.approx(0.5)
    assert "verifier" not in score_answers([*rows, Row("q", "a")], [*right, "a"])


def test_loss_is_the_mean_over_all_answer_tokens():
    model = make_model()
    measured = evaluate_rows(model, TOKENIZER, ROWS, SETTINGS, 64, generate=False)
    total, tokens = 0.0, 0
    for row in ROWS:
        example = encode(row, TOKENIZER, 64)
        ids = torch.tensor([example.ids])
        logits = model(ids).logits[0, example.start - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, example.start :], reduction="sum").item()
        tokens += len(example.ids) - example.start
    assert measured["tokens"] == tokens == sum(range(1, 8)) + 7
    assert measured["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    assert measured["rows"] == 7 and "rouge_l" not in measured and "gates" not in measured


def test_batched_generation_equals_plain_greedy_decoding_of_each_prompt():
    model = make_model()
    letters = TOKENIZER.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    with torch.no_grad():
        # Other tokens have logit 0, so the answers are letters that can be told apart.
        others = torch.ones(260, dtype=torch.bool).index_fill(0, torch.tensor(letters), False)
        model.lm_head.weight[others] = 0.0
    texts = [row.instruction for row in ROWS]
    answers = generate_answers(model, TOKENIZER, texts, 6, 64, batch_size=3)
    for text, answer in zip(texts, answers):
        ids = prompt_ids(TOKENIZER, text)
        start = len(ids)
        for _ in range(6):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == TOKENIZER.eos_token_id:
                break
        assert answer == TOKENIZER.decode(ids[start:], skip_special_tokens=True)
    assert len(set(answers)) > 1, "the model says the same to every prompt: nothing was compared"


@pytest.mark.parametrize("architecture", ["lfm2_moe", "qwen3_next"])
def test_padding_on_the_left_changes_no_answer_of_models_that_mix_otherwise_than_by_attention(architecture):
    model = tiny(architecture, vocab_size=260, max_position_embeddings=512)
    texts = [row.instruction * (1 + 3 * i) for i, row in enumerate(ROWS[:3])]
    alone = [generate_answers(model, TOKENIZER, [text], 6, 512, batch_size=1)[0] for text in texts]
    assert generate_answers(model, TOKENIZER, texts, 6, 512, batch_size=3) == alone
    assert any(alone)


def test_an_answer_ends_at_the_end_token():
    model = make_model()
    (x,) = TOKENIZER.convert_tokens_to_ids(["x"])
    with torch.no_grad():
        # Two logits differ in sign alone: every step says "x" or ends the answer. All others are far below.
        model.lm_head.weight.mul_(1e-6)
        model.lm_head.weight[x] = torch.randn(32, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight[TOKENIZER.eos_token_id] = -model.lm_head.weight[x]
    answers = generate_answers(model, TOKENIZER, [row.instruction for row in ROWS], 5, 64, 4)
    assert {answer.strip("x") for answer in answers} == {""}
    assert min(len(answer) for answer in answers) < 5


def test_generation_is_measured_on_the_rows_asked_for():
    measured = evaluate_rows(make_model(), TOKENIZER, ROWS, SETTINGS, 64, generate=True)
    assert measured["generated"] == 4 and 0 <= measured["rouge_l"] <= 1


def test_gate_openings_are_reported_per_layer_when_gates_are_open():
    model = make_model()
    flex.graft(model, start=[0, 1], backend="reference")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.personal.gate_weight.zero_()
            layer.mlp.personal.gate_bias.fill_(math.log(3.0))
    measured = evaluate_rows(model, TOKENIZER, ROWS, SETTINGS, 64, generate=False)
    assert list(measured["gates"].values()) == [pytest.approx(0.75)] * 2


def test_rows_to_measure_are_seeded_and_keep_their_order():
    chosen = evaluation_rows(ROWS, 3, 0, "anna")
    assert chosen == evaluation_rows(ROWS, 3, 0, "anna") and len(chosen) == 3
    assert [ROWS.index(row) for row in chosen] == sorted(ROWS.index(row) for row in chosen)
    assert evaluation_rows(ROWS, 0, 0, "anna") == ROWS == evaluation_rows(ROWS, 99, 0, "anna")


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows is empty"):
        evaluate_rows(make_model(), TOKENIZER, [], SETTINGS, 64, generate=False)
