"""examples/own_loop.py, on a tiny model: it trains, what stays differs, what travels is one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

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
