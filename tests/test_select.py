"""Selection of the expert to start from: against brute force, in pieces, and on bad calibration data."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, padded, tiny, tokens
from transformers import BatchEncoding

from flex.grafting import graft
from flex.models import find_blocks
from flex.select import CHUNK, select_experts


def brute_force(model, batches):
    """sum_b || MoE(X_b) - shared(X_b) - E_c(X_b) ||_F from transformers' own modules, per layer."""
    model = model.double()
    blocks = {name: block for name, (block, _) in find_blocks(model).items()}
    totals = {name: 0.0 for name in blocks}
    norms = {name: 0.0 for name in blocks}
    for batch in batches:
        seen = {}
        handles = [
            block.register_forward_hook(
                lambda m, args, out, name=name, seen=seen: seen.update({name: (args[0], out)})
            )
            for name, block in blocks.items()
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        keep = batch["attention_mask"].bool()
        for name, (x, y) in seen.items():
            block, x_TH, y_TH = blocks[name], x[keep], y[keep]
            with torch.no_grad():
                if hasattr(block, "shared_expert"):
                    y_TH = y_TH - torch.sigmoid(block.shared_expert_gate(x_TH)) * block.shared_expert(x_TH)
                if hasattr(block, "shared_experts"):
                    y_TH = y_TH - block.shared_experts(x_TH)
                errors = []
                for c in range(block.experts.num_experts):
                    gate, up = (x_TH @ block.experts.gate_up_proj[c].T).chunk(2, -1)
                    e_TH = (F.silu(gate) * up) @ block.experts.down_proj[c].T
                    errors.append(torch.linalg.matrix_norm(y_TH - e_TH))
                totals[name] = totals[name] + torch.stack(errors)
                norms[name] = norms[name] + torch.linalg.matrix_norm(y_TH)
    return totals, norms


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_errors_are_those_of_brute_force_in_float64(architecture):
    batches = [padded(2, 9, seed) for seed in (1, 2)] + [padded(1, 5, 3)]
    selection = select_experts(tiny(architecture), batches, backend="reference")
    totals, norms = brute_force(tiny(architecture), batches)
    assert [layer.layer for layer in selection.layers] == list(totals)
    for layer in selection.layers:
        torch.testing.assert_close(
            torch.tensor(layer.errors).double(), totals[layer.layer], rtol=1e-5, atol=0
        )
        assert layer.norm == pytest.approx(float(norms[layer.layer]), rel=1e-5)
        assert layer.expert == int(totals[layer.layer].argmin())
        assert layer.relative[layer.expert] == pytest.approx(min(layer.errors) / layer.norm)
        assert layer.tokens == 2 * (18 - 4) + 1


def test_different_calibration_chooses_different_experts():
    model = tiny("mixtral")
    choices = {
        tuple(select_experts(model, [torch.full((1, 6), word)], backend="reference").experts)
        for word in range(3, 23)
    }
    assert len(choices) > 3


def test_two_halves_add_up_to_the_whole():
    model, batches = tiny("qwen2_moe"), [padded(2, 7, seed) for seed in range(4)]
    whole = select_experts(model, iter(batches), backend="reference")
    halves = [select_experts(model, part, backend="reference") for part in (batches[:2], batches[2:])]
    for layer, first, second in zip(whole.layers, *(h.layers for h in halves)):
        assert layer.errors == pytest.approx([a + b for a, b in zip(first.errors, second.errors)], rel=1e-12)
        assert layer.tokens == first.tokens + second.tokens


def test_no_activation_outlives_its_batch():
    model, activations, alive = tiny("mixtral"), [], []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda m, args, y: activations.extend((weakref.ref(args[0]), weakref.ref(y)))
        )

    def batches():
        for seed in range(3):
            gc.collect()
            alive.append(sum(ref() is not None for ref in activations))
            yield tokens(1, 8, seed)

    select_experts(model, batches(), backend="reference")
    assert len(activations) == 3 * 2 * 2 and alive == [0, 0, 0]


def assert_same(one, other):
    """The same choice from the same errors, up to last bits: torch may round a product differently twice."""
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.layer, a.expert, a.tokens) == (b.layer, b.expert, b.tokens)
        assert a.errors == pytest.approx(b.errors, rel=1e-5) and a.norm == pytest.approx(b.norm, rel=1e-5)


def test_padding_does_not_count_whatever_it_holds():
    model, batch = tiny("mixtral"), padded(2, 9)
    filled = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    assert_same(*(select_experts(model, [b], backend="reference") for b in (batch, filled)))


def test_a_batch_longer_than_a_chunk_is_one_batch():
    model = tiny("mixtral", num_hidden_layers=1)
    ids = tokens(1, CHUNK + 3)
    layer = select_experts(model, [ids], backend="reference").layers[0]
    totals, _ = brute_force(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert layer.errors == pytest.approx(totals[layer.layer].tolist(), rel=1e-5)


def test_a_grafted_model_is_judged_with_its_gates_shut():
    model, batches = tiny("mixtral"), [padded()]
    before = select_experts(model, batches, backend="reference")
    graft(model, start=[0, 0], backend="reference")
    assert_same(select_experts(model, batches), before)


def test_the_models_mode_and_gradients_are_left_as_they_were():
    model = tiny("mixtral").train()
    model.model.layers[0].eval()
    select_experts(model, [tokens()], backend="reference")
    assert model.training and model.model.layers[1].mlp.training and not model.model.layers[0].mlp.training
    assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())


def test_a_row_of_ids_and_ignored_labels_are_accepted():
    model, row = tiny("mixtral"), tokens(1, 6)
    one = select_experts(model, [row[0]], backend="reference")
    assert_same(one, select_experts(model, [{"input_ids": row, "labels": row.float()}], backend="reference"))
    encoding = BatchEncoding(
        {"input_ids": row, "attention_mask": torch.ones_like(row), "token_type_ids": row}
    )
    assert_same(one, select_experts(model, [encoding], backend="reference"))


def test_the_table_and_dict_say_what_was_chosen():
    selection = select_experts(tiny("mixtral"), [tokens()], backend="reference")
    header, *rows = selection.table()
    assert header[:2] == ("layer", "expert")
    assert [int(row[1]) for row in rows] == selection.experts
    assert selection.to_dict()["model.layers.1.mlp"]["errors"] == list(selection.layers[1].errors)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration holds no batch"),
        ([torch.zeros(1, 0, dtype=torch.long)], "batch 0 is empty"),
        ([tokens(), {"ids": tokens()}], "batch 1 must have input_ids.*it has ids"),
        (
            [{"input_ids": tokens(), "pixel_values": tokens()}],
            "batch 0 must have.*it has input_ids, pixel_values",
        ),
        ([{}], "it has nothing"),
        ([torch.rand(2, 3)], r"input_ids must be an integer tensor.*got \[2, 3\] torch.float32"),
        ([{"input_ids": [1, 2]}], "input_ids must be an integer tensor.*got list"),
        ([torch.tensor([[5, 64]])], "token ids run from 5 to 64, the vocabulary from 0 to 63"),
        ([torch.tensor([[-1, 4]])], "token ids run from -1 to 4"),
        (
            [{"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 8, dtype=torch.long)}],
            r"\[2, 8\].*differ",
        ),
        (
            [{"input_ids": tokens(), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}],
            "every position is padding",
        ),
    ],
)
def test_bad_calibration_is_refused_by_its_number_and_key(batches, message):
    with pytest.raises(ValueError, match=message):
        select_experts(tiny("mixtral"), batches, backend="reference")


@pytest.mark.parametrize("calibration", [tokens(), {"input_ids": tokens()}, "text", 7])
def test_one_batch_in_place_of_a_list_of_them_is_refused(calibration):
    with pytest.raises(TypeError, match="calibration must be an iterable of batches"):
        select_experts(tiny("mixtral"), calibration)


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[:] = float("nan")
    with pytest.raises(
        ValueError, match=r"batch 0: the output of expert 0 of layer model.layers.0.mlp is not finite"
    ):
        select_experts(model, [tokens()], backend="reference")
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"batch 0: the input of layer model.layers.1.mlp is not finite"):
        select_experts(model, [tokens()], backend="reference")
