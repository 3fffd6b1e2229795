"""LoRA on attention: where it goes, what it trains, with and without the graft."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, tiny, tokens

from flex.block import gates_shut, grafted_blocks
from flex.grafting import graft
from flex.lora import add_lora
from flex.models import Unsupported, find_blocks

LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
TARGETS = {
    "deepseek_v2": LATENT - {"q_a_proj", "q_b_proj"} | {"q_proj"},
    "deepseek_v2_groups": LATENT - {"q_a_proj", "q_b_proj"} | {"q_proj"},
    "deepseek_v3": LATENT,
    "deepseek_v3_groups": LATENT,
}


# Models of another kind of layer before the attention.
HYBRIDS = {
    "lfm2_moe": {"0.conv.in_proj", "0.conv.out_proj"}
    | {f"1.self_attn.{t}_proj" for t in ("q", "k", "v", "out")},
    "qwen3_next": {"0.linear_attn.in_proj_qkvz", "0.linear_attn.in_proj_ba", "0.linear_attn.out_proj"}
    | {f"1.self_attn.{t}_proj" for t in "qkvo"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("first", ["lora", "graft"])
def test_attention_is_adapted_before_or_after_grafting(architecture, first):
    model = tiny(architecture)
    own_class, layers = type(model), len(find_blocks(model))
    with torch.no_grad():
        before = model(tokens()).logits

    def do_graft():
        graft(model, start=[0] * layers, backend="reference")

    if first == "graft":
        do_graft()
    names = add_lora(model, rank=3)
    if first == "lora":
        do_graft()
    wanted = TARGETS.get(architecture, {"q_proj", "k_proj", "v_proj", "o_proj"})
    both = {f"{i}.self_attn.{t}" for i in (0, 1) for t in wanted}
    assert type(model) is own_class
    assert set(names) == {f"model.layers.{name}" for name in HYBRIDS.get(architecture, both)}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".lora_" in n or ".personal." in n}
    with torch.no_grad(), gates_shut(model):
        torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-4)
    model(tokens(), labels=tokens()).loss.backward()
    gradients = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert gradients == {n for n in trainable if ".lora_A." not in n}


def test_adapters_of_a_bfloat16_model_are_float32():
    model = tiny("mixtral").bfloat16()
    graft(model, start=[0, 0], personal_dtype=torch.float32)
    add_lora(model, rank=2)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    out = model(tokens(), labels=tokens())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    lora_B = model.model.layers[0].self_attn.q_proj.lora_B.default.weight
    assert lora_B.grad.dtype == torch.float32 and lora_B.grad.abs().max() > 0


def test_an_adapter_adds_its_scaled_product():
    model = tiny("mixtral")
    add_lora(model, rank=2, alpha=6.0, targets=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B.default.weight.normal_()
        x = torch.randn(5, 32)
        A, B = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
        expected = x.double() @ (layer.base_layer.weight.double() + 3 * B @ A).T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_chosen_targets_only():
    names = add_lora(tiny("mixtral"), targets=["v_proj"])
    assert names == ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")
    assert add_lora(tiny("mixtral"), targets="v_proj") == names


def test_pefts_own_wrapper_works_on_a_grafted_model():
    model = tiny("mixtral")
    graft(model, start=[2, 2], backend="reference")
    with torch.no_grad():
        before = model(tokens()).logits
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    out = wrapped(input_ids=tokens(), labels=tokens())
    torch.testing.assert_close(out.logits.detach(), before)
    out.loss.backward()
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in wrapped.named_parameters() if "lora_B" in n
    )
    assert len(grafted_blocks(wrapped)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        (
            {"targets": ["q_proj", "w_pack"]},
            "no Linear module is called w_pack; Qwen2MoeForCausalLM has .*q_proj",
        ),
        ({"targets": ["up_proj"]}, r"model.layers.0.mlp.shared_expert.up_proj lies inside an MoE block"),
        ({"targets": []}, "targets"),
    ],
)
def test_a_refused_call_leaves_the_model_as_it_was(options, message):
    model = tiny("qwen2_moe")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


def test_adapters_are_added_once():
    model = tiny("mixtral")
    add_lora(model)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(model)


def test_another_architecture_is_refused():
    with pytest.raises(Unsupported, match="Linear has no MoE block"):
        add_lora(torch.nn.Linear(2, 2))
