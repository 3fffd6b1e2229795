"""The proof of size, tiny: every byte is accounted for, and a random model guesses and learns."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.full_size import Drawn, Size, batches, configuration, feedback_ids, make_model, prove, shown
from flex_kernels.cpu import ops
from flex_kernels.precision import int8_products_allowed

TINY = Size(
    layers=2, hidden=128, heads=2, experts=6, width=96, shared_width=160, vocabulary=500, rank=4, tokens=48,
    rows=2, steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return prove(TINY, threads=1)


def test_the_full_configuration_has_14_billion_weights():
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(configuration(Size()))
    assert model.num_parameters() == 14_315_784_192


def test_all_weights_of_the_model_are_there_and_none_of_them_is_trained(result):
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(configuration(TINY))
    assert result["weights"] == model.num_parameters()
    # LoRA of rank 8 on four square matrices; rank 4 on the personal expert's two; a gate with its bias.
    lora, personal, gate = 4 * 2 * 8 * 128, 4 * (128 + 192 + 96 + 128), 128 + 1
    assert result["trained"] == 2 * (lora + personal + gate)


def test_memory_by_part_is_what_the_shapes_say(result):
    parts = result["memory_by_part_bytes"]
    weights = 2 * 6 * 3 * 96 * 128
    assert parts["routed experts, codes"] == weights // 2
    # Groups of 64: two in a row of 128, two in a row of 96.
    assert parts["routed experts, scales"] == 2 * 6 * 2 * (192 * 2 + 128 * 2)
    # int8: a byte a weight, two a row of [320, 128] and [128, 160].
    assert parts["shared experts"] == 2 * (3 * 160 * 128 + 2 * (320 + 128))
    assert parts["attention"] == 2 * 2 * (4 * 128 * 128 + 3 * 128)
    assert parts["embeddings and output layer"] == 2 * 2 * 500 * 128
    assert parts["personal experts, decoded"] == 2 * 2 * 3 * 96 * 128
    assert parts["gradients"] == 4 * result["trained"] == parts["optimiser state"] // 2
    assert sum(parts.values()) == result["peak_by_phase_bytes"]["training"]
    assert parts["the rest"] > 0 and result["peak_bytes"] >= max(result["peak_by_phase_bytes"].values())


def test_a_random_model_guesses_and_learns_what_it_is_shown(result):
    assert result["loss_before"] == pytest.approx(math.log(500), abs=0.2)
    assert result["loss_after"] < result["loss_before"]
    assert len(result["seconds_a_step"]) == 2 and result["tokens_per_second"] > 0
    assert "pretrained weights" in shown(result)


def test_steps_with_int8_products_follow_where_the_processor_has_them(result):
    products = result["with_int8_products"]
    has_them = hasattr(ops.kernels, "multiplies_int8") and ops.kernels.multiplies_int8()
    assert (products is not None) == has_them and not int8_products_allowed()
    if products:
        assert products["loss_after"] < result["loss_after"] and len(products["seconds_a_step"]) == 2
        assert "int8 products" in shown(result)


def test_a_full_personal_expert_is_counted_as_trained():
    parts = prove(replace(TINY, personal="full", steps=1, kind="int8"), threads=1)["memory_by_part_bytes"]
    assert parts["personal experts and gates"] >= 4 * 2 * 3 * 96 * 128
    assert "personal experts, decoded" not in parts
    assert parts["routed experts, codes"] == 2 * 6 * 3 * 96 * 128


def test_the_answer_positions_predict_the_token_that_follows():
    batch = next(batches(TINY))
    flat = batch.ids_BL.flatten()
    assert batch.tokens == 96 and len(batch.where_N) == 2 * 23
    assert torch.equal(flat[batch.where_N + 1], batch.targets_N)
    assert (batch.where_N % 48 < 47).all()


def test_a_drawn_tensor_is_the_same_each_time_and_another_for_another_name():
    one, again, other = (Drawn(name, torch.Size((30, 40)), 0.02)[...] for name in ("a", "a", "b"))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.float().std() == pytest.approx(0.02, rel=0.1)
    assert (Drawn("norm.weight", torch.Size((5,)), 1.0)[...] == 1).all()


def test_the_command_writes_what_it_prints(tmp_path):
    sizes = {"layers": 1, "hidden": 64, "heads": 2, "experts": 4, "width": 64, "shared-width": 64}
    sizes |= {"vocabulary": 100, "tokens": 16, "steps": 1, "rank": 2, "threads": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.full_size", *options, "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["size"]["layers"] == 1 and written["size"]["kind"] == "nf4"
    assert f"{written['weights']:,} pretrained weights" in done.stdout


def test_feedback_tokens_round_the_same_weights_by_what_the_layers_see():
    size = replace(TINY, feedback_tokens=3 * TINY.tokens)
    assert feedback_ids(TINY) is None and feedback_ids(size).shape == (3, TINY.tokens)
    nearest, fed_back = make_model(TINY).state_dict(), make_model(size).state_dict()
    assert nearest.keys() == fed_back.keys()
    changed = {name for name, t in nearest.items() if not torch.equal(t, fed_back[name])}
    assert changed and all(".experts." in name for name in changed)
