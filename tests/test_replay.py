"""Gradient checkpointing as transformers enables it: the replay keeps the routing, or a warning is given."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import tiny, tokens

from flex.block import GraftedBlock, grafted_blocks
from flex.grafting import graft
from flex_kernels import checkpoint_contexts, reference


def routed_twice(model, monkeypatch) -> tuple[list, list]:
    """The ids of the last layer in a forward pass and in its replay, whose input is turned around."""
    chosen = []
    original = reference.routed_sum

    def spy(x_TH, ids_TK, *rest):
        chosen.append(ids_TK.tolist())
        return original(x_TH, ids_TK, *rest)

    monkeypatch.setattr(reference, "routed_sum", spy)
    calls = []

    def turn_around_on_replay(module, args, output):
        calls.append(1)
        return output * (-1.0 if len(calls) > 1 else 1.0)

    model.model.layers[-1].post_attention_layernorm.register_forward_hook(turn_around_on_replay)
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings).logits.square().sum()
    layers = len(chosen)
    loss.backward()
    assert len(calls) == 2, "the layer was not replayed"
    return chosen[layers - 1], chosen[layers]


def grafted(start=(1, 1), **options):
    model = tiny("mixtral")
    graft(model, start=list(start), backend="reference", **options)
    return model.train()


@pytest.mark.parametrize("given", [None, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("enabled", ["after the graft", "before the graft", "on a copy", "twice"])
def test_plain_checkpointing_of_a_grafted_model_does_not_route_again(given, enabled, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Later releases of transformers have another name for it, and keep this one until version 6.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_(en|dis)able` is deprecated")
        if enabled == "before the graft":
            model = tiny("mixtral")
            model.gradient_checkpointing_enable(given)
            graft(model, start=[1, 1], backend="reference")
        else:
            model = grafted()
            model = copy.deepcopy(model) if enabled == "on a copy" else model
            model.gradient_checkpointing_enable(given)
            if enabled == "twice":
                model.gradient_checkpointing_disable()
                model.gradient_checkpointing_enable(given)
    then, now = routed_twice(model.train(), monkeypatch)
    assert now == then


@pytest.mark.parametrize("given", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=str)
def test_checkpointing_that_routes_again_says_so(given):
    with pytest.warns(UserWarning, match=r"choose experts again.*without use_reentrant=True"):
        grafted().gradient_checkpointing_enable(given)
    model = tiny("mixtral")
    model.gradient_checkpointing_enable(given)
    with pytest.warns(UserWarning, match="choose experts again"):
        graft(model, start=[1, 1], backend="reference")


def test_a_context_of_the_users_own_is_left_alone():
    def mine():
        return checkpoint_contexts()

    model = grafted()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": mine})
    functions = {
        id(m._gradient_checkpointing_func): m._gradient_checkpointing_func
        for m in model.modules()
        if getattr(m, "gradient_checkpointing", False)
    }
    assert any(isinstance(m, GraftedBlock) and m.gradient_checkpointing for m in model.modules())
    (function,) = functions.values()
    assert function.keywords["context_fn"] is mine


def test_plain_checkpointing_changes_no_gradient():
    plain, saving = grafted(), grafted()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(tokens(), labels=tokens()).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
        if p.requires_grad:
            assert torch.equal(p.grad, q.grad), name


def kept(model):
    """What the layers ask the fused layer to keep of a call."""
    return {block.kept() for block in grafted_blocks(model).values()}


@pytest.mark.parametrize("before", [True, False], ids=["enabled before", "enabled after"])
def test_checkpointed_layers_keep_what_their_replay_computes(before):
    model = tiny("mixtral")
    if before:
        model.gradient_checkpointing_enable()
    graft(model, start=[1, 1], backend="reference")
    model.train()
    assert kept(model) == {"preact" if before else "auto"}
    model.gradient_checkpointing_enable()
    assert kept(model) == {"preact"}
    # Outside of training nothing is replayed.
    assert kept(model.eval()) == {"auto"}
    model.train().gradient_checkpointing_disable()
    assert kept(model) == {"auto"}


@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_what_is_asked_to_be_kept_is_kept(save):
    model = grafted(save=save)
    assert kept(model) == {save}
    model.gradient_checkpointing_enable()
    assert kept(model) == {save}
