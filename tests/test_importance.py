"""What the columns of the experts' weights are multiplied with, by hand, and how a graft uses it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, padded, tiny, tokens

import flex
from flex.block import grafted_blocks
from flex.grafting import graft
from flex.importance import column_importance
from flex.models import find_blocks
from flex_kernels.quantize import quantize


def inputs_of_blocks(model, batches):
    """layer -> the inputs [T, H] of its MoE block in float64, padding left out."""
    seen = {name: [] for name in find_blocks(model)}
    real = None
    for name, (block, _) in find_blocks(model).items():
        block.register_forward_pre_hook(lambda m, a, name=name: seen[name].append(a[0][real].double()))
    with torch.no_grad():
        for batch in batches:
            real = batch["attention_mask"].bool()
            model(**batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_means_of_squares_are_those_over_the_tokens_that_chose_an_expert():
    batches = [padded(2, 9, s) for s in range(3)]
    got = column_importance(tiny("qwen2_moe"), batches)
    model = tiny("qwen2_moe")
    for name, x_TH in inputs_of_blocks(model, batches).items():
        block = model.get_submodule(name)
        ids_TK = (x_TH @ block.gate.weight.double().T).topk(block.gate.top_k).indices
        of_x, of_a = got[name]
        for e, gate_up in enumerate(block.experts.gate_up_proj.double()):
            x_nH = x_TH[(ids_TK == e).any(-1)]
            gate, up = (x_nH @ gate_up.T).chunk(2, -1)
            want = [
                t.square().mean(0) if len(t) else torch.zeros(t.shape[1]) for t in (x_nH, F.silu(gate) * up)
            ]
            torch.testing.assert_close(of_x[e].double(), want[0].double(), rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(of_a[e].double(), want[1].double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graft_rounds_every_expert_by_its_importance(architecture):
    model, plain = tiny(architecture), tiny(architecture)
    importance = flex.column_importance(model, [tokens(), padded()])
    graft(
        model, start=[0] * len(find_blocks(plain)), experts="nf4", importance=importance, backend="reference"
    )
    for name, (block, adapter) in find_blocks(plain).items():
        held = grafted_blocks(model)[name].adapter.experts(grafted_blocks(model)[name])
        for weight, part, of_columns in zip(
            (held.gate_up, held.down), ("gate_up_proj", "down_proj"), importance[name], strict=True
        ):
            want = quantize(adapter.part(block, "experts").get_parameter(part), "nf4", of_columns)
            assert torch.equal(weight.codes, want.codes) and torch.equal(weight.scales, want.scales)


def test_looking_changes_nothing_and_works_on_a_grafted_model():
    model = tiny("mixtral").train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first = column_importance(model, [tokens()])
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    graft(model, start=[0, 1], backend="reference")
    again = column_importance(model, [tokens()])
    for name, pair in first.items():
        for one, two in zip(pair, again[name], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "experts, change, error, message",
    [
        ("int8", lambda i: i, ValueError, "importance is for experts='nf4', got experts='int8'"),
        (None, lambda i: i, ValueError, "got experts=None"),
        ("nf4", lambda i: [1.0], TypeError, "importance must be what flex.column_importance gives, got list"),
        ("nf4", lambda i: dict(list(i.items())[:1]), ValueError, r"importance is of the layers \['"),
        (
            "nf4",
            lambda i: {n: (b, a) for n, (a, b) in i.items()},
            ValueError,
            "importance of layer .* must be",
        ),
        ("nf4", lambda i: {n: (-a, b) for n, (a, b) in i.items()}, ValueError, "finite floats of at least 0"),
    ],
)
def test_an_importance_that_does_not_fit_is_named_and_nothing_changed(experts, change, error, message):
    model = tiny("mixtral")
    importance = change(column_importance(model, [tokens()]))
    before = set(model.state_dict())
    with pytest.raises(error, match=message):
        graft(model, start=[0, 0], experts=experts, importance=importance)
    assert set(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


def test_calibration_without_a_batch_is_named():
    with pytest.raises(ValueError, match="calibration holds no batch"):
        column_importance(tiny("mixtral"), [])


def test_a_layer_that_sees_infinities_is_named():
    model = tiny("qwen2_moe")
    last = list(find_blocks(model))[-1]
    with torch.no_grad():
        model.get_submodule(last).experts.gate_up_proj[0].fill_(3e38)
    with pytest.raises(ValueError, match=rf"layer {last} or of its experts' down projections are not finite"):
        column_importance(model, [tokens()])
