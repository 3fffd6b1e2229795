"""The fused layer inside transformers' own MoE blocks, chosen by name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from tiny_models import ARCHITECTURES, BUILDERS, padded, tiny, tokens
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import flex
from flex.experts_implementation import NAME, experts_forward, register
from flex.models import Unsupported, find_blocks


def logits_and_gradients(model, dtype):
    """Logits, and the gradients in the embeddings and in a router, of a fixed functional at real tokens."""
    batch = padded()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
    keep = batch["attention_mask"].bool()
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        dtype
    )
    *_, (block, adapter) = find_blocks(model).values()
    router = adapter.gate(block).weight
    d_embeddings, d_router = torch.autograd.grad((logits * cotangent)[keep].sum(), (embeddings, router))
    return logits[keep].detach(), d_embeddings[keep], d_router


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_computes_what_its_eager_experts_do(architecture):
    exact = logits_and_gradients(tiny(architecture).double(), torch.float64)
    eager = logits_and_gradients(tiny(architecture), torch.float32)
    model = tiny(architecture)
    model.set_experts_implementation(NAME)
    assert model.config._experts_implementation == NAME
    for got, plain, truth in zip(logits_and_gradients(model, torch.float32), eager, exact):
        assert (got - truth).abs().max() <= 4 * (plain - truth).abs().max()


def test_frozen_experts_get_no_gradient_and_the_router_does():
    model = tiny("mixtral")
    model.set_experts_implementation(NAME)
    for parameter in model.model.layers[0].mlp.experts.parameters():
        parameter.requires_grad_(False)
    model(tokens(), labels=tokens()).loss.backward()
    block = model.model.layers[0].mlp
    assert block.experts.down_proj.grad is None and block.gate.weight.grad.abs().max() > 0


def test_the_configs_field_chooses_it_at_loading(tmp_path):
    stock = tiny("mixtral")
    stock.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=NAME)
    assert model.config._experts_implementation == NAME
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, stock(tokens()).logits, rtol=1e-4, atol=1e-4)
    model_class, config_class, settings = BUILDERS["mixtral"]
    assert (
        model_class(config_class(**settings, experts_implementation=NAME)).config._experts_implementation
        == NAME
    )


def test_the_sentinel_id_contributes_nothing():
    experts = tiny("mixtral").model.layers[0].mlp.experts
    x_TH = torch.randn(4, 32)
    ids_TK = torch.tensor([[0, 6], [6, 6], [3, 5], [6, 2]])
    weights_TK = torch.rand(4, 2)
    got = experts_forward(experts, x_TH, ids_TK, weights_TK)
    eager = torch.zeros(4, 32, dtype=torch.float64)
    for t, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK)):
        for e, w in zip(ids, weights):
            if e < 6:
                gate, up = (experts.gate_up_proj[e].double() @ x_TH[t].double()).chunk(2)
                eager[t] += w.double() * (
                    experts.down_proj[e].double() @ (torch.nn.functional.silu(gate) * up)
                )
    torch.testing.assert_close(got.double(), eager, rtol=1e-5, atol=1e-5)
    assert (got[1] == 0).all()


@pytest.mark.parametrize(
    ("overrides", "message"), [({"hidden_act": "gelu"}, "MixtralExperts uses the activation GELUActivation")]
)
def test_another_activation_is_refused_when_it_runs(overrides, message):
    model = tiny("mixtral", **overrides)
    model.set_experts_implementation(NAME)
    with pytest.raises(Unsupported, match=message):
        model(tokens())


@pytest.mark.parametrize(
    ("flag", "value"), [("has_bias", True), ("is_transposed", True), ("has_gate", False)]
)
def test_another_layout_is_refused_when_it_runs(flag, value):
    model = tiny("mixtral")
    model.set_experts_implementation(NAME)
    setattr(model.model.layers[0].mlp.experts, flag, value)
    with pytest.raises(Unsupported, match=f"{flag}={value}"):
        model(tokens())


def test_generation_keeps_the_implementation_and_the_tokens():
    model = tiny("olmoe")
    expected = model.generate(**padded(), max_new_tokens=5, do_sample=False)
    model.set_experts_implementation(NAME)
    assert torch.equal(model.generate(**padded(), max_new_tokens=5, do_sample=False), expected)
    assert model.config._experts_implementation == NAME


def test_import_flex_registers_it_when_transformers_comes_later():
    code = (
        "import flex\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as functions\n"
        "print('flex_kernels' in functions)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_import_flex_registers_it_when_transformers_is_there():
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop(NAME)
    importlib.reload(flex)
    assert ALL_EXPERTS_FUNCTIONS[NAME] is experts_forward


def test_import_flex_does_not_import_transformers_or_torch():
    code = "import flex, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_again_does_no_harm():
    register()
    tiny("mixtral").set_experts_implementation(NAME)
