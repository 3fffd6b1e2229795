"""The dense-to-MoE conversion on small random Llamas."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("transformers", reason="the conversion needs transformers")
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flex.moefication import (
    Recipe,
    convert,
    default_cache,
    demo_model,
    export,
    pipeline,
    to_mixtral,
)
from flex.moefication.distill import distill
from flex.moefication.layers import convert_layers, split_without_fitting
from flex.moefication.measure import differing_layers, exactness, perplexity, selected_experts
from flex.moefication.tied import TiedMoE

SMALL = Recipe(experts=4, chosen=2, shared=8, steps=0)


def small_llama(tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def small_ids(rows: int = 12, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


# The tied block and its Mixtral form.


def random_block(shared: int, experts: int, chosen: int) -> TiedMoE:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    neurons = shared + 3 * experts
    return TiedMoE(
        random(neurons, 10), random(neurons, 10), random(10, neurons), random(experts, 10), shared, chosen
    )


@pytest.mark.parametrize(("shared", "experts", "chosen"), [(4, 4, 2), (0, 5, 3), (7, 3, 3), (2, 1, 1)])
def test_tied_block_equals_the_sum_over_experts_token_by_token(shared, experts, chosen):
    block = random_block(shared, experts, chosen).requires_grad_(False)
    gate_up, down = block.expert_tensors()
    x_TH = torch.randn(9, 10, generator=torch.Generator().manual_seed(6))
    expected = torch.zeros(9, 10, dtype=torch.float64)
    for t, x in enumerate(x_TH.double()):
        p = (block.router_EH.double() @ x).softmax(0)
        best = p.argsort(descending=True)[:chosen]
        for e in best.tolist():
            gate, up = (gate_up[e].double() @ x).chunk(2)
            expected[t] += p[e] / p[best].sum() * (down[e].double() @ (silu(gate) * up))
    scale = expected.abs().max()
    assert (block(x_TH) - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("tied_embeddings", [True, False])
def test_all_experts_chosen_by_a_uniform_router_give_the_dense_logits(tied_embeddings):
    error = exactness(small_llama(tied_embeddings), small_ids(), SMALL)
    assert error["relative"] <= 1e-5


def test_mixtral_computes_what_the_tied_model_computes():
    moe, _ = convert_layers(small_llama(), small_ids(), SMALL)
    mixtral = to_mixtral(moe, torch.float32)
    ids = small_ids(seed=9)
    expected, got = moe(input_ids=ids).logits, mixtral(input_ids=ids).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert mixtral.config.num_local_experts == 4 and mixtral.config.num_experts_per_tok == 2
    assert mixtral.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 2 * 16, 24)


def test_to_mixtral_refuses_a_dense_layer():
    with pytest.raises(ValueError, match="layer 0 has a LlamaMLP; expected TiedMoE"):
        to_mixtral(small_llama())


# The conversion as a whole.


def stream_error(recipe: Recipe) -> float:
    _, report = convert_layers(small_llama(), small_ids(rows=40), recipe)
    return report[-1]["stream_error"]


def test_refitting_brings_the_residual_stream_closer_to_the_dense_one():
    unfitted = Recipe(experts=4, chosen=2, shared=8, steps=0, refit=False)
    assert stream_error(SMALL) < 0.9 * stream_error(unfitted)


def test_choosing_all_experts_leaves_nothing_to_repair():
    assert stream_error(Recipe(experts=4, chosen=4, shared=8, steps=0, router="uniform")) < 1e-4


def test_distillation_lowers_the_divergence_and_changes_only_the_experts():
    dense, ids = small_llama(), small_ids()
    moe, _ = convert_layers(dense, ids, SMALL)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    losses = distill(moe, dense, ids, steps=12, rows=len(ids), learning_rate=3e-3)
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, tensor in moe.state_dict().items() if not torch.equal(tensor, before[name])}
    experts = {name for name in before if name.endswith(("gate_MH", "up_MH", "down_HM"))}
    assert changed == experts


def test_distillation_of_no_steps_changes_nothing():
    dense, ids = small_llama(), small_ids()
    moe, _ = convert_layers(dense, ids, SMALL)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    assert distill(moe, dense, ids, steps=0, rows=4, learning_rate=1e-3) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in moe.state_dict().items())


def test_distillation_refuses_a_dense_student():
    with pytest.raises(ValueError, match="student has no TiedMoE block"):
        distill(small_llama(), small_llama(), small_ids(), 1, 1, 1e-3)


def test_the_same_seed_gives_the_same_model_and_the_dense_model_stays_as_it_was():
    dense, ids = small_llama(), small_ids()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    recipe = Recipe(experts=4, chosen=2, shared=8, steps=3, rows=4)
    first, _ = convert(dense, ids, ids, recipe)
    second, _ = convert(dense, ids, ids, recipe)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "experts=0 must be at least 1"),
        ({"chosen": 5}, "chosen=5 is outside 1..4"),
        ({"chosen": 0}, "chosen=0 is outside 1..4"),
        ({"shared": 9}, "shared=9 leaves 31 of 40 neurons, which do not split into experts=4"),
        ({"shared": 40}, "shared=40"),
        ({"partition": "alphabetical"}, "partition='alphabetical'"),
        ({"router": "hash"}, "router='hash'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_any_work(change, message):
    recipe = Recipe(**{"experts": 4, "chosen": 2, "shared": 8, **change})
    with pytest.raises(ValueError, match=message):
        convert(small_llama(), small_ids(), small_ids(), recipe)


def test_weights_that_are_not_finite_are_refused():
    dense = small_llama()
    dense.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        convert(dense, small_ids(), small_ids(), SMALL)


# Measures.


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary():
    dense = small_llama(tied=False)
    dense.lm_head.weight.zero_()
    assert perplexity(dense, small_ids()) == pytest.approx(97, rel=1e-5)


def test_perplexity_agrees_with_the_loss_of_transformers():
    dense, ids = small_llama(), small_ids()
    expected = float(dense(input_ids=ids, labels=ids).loss.exp())
    assert perplexity(dense, ids, rows=5) == pytest.approx(expected, rel=1e-4)
    labels = ids.clone()
    labels[:, :7] = -100
    assert perplexity(dense, ids, skip=7) == pytest.approx(
        float(dense(input_ids=ids, labels=labels).loss.exp()), rel=1e-4
    )


def test_the_selected_expert_is_the_one_that_the_router_always_takes():
    mixtral = to_mixtral(
        split_without_fitting(small_llama(), Recipe(experts=4, chosen=1, shared=8)), torch.float32
    )
    mixtral.set_experts_implementation("eager")
    for layer, expert in zip(mixtral.model.layers, (2, 0, 3), strict=True):
        layer.mlp.gate.top_k = 1
        layer.mlp.gate.register_forward_hook(
            lambda module, inputs, output, expert=expert: (
                output[0],
                torch.ones_like(output[1]),
                torch.full_like(output[2], expert),
            )
        )
    assert selected_experts(mixtral, small_ids()) == [2, 0, 3]


def test_differing_layers_counts_each_pair():
    assert differing_layers({"a": [1, 2, 3], "b": [1, 0, 0], "c": [1, 2, 0]}) == {
        "a / b": 2,
        "a / c": 1,
        "b / c": 1,
    }


# The folder on disk.


def test_a_saved_model_loads_back_to_the_same_numbers(tmp_path):
    model, _ = convert(small_llama(), small_ids(), small_ids(), SMALL)
    with export.new_folder(tmp_path / "model") as folder:
        model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded).__name__ == "MixtralForCausalLM" and loaded.dtype == torch.bfloat16
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    ids = small_ids(seed=8)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, stop):
    with pytest.raises(stop), export.new_folder(tmp_path / "cache" / "model") as folder:
        (folder / "config.json").write_text("{}")
        raise stop
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="exists already"), export.new_folder(tmp_path / "model"):
        pass


def test_the_model_of_a_faster_process_stays(tmp_path):
    with export.new_folder(tmp_path / "model") as folder:
        (folder / "who").write_text("slower")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "who").write_text("faster")
    assert (tmp_path / "model" / "who").read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    old, young = tmp_path / f"{export.PARTIAL}model-old", tmp_path / f"{export.PARTIAL}model-young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (time.time() - 2 * export.STALE_SECONDS,) * 2)
    with export.new_folder(tmp_path / "model"):
        pass
    assert not old.exists() and young.exists()


def test_demo_model_is_made_once_and_names_the_cache_after_the_recipe(tmp_path, monkeypatch):
    calls = []

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    def load():
        calls.append("load")
        return small_llama(), Tokenizer()

    monkeypatch.setattr(pipeline, "load_dense", load)
    monkeypatch.setattr(pipeline, "Recipe", lambda: SMALL)
    monkeypatch.setattr(pipeline, "calibration_ids", lambda tokenizer, recipe: (small_ids(), small_ids()))
    stages = []
    path = demo_model(tmp_path, progress=lambda stage, share: stages.append((stage, share)))
    assert demo_model(tmp_path) == path and calls == ["load"]
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= {
        p.name for p in path.iterdir()
    }
    assert path.name == f"{pipeline.DEMO_NAME}-v{pipeline.RECIPE_VERSION}"
    assert stages[-1][1] == 1.0 and {stage for stage, _ in stages} == {"converting layers"}


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "flex-kernels"
