"""What stays home and what travels: names, copies, files, and every way a state may fail to fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny, tokens

from flex.block import grafted_blocks
from flex.grafting import graft
from flex.lora import add_lora
from flex.state import (
    load_personal,
    load_shared,
    mark_local,
    personal_state,
    save_personal,
    shared_state,
)

PARTS = ("down", "expert", "gate_bias", "gate_up", "gate_weight")


def client(personal="full", experts=(1, 3), seed=0):
    model = tiny("mixtral")
    torch.manual_seed(seed)
    graft(model, start=list(experts), backend="reference", personal=personal)
    add_lora(model, rank=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    return model


def snapshot(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def test_personal_and_shared_states_name_their_parts_and_share_none():
    model = client()
    personal, shared = personal_state(model), shared_state(model)
    assert sorted(personal) == [f"model.layers.{i}.mlp.personal.{part}" for i in (0, 1) for part in PARTS]
    assert sorted(shared) == sorted(
        f"model.layers.{i}.self_attn.{m}_proj.lora_{ab}.default.weight"
        for i in (0, 1)
        for m in "qkvo"
        for ab in "AB"
    )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n in personal | shared if not n.endswith(".expert")}


def test_a_state_is_a_copy():
    model = client()
    state = personal_state(model) | shared_state(model)
    before = {n: t.clone() for n, t in state.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(state[n], t) and not t.requires_grad for n, t in before.items())


@pytest.mark.parametrize("personal", ["full", "lora"])
def test_one_model_becomes_another_client_and_back_through_files(personal, tmp_path):
    model, other = client(personal), client(personal, experts=(5, 0), seed=4)
    with torch.no_grad():
        expected = other(tokens()).logits
        mine = model(tokens()).logits
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    save_personal(model, tmp_path / "me.safetensors")
    shared = shared_state(model)
    save_personal(other, tmp_path / "other.safetensors")
    load_personal(model, tmp_path / "other.safetensors")
    load_shared(model, shared_state(other))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected)
        load_personal(model, str(tmp_path / "me.safetensors"))
        load_shared(model, shared)
        assert torch.equal(model(tokens()).logits, mine)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places


def test_a_low_rank_expert_loaded_by_state_dict_stands_over_the_right_base():
    model, other = client("lora"), client("lora", experts=(5, 0), seed=4)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_marked_adapters_stay_home():
    model = client()
    local = mark_local(model, lambda name: ".lora_B." in name)
    assert len(local) == 8 and all(".lora_B." in n for n in local)
    assert set(local) <= personal_state(model).keys()
    assert all(".lora_A." in n for n in shared_state(model)) and len(shared_state(model)) == 8
    load_personal(model, personal_state(model))
    load_shared(model, shared_state(model))
    mark_local(model, lambda name: False)
    assert len(shared_state(model)) == 16


def test_names_do_not_change_under_torch_compile():
    model = client()
    compiled = torch.compile(model)
    assert personal_state(compiled).keys() == personal_state(model).keys()
    assert shared_state(compiled).keys() == shared_state(model).keys()
    load_personal(compiled, personal_state(model))


KEY = "model.layers.1.mlp.personal.down"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(KEY), r"1 missing \(model.layers.1.mlp.personal.down\)"),
        (lambda s: s.update(stranger=torch.ones(1)), r"1 unknown to this model \(stranger\)"),
        (lambda s: s.clear(), r"10 missing \(.*, \.\.\.\)"),
        (lambda s: s.update({KEY: s[KEY].T.contiguous()}), rf"{KEY} is \[28, 32\].*the model has \[32, 28\]"),
        (lambda s: s.update({KEY: s[KEY].half()}), rf"{KEY} is .*float16, the model has .*float32"),
        (
            lambda s: s[KEY].view(-1)[5:7].fill_(float("nan")),
            rf"{KEY} \[32, 28\] has 2 values that are not finite",
        ),
        (lambda s: s[KEY].view(-1)[0].fill_(float("inf")), "has 1 values that are not finite"),
        (
            lambda s: s["model.layers.0.mlp.personal.expert"].fill_(6),
            "personal.expert is 6, the layer has experts 0 to 5",
        ),
    ],
)
@pytest.mark.parametrize("through", ["dict", "file"])
def test_a_personal_state_that_does_not_fit_is_refused_and_changes_nothing(
    change, message, through, tmp_path
):
    model = client()
    state, before = personal_state(client(experts=(0, 0), seed=3)), snapshot(model)
    change(state)
    source = state
    if through == "file":
        source = tmp_path / "bad.safetensors"
        save_file(state, source)
        message = "personal state in .*bad.safetensors.*" + message
    with pytest.raises(ValueError, match=message):
        load_personal(model, source)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("load", [load_personal, load_shared])
@pytest.mark.parametrize("source", [None, 3])
def test_a_source_that_is_neither_file_nor_dict_is_refused(load, source):
    message = f"state must be a file or a dict of tensors, got {type(source).__name__}"
    with pytest.raises(TypeError, match=message):
        load(client(), source)


def test_a_value_that_is_no_tensor_is_refused():
    model = client()
    with pytest.raises(ValueError, match=f"{KEY} must be a tensor, got float"):
        load_personal(model, personal_state(model) | {KEY: 3.0})


def test_a_shared_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = client()
    before, state = snapshot(model), shared_state(client(seed=8))
    name = next(iter(state))
    for bad in (
        {**state, name: state[name] * float("nan")},
        {**state, name: state[name][:1]},
        personal_state(model),
    ):
        with pytest.raises(ValueError, match="shared state"):
            load_shared(model, bad)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_client_with_nan_saves_nothing_over_its_file(tmp_path):
    model, path = client(), tmp_path / "p.safetensors"
    save_personal(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        grafted_blocks(model)["model.layers.0.mlp"].personal.gate_up[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers.0.mlp.personal.gate_up \[56, 32\] has 1 values"):
        save_personal(model, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert load_file(path).keys() == personal_state(model).keys()


def test_an_ungrafted_model_has_no_personal_state(tmp_path):
    model = tiny("mixtral")
    for attempt in (
        lambda: personal_state(model),
        lambda: load_personal(model, {}),
        lambda: save_personal(model, tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match=r"MixtralForCausalLM is not grafted: call flex.graft"):
            attempt()
    assert shared_state(model) == {}
    with pytest.raises(ValueError, match=r"no LoRA adapters: call flex.add_lora"):
        load_shared(model, {"a": torch.ones(1)})
