"""examples/own_loop.py, on a tiny model: it trains, what stays differs, what travels is one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

import flex

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_loop.py"


@pytest.fixture
def own_loop():
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_every_client_and_keeps_what_is_personal(own_loop, tmp_path):
    folder, home = tmp_path / "model", tmp_path / "home"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    losses = own_loop.train(str(folder), home, rounds=3, steps=4)
    assert len(losses) == 3
    for name in own_loop.TEXTS:
        assert losses[-1][name] < losses[0][name]
    first, second = (load_file(home / f"{name}.safetensors") for name in own_loop.TEXTS)
    assert first.keys() == second.keys() and all(".personal." in name for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_what_travels_survives_flower_s_messages():
    """docs/install.md: into a record and out of it."""
    flower = pytest.importorskip("flwr.app", reason="Flower is an extra of its own: pip install '.[flower]'")
    model = make_model()
    flex.graft(model, start=[0, 1])
    flex.add_lora(model)
    shared = flex.shared_state(model)
    received = flower.ArrayRecord(shared).to_torch_state_dict()
    assert list(received) == list(shared)
    assert all(torch.equal(received[name], t) for name, t in shared.items())
    flex.load_shared(model, received)
