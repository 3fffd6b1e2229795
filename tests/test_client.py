"""A client's local steps: what is trained, at which rate, and what is refused."""

import math

import pytest
import torch
from tiny import make_model, make_tokenizer

import flex
from flex.batching import Example, pack, training_batches
from flex.client import ClientRefused, learning_rate_factor, parameter_groups, train_locally
from flex.config import Training
from flex.rows import Row
from flex_kernels import checkpoint_contexts

TOKENIZER = make_tokenizer()
ROWS = [Row(f"say {c}", c * 3) for c in "abcdefgh"]


def grafted(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = make_model().to(dtype)
    flex.graft(model, start=[1, 2], personal_dtype=torch.float32, backend="reference", **changes)
    flex.add_lora(model, rank=2)
    return model


def batches(steps: int = 3, rows=ROWS):
    return training_batches(
        rows, TOKENIZER, max_length=32, batch_size=4, steps=steps, epochs=0, seed=(0, "t")
    )


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


FAST = Training(learning_rate=1e-2, personal_learning_rate=1e-2, gate_learning_rate=1e-2, clip=0)


def test_training_lowers_the_loss_and_counts_what_it_did():
    steps = []
    result = train_locally(
        grafted(), batches(8), FAST, on_step=lambda tokens, loss: steps.append((tokens, loss))
    )
    assert result.loss_after < result.loss_before - 0.5
    # 8 steps of 4 rows; a row is <user>, 5 letters, <end>, newline, <assistant>, 3 letters, <end>: 13 tokens,
    # 4 learned.
    assert (result.steps, result.examples, result.tokens, result.answer_tokens) == (8, 32, 32 * 13, 32 * 4)
    assert [tokens for tokens, _ in steps] == [52] * 8
    assert result.loss_mean == pytest.approx(sum(loss for _, loss in steps) / 8)
    assert result.loss_before == steps[0][1] and result.peak_bytes > 0


def test_only_trained_parameters_move_and_gradients_are_let_go():
    model = grafted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_locally(model, batches(), FAST)
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) != parameter.requires_grad, name
        assert parameter.grad is None
    assert not model.training


def test_a_step_is_adamw_on_the_mean_loss_of_the_batch():
    ours, theirs = grafted(), grafted()
    settings = Training(
        learning_rate=3e-3, personal_learning_rate=2e-3, gate_learning_rate=1e-3, weight_decay=0.1, clip=0.5
    )
    train_locally(ours, batches(2), settings, factor=0.5)
    groups = {
        "lora": {"lr": 1.5e-3, "weight_decay": 0.1},
        "personal": {"lr": 1e-3, "weight_decay": 0.1},
        "gate_": {"lr": 0.5e-3, "weight_decay": 0.0},
    }

    def kind(name: str) -> str:
        if "lora" in name:
            return "lora"
        return "gate_" if name.endswith(("gate_weight", "gate_bias")) else "personal"

    named = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in named if kind(n) == k], **options} for k, options in groups.items()],
        betas=(0.9, 0.999),
    )
    for batch in batches(2):
        optimizer.zero_grad()
        logits = theirs(input_ids=batch.ids_BL, position_ids=batch.positions_BL, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch.where_N], batch.targets_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.5)
        optimizer.step()
    expected = trained(theirs)
    for name, value in trained(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_passes_of_few_rows_make_the_same_step_as_one_pass():
    whole, parts = grafted(), grafted()
    train_locally(whole, batches(2), FAST)
    train_locally(parts, batches(2), Training(**{**vars(FAST), "rows_per_pass": 1}))
    expected = trained(whole)
    for name, value in trained(parts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_checkpointing_makes_the_same_step():
    plain, saving = grafted(), grafted()
    saving.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    train_locally(plain, batches(2), FAST)
    train_locally(saving, batches(2), FAST)
    expected = trained(plain)
    for name, value in trained(saving).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_bfloat16_base_trains_float32_parameters():
    model = grafted(torch.bfloat16)
    result = train_locally(model, batches(8), FAST)
    assert result.loss_after < result.loss_before
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_the_schedule_by_hand():
    cosine = Training(schedule="cosine", final_fraction=0.2)
    # 0.2 + 0.8 * (1 + cos(pi * (r - 1) / 4)) / 2
    factors = [learning_rate_factor(cosine, r, 5) for r in (1, 2, 3, 5)]
    assert factors == pytest.approx([1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2])
    assert learning_rate_factor(cosine, 1, 1) == 1.0
    assert learning_rate_factor(Training(schedule="constant"), 4, 5) == 1.0


def test_a_loss_that_is_not_finite_is_refused_by_name_and_step():
    model = grafted()
    with torch.no_grad():
        model.model.layers[1].mlp.personal.gate_up[0, 0] = float("nan")
    with pytest.raises(
        ClientRefused, match=r"client 'anna': loss is nan at local step 1; its update is refused"
    ):
        train_locally(model, batches(), FAST, name="anna")


def test_a_client_that_diverges_is_refused():
    wild = Training(learning_rate=1e30, personal_learning_rate=1e30, gate_learning_rate=1e30, clip=0)
    with pytest.raises(ClientRefused, match=r"client 'anna': (loss|gradient norm) is (nan|inf)"):
        train_locally(grafted(), batches(5), wild, name="anna")


def test_no_rows_and_no_answers_are_refused():
    with pytest.raises(ClientRefused, match="client 'anna': has no training rows"):
        train_locally(grafted(), iter(()), FAST, name="anna")
    with pytest.raises(ClientRefused, match="client 'anna': no answer token in the 1 examples of step 1"):
        train_locally(grafted(), iter([pack([Example([4, 5], 2)], 8)]), FAST, name="anna")


def test_parameters_that_cannot_be_trained_well_are_refused():
    model = make_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of MixtralForCausalLM requires a gradient"):
        parameter_groups(model, FAST, 1.0)
    model.to(torch.bfloat16).lm_head.weight.requires_grad_()
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is trained in torch\.bfloat16; .* must be float32"
    ):
        parameter_groups(model, FAST, 1.0)
