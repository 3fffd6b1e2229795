"""The adapters: which blocks they know, what they read from them, what they refuse."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from flex.block import GraftedBlock
from flex.grafting import graft
from flex.models import ADAPTERS, Unsupported, adapter_for, find_blocks
from flex.models.base import weights_at

EXPECTED_ROUTERS = {
    "mixtral": (2, True, "softmax", 1.0),
    "qwen2_moe": (3, False, "softmax", 1.0),
    "qwen3_moe": (3, True, "softmax", 1.0),
    "olmoe": (3, False, "softmax", 1.0),
    "deepseek_v2": (3, False, "softmax", 1.7),
    "deepseek_v3": (3, True, "sigmoid", 1.7),
    "glm4_moe": (3, True, "sigmoid", 1.7),
    "ernie4_5_moe": (3, True, "softmax", 1.0),
    "granitemoe": (2, True, "softmax", 1.0),
    "flex_olmo": (3, False, "softmax", 1.0),
    "lfm2_moe": (3, True, "sigmoid", 1.7),
    "qwen3_next": (3, True, "softmax", 1.0),
}
BIASED = ("deepseek_v3", "glm4_moe", "ernie4_5_moe", "lfm2_moe")


@pytest.mark.parametrize("architecture", EXPECTED_ROUTERS)
def test_an_adapter_reads_the_settings_of_its_router(architecture):
    for block, adapter in find_blocks(tiny(architecture)).values():
        router = adapter.router(block)
        assert (router.top_k, router.normalize, router.score, router.scale) == EXPECTED_ROUTERS[architecture]
        assert router.weight is adapter.gate(block).weight
        assert (router.bias is not None) == (architecture in BIASED)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_layers_of_a_model_are_not_taken_for_moe_blocks(architecture):
    names = list(find_blocks(tiny(architecture)))
    first = 1 if architecture.startswith(("deepseek", "glm4", "dots1", "ernie", "lfm2")) else 0
    block = "block_sparse_moe" if architecture.startswith("granite") else "mlp"
    block = "feed_forward" if architecture.startswith("lfm2") else block
    assert names == [f"model.layers.{i}.{block}" for i in range(first, 2)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_at_the_chosen_ids_are_those_of_the_models_own_router(architecture):
    (block, adapter), *_ = find_blocks(tiny(architecture)).values()
    x_TH = torch.randn(11, 32, generator=torch.Generator().manual_seed(3))
    logits_TE, ids_TK = adapter.decide(block, x_TH)
    bias = (block.expert_bias,) if architecture == "lfm2_moe" else ()
    weights_TK = adapter.gate(block)(x_TH, *bias)[1]
    got_TK = weights_at(logits_TE, ids_TK, adapter.router(block), adapter.floor)
    torch.testing.assert_close(got_TK, weights_TK)


@pytest.mark.parametrize("architecture", ["deepseek_v2_groups", "deepseek_v3_groups", "dots1_groups"])
def test_group_limited_routing_differs_from_the_plain_choice_and_is_left_to_the_model(architecture):
    (block, adapter), *_ = find_blocks(tiny(architecture)).values()
    x_TH = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    routed = adapter.route(block, x_TH)
    own = block.gate(x_TH)[2].sort(-1).values
    assert torch.equal(routed.ids.sort(-1).values, own)
    plain = adapter.router(block)
    scores = torch.nn.functional.linear(x_TH, plain.weight)
    scores = scores.softmax(-1) if plain.bias is None else scores.sigmoid() + plain.bias
    assert not torch.equal(scores.topk(plain.top_k).indices.sort(-1).values, own)


def test_a_model_of_another_architecture_is_refused_by_its_class():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(Unsupported, match=r"LlamaForCausalLM has no MoE block.*mixtral.*deepseek_v3"):
        find_blocks(LlamaForCausalLM(config))


def test_a_strange_moe_block_is_named_in_the_refusal():
    class MyMoe(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    model = nn.Sequential(MyMoe())
    with pytest.raises(Unsupported, match="its block 0 is a MyMoe"):
        find_blocks(model)
    with pytest.raises(Unsupported, match=r"MyMoe is not the MoE block.*olmoe.*docs/add-a-model.md"):
        adapter_for(model[0])


def test_a_subclass_of_a_known_block_is_not_assumed_to_compute_the_same():
    class Changed(MixtralSparseMoeBlock):
        pass

    block = tiny("mixtral").model.layers[0].mlp
    assert adapter_for(block) is ADAPTERS[0]
    block.__class__ = Changed
    with pytest.raises(Unsupported, match="Changed"):
        adapter_for(block)


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("mixtral", {"hidden_act": "gelu"}, r"model.layers.0.mlp: MixtralExperts uses the activation GELU"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0.1 perturbs the router"),
        ("olmoe", {"hidden_act": "relu"}, r"activation ReLU.*hidden_act='silu'"),
        ("deepseek_v2", {"mlp_bias": True}, r"shared_experts.gate_proj has a bias \(mlp_bias=True\)"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, r"topk_method='noaux_tc' is not one of 'greedy'"),
    ],
)
def test_a_setting_the_layer_cannot_reproduce_is_refused_by_name(architecture, overrides, message):
    with pytest.raises(Unsupported, match=message):
        find_blocks(tiny(architecture, **overrides))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("has_bias", True, "expert biases"),
        ("has_gate", False, "ungated"),
        ("is_transposed", True, "transposed"),
        ("is_concatenated", False, "interleaved"),
    ],
)
def test_experts_of_another_layout_are_refused(flag, value, message):
    model = tiny("mixtral")
    setattr(model.model.layers[1].mlp.experts, flag, value)
    with pytest.raises(Unsupported, match=f"model.layers.1.mlp: MixtralExperts has {message}"):
        find_blocks(model)


def grafted(architecture: str, backend: str = "reference") -> GraftedBlock:
    block, adapter = list(find_blocks(tiny(architecture)).values())[-1]
    return GraftedBlock(block, adapter, backend=backend)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v3"])
def test_the_shared_experts_weights_become_views_of_one_memory(architecture):
    block = grafted(architecture)
    (module, _), stack = block.adapter.shared_parts(block), block.shared_gate_up
    assert module.gate_proj.weight.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
    assert torch.equal(stack, torch.cat((module.gate_proj.weight, module.up_proj.weight)))
    with torch.no_grad():
        module.up_proj.weight.fill_(3.0)
    assert (stack[module.gate_proj.weight.shape[0] :] == 3.0).all()


def test_a_shared_expert_that_moved_elsewhere_is_stacked_again():
    block = grafted("qwen2_moe")
    x = torch.randn(2, 5, 32)
    before = block(x)
    block.double()
    assert block.shared_gate_up.dtype == torch.float64
    torch.testing.assert_close(block(x.double()).float(), before)
    block.float()
    block.load_state_dict({k: v.clone() for k, v in block.state_dict().items()}, assign=True)
    block.shared_expert.up_proj.weight.data = block.shared_expert.up_proj.weight.data * 2
    assert (block(x) - before).abs().max() > 1e-3
    block.shared_expert.up_proj.weight.data = block.shared_expert.up_proj.weight.data / 2
    assert torch.equal(block(x), before)


def test_a_trained_shared_expert_gets_its_gradients():
    block = grafted("qwen2_moe")
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert getattr(block.shared_expert, part).weight.requires_grad
    x = torch.randn(2, 5, 32)
    block(x).square().sum().backward()
    stock = tiny("qwen2_moe").model.layers[1].mlp
    stock(x).square().sum().backward()
    for part in ("gate_proj", "up_proj", "down_proj"):
        mine, theirs = getattr(block.shared_expert, part), getattr(stock.shared_expert, part)
        torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_expert_tensors_is_an_error_and_not_ignored(when):
    model = tiny("mixtral")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    if when == "before":
        get_peft_model(model, config)
        with pytest.raises(Unsupported, match=r"layers.0.mlp: ParamWrapper has no .* parameter gate_up_proj"):
            graft(model, start=[0, 0])
    else:
        graft(model, start=[0, 0])
        wrapped = get_peft_model(model, config)
        with pytest.raises(Unsupported, match="experts is a ParamWrapper without gate_up_proj"):
            wrapped(torch.ones(1, 2, dtype=torch.long))


def test_an_adapter_on_the_shared_expert_is_an_error_and_not_ignored():
    block = grafted("qwen2_moe")
    block.shared_expert.gate_proj = nn.Sequential(block.shared_expert.gate_proj)
    with pytest.raises(Unsupported, match=r"shared_expert.gate_proj is Sequential, not a plain Linear"):
        block(torch.randn(1, 2, 32))
