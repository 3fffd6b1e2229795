"""Loading quantised: the same bits as quantising what from_pretrained loads, without ever holding that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from tiny_models import ARCHITECTURES, tiny, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

import flex
from flex import files, loading
from flex.memory import PeakMemory
from flex.models import Unsupported, find_blocks
from flex_kernels.modules import QuantizedWeight

HUB, FUSED = True, False
INDEX = "model.safetensors.index.json"


def saved(folder, architecture="mixtral", layout=HUB, **options):
    tiny(architecture).save_pretrained(folder, save_original_format=layout, **options)
    return folder


def quantised_after_loading(folder, kind, dtype=None):
    """The measure: everything in full precision first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    flex.graft(model, personal=None, experts=kind)
    return model


def same_bits(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, t in one.items():
        assert t.dtype == two[name].dtype and torch.equal(t, two[name]), name
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def grafted(model):
    flex.graft(model, personal=None)
    return model


@pytest.mark.parametrize("layout", [HUB, FUSED])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_in_both_layouts_loads_to_the_bits_of_quantising_afterwards(
    architecture, layout, tmp_path
):
    saved(tmp_path, architecture, layout)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        hub = (".experts.0.", "moe.input_linear.")
        assert any(part in name for name in file.keys() for part in hub) == layout  # noqa: SIM118
    kind = "nf4" if layout else "int8"
    same_bits(grafted(flex.load(tmp_path, kind)), quantised_after_loading(tmp_path, kind))


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])
def test_another_dtype_is_taken_before_the_experts_are_quantised(architecture, tmp_path):
    saved(tmp_path, architecture)
    model = grafted(flex.load(tmp_path, "nf4", torch.bfloat16))
    same_bits(model, quantised_after_loading(tmp_path, "nf4", torch.bfloat16))
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])
def test_columns_that_count_are_spared_while_loading_as_by_a_graft(architecture, tmp_path):
    saved(tmp_path, architecture)
    first = flex.load(tmp_path, "nf4")
    importance = flex.column_importance(first, [tokens()])
    model = flex.load(tmp_path, "nf4", importance=importance)
    plain = flex.load(tmp_path)
    flex.graft(plain, personal=None, experts="nf4", importance=importance)
    same_bits(grafted(model), plain)
    assert any(not torch.equal(t, model.state_dict()[name]) for name, t in first.state_dict().items())
    flex.save(model, tmp_path / "nf4")
    same_bits(grafted(flex.load(tmp_path / "nf4")), plain)


@pytest.mark.parametrize("change, error, message", [
    (lambda i: {name + "x": pair for name, pair in i.items()}, ValueError, "importance is of the layers"),
    (lambda i: {name: pair[::-1] for name, pair in i.items()}, ValueError, r"layer .* must be \[\[6, 32\]"),
    (lambda i: [1], TypeError, "got list"),
])  # fmt: skip
def test_an_importance_of_another_model_is_refused_before_loading(change, error, message, tmp_path):
    importance = flex.column_importance(flex.load(saved(tmp_path, "mixtral")), [tokens()])
    with pytest.raises(error, match=message):
        flex.load(tmp_path, "nf4", importance=change(importance))


def test_an_importance_without_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"importance is for a plain .* experts='int8'"):
        flex.load(saved(tmp_path / "plain"), "int8", importance={})
    flex.save(flex.load(tmp_path / "plain", "nf4"), tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"importance is for a plain .*nf4 is quantised already"):
        flex.load(tmp_path / "nf4", "nf4", importance={})


def test_a_loaded_model_computes_without_grafting_and_keeps_its_settings(tmp_path):
    stock = tiny("olmoe", tie_word_embeddings=True)
    stock.generation_config.max_new_tokens = 7
    stock.save_pretrained(tmp_path)
    model = flex.load(tmp_path, "int8", attn_implementation="eager")
    assert not model.training and model.config._attn_implementation == "eager"
    assert model.generation_config.max_new_tokens == 7 and model.name_or_path == str(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        expected = quantised_after_loading(tmp_path, "int8")(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("experts" in name for name, _ in model.named_parameters())


def test_shards_are_read_one_after_the_other(tmp_path):
    saved(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    saved(tmp_path / "one")
    same_bits(flex.load(tmp_path / "shards", "nf4"), flex.load(tmp_path / "one", "nf4"))


def test_without_a_precision_the_model_is_the_plain_one(tmp_path):
    model = flex.load(saved(tmp_path))
    assert not any(isinstance(m, QuantizedWeight) for m in model.modules())
    assert torch.equal(model.lm_head.weight, tiny("mixtral").lm_head.weight)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_saved_model_loads_to_the_same_bits_and_is_smaller(architecture, kind, tmp_path):
    saved(tmp_path / "plain", architecture)
    model = flex.load(tmp_path / "plain", kind)
    flex.save(model, tmp_path / "small", make_tokenizer())
    again = flex.load(tmp_path / "small")
    same_bits(grafted(again), grafted(model))
    same_bits(grafted(flex.load(tmp_path / "small", kind)), model)
    sizes = {f.parent.name: f.stat().st_size for f in tmp_path.glob("*/*.safetensors")}
    assert sizes["small"] < 0.75 * sizes["plain"]
    assert (tmp_path / "small" / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_codes_of_a_saved_model_do_not_follow_the_dtype(dtype, tmp_path):
    model = flex.load(saved(tmp_path / "plain"), "nf4", torch.bfloat16)
    flex.save(model, tmp_path / "small")
    again, before = flex.load(tmp_path / "small", dtype=dtype).state_dict(), model.state_dict()
    for name, t in again.items():
        held = name.endswith((".codes", ".scales"))
        assert torch.equal(t, before[name] if held else before[name].to(dtype))
        assert t.dtype == (before[name].dtype if held else dtype)


def test_of_a_trained_graft_the_pretrained_part_is_saved(tmp_path):
    model = tiny("qwen2_moe")
    flex.add_lora(model)
    flex.graft(model, start=[2, 2], experts="nf4")
    flex.save(model, tmp_path / "small")
    plain = tiny("qwen2_moe")
    flex.graft(plain, personal=None, experts="nf4")
    same_bits(grafted(flex.load(tmp_path / "small")), plain)


def test_a_saved_model_may_have_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "LARGEST_SHARD", "30KB")
    model = tiny("mixtral")
    flex.graft(model, personal=None, experts="int8")
    flex.save(model, tmp_path / "small")
    assert len(set(json.loads((tmp_path / "small" / INDEX).read_text())["weight_map"].values())) > 2
    same_bits(grafted(flex.load(tmp_path / "small")), model)


def test_save_pretrained_of_a_quantised_model_points_to_save(tmp_path):
    model = flex.load(saved(tmp_path / "plain"), "nf4")
    in_place = tiny("mixtral")
    flex.graft(in_place, personal=None, experts="nf4")
    for m in (model, in_place):
        with pytest.raises(ValueError, match=r"flex.save\(model, folder\)"):
            m.save_pretrained(tmp_path / "x")


def test_a_plain_model_and_a_folder_in_use_are_refused(tmp_path):
    with pytest.raises(ValueError, match="MixtralForCausalLM are not quantised: use save_pretrained"):
        flex.save(tiny("mixtral"), tmp_path / "small")
    model = flex.load(saved(tmp_path / "plain"), "nf4")
    with pytest.raises(FileExistsError, match="plain exists and is not an empty folder"):
        flex.save(model, tmp_path / "plain")


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    model = flex.load(saved(tmp_path / "plain"), "nf4")

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        flex.save(model, tmp_path / "small")
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def shard_of(folder, tensor):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def remove(shard):
    shard.unlink()


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-64])


def overwrite(shard):
    shard.write_bytes(b"not tensors at all")


def exchange(shard):
    save_file({"another.model": torch.zeros(3)}, shard)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (remove, FileNotFoundError, "lacks the shard {name}, which model.safetensors.index.json names"),
        (truncate, ValueError, "{name} is truncated or is not a safetensors file"),
        (overwrite, ValueError, "{name} is truncated or is not a safetensors file"),
        (exchange, ValueError, "{name} is not the shard that .* describes: it lacks model.*w1.weight"),
    ],
)
def test_a_broken_shard_is_named(harm, error, message, tmp_path):
    saved(tmp_path, max_shard_size="40KB")
    shard = shard_of(tmp_path, "model.layers.1.block_sparse_moe.experts.2.w1.weight")
    harm(shard)
    with pytest.raises(error, match=message.format(name=shard.name)):
        flex.load(tmp_path, "nf4")


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        (HUB, "model.layers.0.self_attn.q_proj.weight", "lacks tensors of MixtralForCausalLM: {name}"),
        (FUSED, "model.layers.1.mlp.experts.down_proj", "lacks tensors of MixtralForCausalLM: {name}"),
        (HUB, "model.layers.1.block_sparse_moe.experts.3.w2.weight", r"the files have \[5, 32, 28\]"),
        (HUB, "model.layers.1.block_sparse_moe.experts.3.w1.weight", "do not fit MixtralConfig"),
    ],
)
def test_a_tensor_that_is_missing_is_an_error(layout, name, message, tmp_path):
    saved(tmp_path, layout=layout)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=message.format(name=name)):
        flex.load(tmp_path, "nf4")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj"]
)
def test_a_tensor_of_another_shape_is_named(name, tmp_path):
    saved(tmp_path, layout=FUSED)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4, 32, 28)}))
    with pytest.raises(ValueError, match=f"{name}: .*4, 32, 28|{name} is .*4, 32, 28"):
        flex.load(tmp_path, "int8")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/model", "one/two/three"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(path):
    with pytest.raises(FileNotFoundError, match=f"{path}: there is no such folder"):
        flex.load(path, "nf4")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    saved(tmp_path, layout=FUSED)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    change_tensors(tmp_path, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{name}: .* not finite"):
        flex.load(tmp_path, "nf4")


def test_a_precision_or_checkpoint_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="experts='int4' is not one of None, 'int8', 'nf4'"):
        flex.load(tmp_path, "int4")
    flex.save(flex.load(saved(tmp_path / "plain"), "nf4"), tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"experts='int8': .* is quantised already, with 'nf4'"):
        flex.load(tmp_path / "nf4", "int8")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised already, with 'gptq'"):
        flex.load(tmp_path / "nf4", "nf4")
    (tmp_path / "plain" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        flex.load(tmp_path / "plain", "nf4")


def test_a_dense_model_is_not_supported(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="LlamaForCausalLM has no MoE block"):
        flex.load(tmp_path, "nf4")


def save_large(folder):
    """312 MiB in bfloat16, nearly all of it experts; every layer has the same weights."""
    layers, experts, hidden, width = 12, 8, 512, 1024
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=width,
        num_local_experts=experts,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)

    def weight(*shape):
        return (torch.rand(shape) - 0.5).bfloat16()

    layer = {f"self_attn.{p}_proj.weight": weight(hidden, hidden) for p in "qkvo"}
    layer |= {f"{p}_layernorm.weight": weight(hidden) for p in ("input", "post_attention")}
    layer["block_sparse_moe.gate.weight"] = weight(experts, hidden)
    for e in range(experts):
        expert = {"w1": weight(width, hidden), "w2": weight(hidden, width), "w3": weight(width, hidden)}
        layer |= {f"block_sparse_moe.experts.{e}.{name}.weight": t for name, t in expert.items()}
    tensors = {f"model.layers.{i}.{name}": t.clone() for i in range(layers) for name, t in layer.items()}
    tensors |= {"model.embed_tokens.weight": weight(64, hidden), "lm_head.weight": weight(64, hidden)}
    save_file(tensors | {"model.norm.weight": weight(hidden)}, folder / "model.safetensors", {"format": "pt"})


LOAD = """
import sys, torch, flex, transformers.models.mixtral.modeling_mixtral, flex.loading
from flex.memory import PeakMemory
torch.set_num_threads(1)
start, peak = PeakMemory().read(), PeakMemory()
model = flex.load(sys.argv[1], "nf4", **eval(sys.argv[2]))
print(peak.read() - start, sum(t.nbytes for t in model.state_dict().values()))
"""


def loading_takes(folder, options="{}"):
    """(peak, bytes that stay) of loading a large model in a process of its own, and its size in full."""
    if PeakMemory().kind != "resident":
        pytest.skip("this system does not let a process reset its high-water mark")
    save_large(folder)
    command = [sys.executable, "-c", LOAD, folder, options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, held = map(int, done.stdout.split())
    full = Path(folder / "model.safetensors").stat().st_size
    assert full > 300e6 and held < 0.4 * full
    return peak, held, full


def test_the_whole_model_is_never_in_memory(tmp_path):
    peak, held, full = loading_takes(tmp_path)
    # Above what stays: one layer's experts as they are put together, and float32 pieces of them.
    assert held < peak < 0.6 * full


def test_a_dense_layer_beside_the_others_is_left_alone(tmp_path):
    model = flex.load(saved(tmp_path, "deepseek_v2"), "nf4")
    assert list(find_blocks(model)) == ["model.layers.1.mlp"]
    dense = model.model.layers[0].mlp
    assert torch.equal(dense.up_proj.weight, tiny("deepseek_v2").model.layers[0].mlp.up_proj.weight)
