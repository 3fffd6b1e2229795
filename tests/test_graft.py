"""Grafting: shut gates give the original, an open gate adds exactly g E_p(x), nothing pretrained moves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, padded, runnable_backends, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import flex_kernels
from flex.block import GraftedBlock, gates_shut, grafted_blocks
from flex.grafting import graft, personalize
from flex.models import Unsupported, find_blocks
from flex.personal import PersonalLoRA
from flex.watch import record_gates
from flex_kernels import reference

BACKENDS = runnable_backends()
backends = pytest.mark.parametrize("backend", BACKENDS)


def layers_of(architecture):
    return len(find_blocks(tiny(architecture)))


def grafted(architecture, backend="reference", **options):
    model = tiny(architecture)
    graft(model, start=[1] * layers_of(architecture), backend=backend, **options)
    return model


def logits_and_gradient(model, dtype):
    """Logits at real tokens, and the gradient of a fixed functional of them in the input embeddings."""
    batch = padded()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
    keep = batch["attention_mask"].bool()
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        dtype
    )
    (gradient,) = torch.autograd.grad((logits * cotangent)[keep].sum(), embeddings)
    return logits[keep].detach(), gradient[keep]


@backends
@pytest.mark.parametrize("shut", ["by the context", "by the bias", "no personal expert"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_shut_gates_the_grafted_model_is_the_original(architecture, shut, backend):
    exact = logits_and_gradient(tiny(architecture).double(), torch.float64)
    eager = logits_and_gradient(tiny(architecture), torch.float32)
    if shut == "no personal expert":
        model = tiny(architecture)
        graft(model, personal=None, backend=backend)
        mine = logits_and_gradient(model, torch.float32)
    else:
        model = grafted(architecture, backend)
        assert (logits_and_gradient(model, torch.float32)[0] - eager[0]).abs().max() > 0.1
        if shut == "by the context":
            with gates_shut(model):
                mine = logits_and_gradient(model, torch.float32)
        else:
            for block in grafted_blocks(model).values():
                nn.init.constant_(block.personal.gate_bias, -1e4)
            mine = logits_and_gradient(model, torch.float32)
    for got, plain, truth in zip(mine, eager, exact):
        assert (got - truth).abs().max() <= 4 * (plain - truth).abs().max()


@backends
@pytest.mark.parametrize("mix", ["add", "convex"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_open_gate_adds_exactly_its_share_of_the_personal_expert(architecture, mix, backend):
    model = grafted(architecture, backend, mix=mix)
    name, block = list(grafted_blocks(model).items())[-1]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in block.personal.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(2, 5, 32, generator=generator)
    stock = tiny(architecture).get_submodule(name)
    with torch.no_grad():
        r, p = stock.double()(x.double()), {n: t.double() for n, t in block.personal.named_parameters()}
        gate, up = (x.double() @ p["gate_up"].T).chunk(2, -1)
        expert = (F.silu(gate) * up) @ p["down"].T
        g = torch.sigmoid(x.double() @ p["gate_weight"] + p["gate_bias"])[..., None]
        expected = (r if mix == "add" else (1 - g) * r) + g * expert
        got = block(x)
    assert (g.min() > 0.05 and g.max() < 0.95) or g.std() > 0.05
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("personal", ["full", "lora", None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_weights_keep_their_names_values_and_are_frozen(architecture, personal):
    model = tiny(architecture)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    places = {n: t.data_ptr() for n, t in model.named_parameters()}
    graft(model, personal=personal, start=None if personal is None else [2] * layers_of(architecture))
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    added = set(after) - set(before)
    assert all(".personal." in n for n in added) and bool(added) == (personal is not None)
    parameters = dict(model.named_parameters())
    for n in before.keys() & parameters.keys():
        assert not parameters[n].requires_grad
        restacked = "shared_expert" in n and ("gate_proj" in n or "up_proj" in n)
        assert restacked or parameters[n].data_ptr() == places[n]
    assert all(parameters[n].requires_grad for n in added & parameters.keys())


@backends
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_grafting_loses_no_more_than_transformers_does(architecture, backend):
    with torch.no_grad():
        exact = tiny(architecture).double()(tokens(4, 16)).logits
        model = tiny(architecture).bfloat16()
        eager = model(tokens(4, 16)).logits
        graft(model, personal=None, backend=backend)
        mine = model(tokens(4, 16)).logits
    # By the median token: one near a tie may go to another expert, on either side.
    error, plain = ((logits - exact).norm(dim=-1).median() for logits in (mine, eager))
    assert error <= 1.2 * plain


def test_a_personal_expert_begins_as_a_copy_gated_by_its_router_row():
    model = tiny("qwen2_moe")
    report = graft(model, start=[4, 2])
    for block, expert in zip(grafted_blocks(model).values(), (4, 2)):
        assert torch.equal(block.personal.gate_up, block.experts.gate_up_proj[expert])
        assert torch.equal(block.personal.down, block.experts.down_proj[expert])
        assert torch.equal(block.personal.gate_weight, block.gate.weight[expert])
        assert block.personal.gate_bias == 0 and int(block.personal.expert) == expert
    assert report.start == {"model.layers.0.mlp": 4, "model.layers.1.mlp": 2}
    assert report.trainable == 2 * (3 * 24 * 32 + 32 + 1)
    assert report.trainable + report.frozen == sum(p.numel() for p in model.parameters())


def test_calibration_decides_and_the_report_shows_the_errors():
    model = tiny("mixtral")
    report = graft(model, [padded(2, 9, s) for s in range(3)], backend="reference")
    assert list(report.start.values()) == report.selection.experts
    assert [int(b.personal.expert) for b in grafted_blocks(model).values()] == report.selection.experts
    assert report.to_dict()["selection"]["model.layers.0.mlp"]["expert"] == report.selection.experts[0]
    assert report.table() == report.selection.table()
    assert graft(tiny("mixtral"), start=[0, 5]).table()[1:] == [
        ("model.layers.0.mlp", "0"),
        ("model.layers.1.mlp", "5"),
    ]


def test_personal_matrices_take_the_dtype_asked_for_and_gates_stay_float32():
    model = tiny("mixtral").bfloat16()
    graft(model, start=[0, 0], personal_dtype=torch.float32)
    personal = grafted_blocks(model)["model.layers.0.mlp"].personal
    assert {n: p.dtype for n, p in personal.named_parameters()} == dict.fromkeys(
        ("gate_up", "down", "gate_weight", "gate_bias"), torch.float32
    )
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert personal.gate_up.grad.dtype == torch.float32 and personal.gate_up.grad.abs().max() > 0
    plain = tiny("mixtral").bfloat16()
    graft(plain, start=[0, 0])
    personal = grafted_blocks(plain)["model.layers.0.mlp"].personal
    assert personal.down.dtype == torch.bfloat16 and personal.gate_weight.dtype == torch.float32


@backends
def test_a_low_rank_personal_expert_begins_as_the_expert_itself(backend):
    full, low = grafted("mixtral", backend), grafted("mixtral", backend, personal="lora", rank=3)
    with torch.no_grad():
        assert torch.equal(full(tokens()).logits, low(tokens()).logits)


def test_a_low_rank_personal_expert_is_the_sum_and_trains_only_its_factors():
    model = grafted("mixtral", personal="lora", rank=3, alpha=6.0)
    block = grafted_blocks(model)["model.layers.1.mlp"]
    lora = block.personal
    assert (
        isinstance(lora, PersonalLoRA)
        and sum(p.numel() for p in lora.parameters()) == 3 * (32 + 56 + 28 + 32) + 33
    )
    with torch.no_grad():
        lora.gate_up_out.normal_(generator=torch.Generator().manual_seed(2))
        lora.down_out.normal_(generator=torch.Generator().manual_seed(3))
    record = lora.record_over(block.adapter.experts(block))
    expected = (
        block.experts.gate_up_proj[1].double() + 2 * lora.gate_up_out.double() @ lora.gate_up_in.double()
    )
    torch.testing.assert_close(record.gate_up.double(), expected, rtol=1e-5, atol=1e-5)
    model(tokens(), labels=tokens()).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {
        n for n, p in model.named_parameters() if ".personal." in n and not n.startswith("x")
    } - {f"model.layers.0.mlp.personal.{part}_in" for part in ("gate_up", "down")}


@pytest.mark.parametrize("personal", ["full", "lora"])
def test_personalize_restarts_in_the_tensors_that_exist(personal):
    model = grafted("mixtral", personal=personal, generator=torch.Generator().manual_seed(0))
    fresh = tiny("mixtral")
    graft(
        fresh,
        start=[5, 3],
        personal=personal,
        backend="reference",
        generator=torch.Generator().manual_seed(9),
    )
    tensors = {n: p for n, p in model.named_parameters() if ".personal." in n}
    with torch.no_grad():
        for p in tensors.values():
            p.add_(1.0)
    places = {n: p.data_ptr() for n, p in tensors.items()}
    personalize(model, [5, 3], generator=torch.Generator().manual_seed(9))
    assert {n: p.data_ptr() for n, p in model.named_parameters() if ".personal." in n} == places
    expected = fresh.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, fresh(tokens()).logits)


@backends
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_of_a_shut_model_is_the_originals(architecture, backend):
    model = grafted(architecture, backend)
    options = dict(max_new_tokens=6, do_sample=False)
    with gates_shut(model):
        got = model.generate(**padded(), **options)
    assert torch.equal(got, tiny(architecture).generate(**padded(), **options))


@backends
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_router_logits_are_still_recorded_and_the_balance_loss_with_them(architecture, backend):
    model, stock = grafted(architecture, backend), tiny(architecture)
    with gates_shut(model):
        got = model(tokens(), labels=tokens(), output_router_logits=True)
    expected = stock(tokens(), labels=tokens(), output_router_logits=True)
    assert len(got.router_logits) == 2
    torch.testing.assert_close(got.router_logits, expected.router_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize(
    ("architecture", "recorded"), [("mixtral", False), ("mixtral", True), ("deepseek_v3_groups", False)]
)
def test_a_checkpoints_replay_does_not_route_again(architecture, recorded, backend, monkeypatch):
    model = grafted(architecture, backend).train()
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": flex_kernels.checkpoint_contexts}
    )
    chosen = []
    home = reference if backend == "reference" else __import__(f"flex_kernels.{backend}", fromlist=["x"])
    attribute = "routed_sum" if backend == "reference" else "experts_forward"
    original = getattr(home, attribute)

    def spy(x_TH, ids_TK, *rest):
        chosen.append((x_TH.detach().clone(), ids_TK.detach().clone()))
        return original(x_TH, ids_TK, *rest)

    monkeypatch.setattr(home, attribute, spy)
    calls = []

    def turn_around_on_replay(module, args, output):
        calls.append(1)
        return output * (-1.0 if len(calls) > 1 else 1.0)

    model.model.layers[-1].post_attention_layernorm.register_forward_hook(turn_around_on_replay)
    options = {"output_router_logits": True} if recorded else {}
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, **options).logits.square().sum()
    forward = list(chosen)
    loss.backward()
    (x_then, ids_then), (x_now, ids_now) = forward[-1], chosen[len(forward)]
    assert len(calls) == 2 and torch.equal(x_now, -x_then)
    assert torch.equal(ids_now, ids_then)


@backends
def test_checkpointing_changes_no_gradient(backend):
    plain, saving = grafted("qwen2_moe", backend).train(), grafted("qwen2_moe", backend).train()
    saving.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": flex_kernels.checkpoint_contexts}
    )
    for model in (plain, saving):
        model(tokens(), labels=tokens()).loss.backward()
    for (n, p), q in zip(plain.named_parameters(), saving.parameters()):
        if p.requires_grad:
            assert torch.equal(p.grad, q.grad), n


@pytest.mark.parametrize(
    ("architecture", "personal"), [("mixtral", "full"), ("qwen2_moe", "lora"), ("deepseek_v3_groups", "full")]
)
def test_a_grafted_block_compiles_in_one_graph(architecture, personal):
    torch.compiler.reset()
    model = grafted(architecture, BACKENDS[-1], personal=personal)
    block = list(grafted_blocks(model).values())[-1]
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_a_deep_copy_is_independent_and_computes_the_same():
    model = grafted("qwen2_moe")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(tokens()).logits
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(tokens()).logits, expected)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_save_pretrained_of_a_grafted_model_holds_the_original(architecture, tmp_path):
    model = grafted(architecture)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    stock = tiny(architecture)
    assert again.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in stock.state_dict().items())


def test_recorded_gates_are_the_mean_opening_without_padding():
    model, batch = grafted("mixtral"), padded()
    inputs = {}
    for name, block in grafted_blocks(model).items():
        block.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad(), record_gates(model) as openings:
        model(**batch)
        model(**batch)
    keep = batch["attention_mask"].bool()
    for name, block in grafted_blocks(model).items():
        g = torch.sigmoid(inputs[name][keep].double() @ block.personal.gate_weight.detach().double())
        total, count = openings[name]
        assert count == 2 * int(keep.sum())
        assert total == pytest.approx(2 * float(g.sum()), rel=1e-5)
    model(**batch)
    assert openings["model.layers.0.mlp"][1] == 2 * int(keep.sum())


def test_recorded_gates_follow_the_mask_through_generation():
    model, batch = grafted("mixtral"), padded(2, 9)
    with record_gates(model) as openings:
        length = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1]
    assert length == 12
    assert openings["model.layers.1.mlp"][1] == 18 - 4 + 2 * 2


def test_shut_gates_open_again_even_after_an_error():
    model = grafted("mixtral")
    with pytest.raises(KeyError), gates_shut(model):
        assert all(block.shut for block in grafted_blocks(model).values())
        raise KeyError
    assert not any(block.shut for block in grafted_blocks(model).values())


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model must be a loaded Hugging Face model, got str"):
        graft("mistralai/Mixtral-8x7B-v0.1", start=[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give one of calibration.*got neither"),
        ({"start": [0, 0], "calibration": [tokens()]}, ValueError, "got both"),
        (
            {"start": [0, 0], "personal": None},
            ValueError,
            "personal=None makes no personal experts, so start",
        ),
        ({"start": [0]}, ValueError, "start has 1 indices, the model has 2 MoE layers"),
        ({"start": [0, 6]}, ValueError, "6 is not an expert of layer model.layers.1.mlp, which has 0 to 5"),
        ({"start": [0, -1]}, ValueError, "-1 is not an expert"),
        ({"start": [0, True]}, ValueError, "True is not an expert"),
        ({"start": 3}, TypeError, "a list of 2 indices, got int"),
        ({"start": [0, 0], "mix": "sum"}, ValueError, "mix='sum' is not one of 'add', 'convex'"),
        ({"start": [0, 0], "save": "all"}, ValueError, "save='all'"),
        ({"start": [0, 0], "personal": "half"}, ValueError, "personal='half' is not one of 'full', 'lora'"),
        ({"start": [0, 0], "rank": 0}, ValueError, "rank=0"),
        ({"start": [0, 0], "rank": True}, ValueError, "rank=True"),
        ({"start": [0, 0], "alpha": "x"}, ValueError, "alpha='x' must be a number above 0, and finite"),
        ({"start": [0, 0], "alpha": float("nan")}, ValueError, "alpha=nan must be a number above 0"),
        ({"start": [0, 0], "backend": "tpu"}, ValueError, "backend='tpu'"),
        ({"start": [0, 0], "personal_dtype": torch.int8}, TypeError, "personal_dtype=torch.int8"),
        (
            {"start": [0, 0], "personal_dtype": "float32"},
            TypeError,
            "personal_dtype='float32' is not one of torch",
        ),
        ({"calibration": []}, ValueError, "holds no batch"),
        ({"calibration": [{"ids": tokens()}]}, ValueError, "batch 0 must have input_ids"),
    ],
)
def test_a_refused_graft_leaves_the_model_as_it_was(options, error, message):
    model = tiny("mixtral")
    with pytest.raises(error, match=message):
        graft(model, **({"backend": "reference"} | options))
    assert not any(isinstance(m, GraftedBlock) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_calibration_through_broken_weights_names_the_layer_and_changes_nothing():
    model = tiny("mixtral")
    nn.init.constant_(model.model.layers[0].input_layernorm.weight, float("nan"))
    with pytest.raises(ValueError, match=r"input of layer model.layers.0.mlp is not finite"):
        graft(model, [tokens()], backend="reference")
    assert not any(isinstance(m, GraftedBlock) for m in model.modules())


def test_grafting_twice_points_to_personalize():
    model = grafted("mixtral")
    with pytest.raises(ValueError, match=r"already grafted: flex.personalize"):
        graft(model, start=[0, 0])


def test_personalize_needs_personal_experts_and_a_selection_of_the_same_layers():
    with pytest.raises(ValueError, match="MixtralForCausalLM is not grafted"):
        personalize(tiny("mixtral"), [0, 0])
    bare = tiny("mixtral")
    graft(bare, personal=None)
    with pytest.raises(ValueError, match=r"layer model.layers.0.mlp has no personal expert"):
        personalize(bare, [0, 0])
    other = graft(tiny("deepseek_v2"), [tokens()], backend="reference").selection
    with pytest.raises(ValueError, match="the selection is of the layers"):
        personalize(grafted("mixtral"), other)


def test_a_model_without_experts_is_refused():
    with pytest.raises(Unsupported, match="Linear has no MoE block"):
        graft(nn.Linear(3, 3), start=[0])
