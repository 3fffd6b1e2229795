"""Frozen experts in 8 and 4 bits in a grafted model: what the decoded weights compute, in fewer bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, padded, runnable_backends, tiny, tokens

from flex.block import GraftedBlock, gates_shut, grafted_blocks
from flex.experts_implementation import NAME
from flex.grafting import graft, personalize
from flex.models import find_blocks
from flex.quantized import quantize_experts
from flex.select import select_experts
from flex.state import load_personal, personal_state
from flex_kernels.modules import QuantizedWeight
from flex_kernels.quantize import quantize

KINDS = ("int8", "nf4")
kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", runnable_backends())
WEIGHTS = ("gate_up_proj", "down_proj")


def starts(model, expert=1):
    return [expert] * len(find_blocks(model))


def quantised(architecture, kind, backend="reference", **options):
    model = tiny(architecture)
    report = graft(model, start=starts(model), experts=kind, backend=backend, **options)
    return model, report


def decoded(architecture, kind):
    """The model with every routed expert replaced by what its codes mean, as plain weights."""
    model = tiny(architecture)
    for block, _ in find_blocks(model).values():
        for name in WEIGHTS:
            weight = block.experts.get_parameter(name)
            weight.data = quantize(weight, kind).dequantize()
    return model


@torch.no_grad()
def logits(model):
    batch = padded()
    return model(**batch).logits[batch["attention_mask"].bool()]


@kinds
@backends
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantised_graft_computes_what_its_decoded_experts_do(architecture, kind, backend):
    exact = tiny(architecture).double()
    for (block, _), (plain, _) in zip(
        find_blocks(exact).values(), find_blocks(decoded(architecture, kind)).values()
    ):
        for name in WEIGHTS:
            block.experts.get_parameter(name).data = plain.experts.get_parameter(name).data.double()
    eager = decoded(architecture, kind)
    model, _ = quantised(architecture, kind, backend)
    with gates_shut(model):
        got = logits(model)
    assert (got - logits(exact)).abs().max() <= 4 * (logits(eager) - logits(exact)).abs().max()
    assert (got - logits(tiny(architecture))).abs().max() > 1e-3


@kinds
def test_codes_and_scales_take_the_place_of_the_parameters(kind):
    before = tiny("qwen2_moe").state_dict()
    model, report = quantised("qwen2_moe", kind)
    after = {name: t for name, t in model.state_dict().items() if ".personal." not in name}
    gone = {name for name in before if name.endswith(WEIGHTS)}
    assert before.keys() - after.keys() == gone
    assert after.keys() - before.keys() == {f"{name}.{part}" for name in gone for part in ("codes", "scales")}
    assert all(torch.equal(t, after[name]) for name, t in before.items() if name not in gone)
    held = sum(t.nbytes for name, t in after.items() if name.endswith((".codes", ".scales")))
    # 6 experts of [48, 32] and [32, 24] in 2 layers: a byte or half a byte a weight, a scale a row.
    weights, rows = 2 * 6 * (48 * 32 + 32 * 24), 2 * 6 * (48 + 32)
    assert held == report.expert_bytes == weights // (1 if kind == "int8" else 2) + 2 * rows
    assert report.expert_bytes_before == 4 * weights and report.experts == kind
    assert report.frozen == sum(t.numel() for name, t in before.items())
    assert report.to_dict()["expert_bytes"] == held


@kinds
@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])
def test_a_personal_expert_begins_as_the_decoded_one(architecture, kind):
    plain = decoded(architecture, kind)
    model, report = quantised(architecture, kind, personal_dtype=torch.float32)
    for (block, _), own in zip(find_blocks(plain).values(), grafted_blocks(model).values()):
        assert torch.equal(own.personal.gate_up, block.experts.gate_up_proj[1])
        assert torch.equal(own.personal.down, block.experts.down_proj[1])
    assert set(report.start.values()) == {1}


def test_the_personal_experts_dtype_is_the_models_unless_another_is_asked_for():
    model = tiny("mixtral").bfloat16()
    graft(model, start=[0, 0], experts="int8")
    personal = grafted_blocks(model)["model.layers.0.mlp"].personal
    assert personal.gate_up.dtype == torch.bfloat16 and personal.gate_weight.dtype == torch.float32


@kinds
@backends
def test_a_low_rank_expert_over_codes_is_the_one_over_decoded_weights(kind, backend):
    options = dict(personal="lora", rank=3, backend=backend)
    model, plain = tiny("mixtral"), decoded("mixtral", kind)
    graft(model, start=[4, 2], experts=kind, **options, generator=torch.Generator().manual_seed(0))
    graft(plain, start=[4, 2], **options, generator=torch.Generator().manual_seed(0))
    for m in (model, plain):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for block in grafted_blocks(m).values():
                block.personal.gate_up_out.normal_(generator=generator)
                block.personal.down_out.normal_(generator=generator)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    assert personal_state(model).keys() == personal_state(plain).keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in plain.named_parameters() if p.requires_grad}


@kinds
@pytest.mark.parametrize("personal", ["full", "lora"])
def test_a_personal_state_of_another_expert_brings_its_own_frozen_copy(kind, personal):
    model, other = tiny("mixtral"), tiny("mixtral")
    for m, start in ((model, [0, 0]), (other, [5, 3])):
        graft(m, start=start, experts=kind, personal=personal, backend="reference")
    assert (logits(model) - logits(other)).abs().max() > 1e-3
    load_personal(model, personal_state(other))
    assert torch.equal(logits(model), logits(other))


@kinds
@pytest.mark.parametrize("personal", ["full", "lora"])
def test_personalize_restarts_from_the_decoded_experts(kind, personal):
    model, fresh = tiny("mixtral"), tiny("mixtral")
    graft(model, start=[0, 1], experts=kind, personal=personal, backend="reference")
    seed = torch.Generator().manual_seed
    graft(fresh, start=[5, 3], experts=kind, personal=personal, backend="reference", generator=seed(9))
    personalize(model, [5, 3], generator=seed(9))
    assert torch.equal(logits(model), logits(fresh))


@kinds
def test_selection_on_a_quantised_model_is_that_of_its_decoded_experts(kind):
    model, _ = quantised("olmoe", kind)
    batches = [padded(2, 9, s) for s in range(3)]
    got, expected = (select_experts(m, batches, "reference") for m in (model, decoded("olmoe", kind)))
    for one, two in zip(got.layers, expected.layers):
        assert one.errors == pytest.approx(two.errors, rel=1e-5)


def test_calibration_is_answered_by_the_experts_before_they_are_quantised():
    batches = [padded(2, 9, s) for s in range(3)]
    model = tiny("mixtral")
    report = graft(model, batches, experts="nf4", backend="reference")
    assert report.selection == select_experts(tiny("mixtral"), batches, "reference")


@kinds
def test_a_quantised_model_that_is_not_grafted_runs_on_the_registered_implementation(kind):
    model, plain = tiny("qwen3_moe"), decoded("qwen3_moe", kind)
    for block, _ in find_blocks(model).values():
        quantize_experts(block.experts, kind)
    for m in (model, plain):
        m.set_experts_implementation(NAME)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    report = graft(model, start=[1, 1], backend="reference")
    assert report.experts == kind and report.expert_bytes == report.expert_bytes_before


@kinds
@backends
def test_only_the_personal_part_gets_gradients_and_they_are_those_over_decoded_weights(kind, backend):
    model, _ = quantised("mixtral", kind, backend)
    plain = decoded("mixtral", kind)
    graft(plain, start=[1, 1], backend=backend)
    for m in (model, plain):
        m(tokens(), labels=tokens()).loss.backward()
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (".personal." in name)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("personal", ["full", "lora"])
def test_a_quantised_block_compiles_in_one_graph(personal):
    torch.compiler.reset()
    model, _ = quantised("qwen2_moe", "nf4", runnable_backends()[-1], personal=personal)
    block = grafted_blocks(model)["model.layers.1.mlp"]
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


@kinds
def test_a_change_of_dtype_leaves_codes_and_scales_alone(kind):
    model, _ = quantised("mixtral", kind, personal="lora")
    expected = copy.deepcopy(model).state_dict()
    model.to(torch.bfloat16)
    for name, t in model.state_dict().items():
        if name.endswith((".codes", ".scales")):
            assert torch.equal(t, expected[name])
    assert model(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "int4"}, "experts='int4' is not one of None, 'int8', 'nf4'"),
        ({"experts": [0, 0]}, r"experts=\[0, 0\] is not one of None"),
        ({"experts": "nf4", "start": [0]}, "start has 1 indices"),
    ],
)
def test_a_refused_precision_leaves_the_model_as_it_was(options, message):
    model = tiny("mixtral")
    with pytest.raises(ValueError, match=message):
        graft(model, **({"start": [0, 0]} | options))
    assert not any(isinstance(m, GraftedBlock | QuantizedWeight) for m in model.modules())


def test_a_weight_that_is_not_finite_is_named_before_anything_is_quantised():
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"down of expert 3 of layer model.layers.1.mlp has values"):
        graft(model, start=[0, 0], experts="nf4")
    assert not any(isinstance(m, QuantizedWeight) for m in model.modules())


def test_codes_of_one_kind_are_not_turned_into_another():
    model = tiny("mixtral")
    for block, _ in find_blocks(model).values():
        quantize_experts(block.experts, "int8")
    with pytest.raises(
        ValueError, match="experts='nf4': the model's routed experts are quantised already, to 'int8'"
    ):
        graft(model, start=[0, 0], experts="nf4")


def test_layers_held_in_different_ways_are_refused():
    model = tiny("mixtral")
    quantize_experts(model.model.layers[0].mlp.experts, "int8")
    with pytest.raises(ValueError, match=r"held in different ways \(int8, plain\)"):
        graft(model, start=[0, 0])
