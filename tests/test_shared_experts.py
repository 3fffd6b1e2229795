"""Frozen shared experts in 8 and 4 bits in a model: they compute what the decoded weights do."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, tiny_config, write_rows
from tiny_models import padded, runnable_backends, tiny, tokens

import flex
from flex import cli
from flex.block import GraftedBlock, gates_shut, grafted_blocks
from flex.compare import load_batches, measure, save_batches
from flex.config import Config, ConfigError
from flex.data import load_clients
from flex.demo import DemoSettings, demo_config
from flex.generate import open_writer
from flex.models import find_blocks
from flex.shared_experts import QuantizedMLP, shared_kind_of, shared_modules
from flex_kernels.modules import QuantizedWeight
from flex_kernels.quantize import quantize

WITH_SHARED = ("qwen2_moe", "deepseek_v2", "deepseek_v3_groups")
KINDS = ("int8", "nf4")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
kinds = pytest.mark.parametrize("kind", KINDS)
architectures = pytest.mark.parametrize("architecture", WITH_SHARED)
backends = pytest.mark.parametrize("backend", runnable_backends())
SIZES = dict(vocab_size=260, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=1)


def shared_of(model):
    """Layer -> the module of its shared expert."""
    return shared_modules(find_blocks(model))


def decoded(model, kind, shared):
    """Every expert of the model replaced by what its codes mean, as plain weights, in place."""
    for block, _ in find_blocks(model).values():
        for name in ("gate_up_proj", "down_proj"):
            weight = block.experts.get_parameter(name)
            weight.data = quantize(weight, kind).dequantize().to(weight.dtype)
    for mlp in shared_of(model).values():
        for projection in PROJECTIONS:
            weight = mlp.get_submodule(projection).weight
            weight.data = quantize(weight, shared).dequantize().to(weight.dtype)
    return model


def grafted(architecture, kind, shared, **options):
    model = tiny(architecture)
    start = [1] * len(find_blocks(model))
    report = flex.graft(model, **{"start": start} | options, experts=kind, shared_experts=shared)
    return model, report


@torch.no_grad()
def logits(model):
    batch = padded()
    return model(**batch).logits[batch["attention_mask"].bool()]


def same_bits(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(t.dtype == two[name].dtype and torch.equal(t, two[name]) for name, t in one.items())
    assert torch.equal(logits(model), logits(other))


@architectures
@kinds
@backends
def test_a_graft_computes_what_the_decoded_experts_do(architecture, kind, backend):
    eager = decoded(tiny(architecture), "int8", kind)
    exact = copy.deepcopy(eager).double()
    model, _ = grafted(architecture, "int8", kind, backend=backend)
    with gates_shut(model):
        got = logits(model)
    assert (got - logits(exact)).abs().max() <= 4 * (logits(eager) - logits(exact)).abs().max()
    routed_alone, _ = grafted(architecture, "int8", None, backend=backend)
    with gates_shut(routed_alone):
        assert (got - logits(routed_alone)).abs().max() > 1e-3


@architectures
@kinds
def test_a_loaded_model_computes_so_without_grafting(architecture, kind, tmp_path):
    tiny(architecture).save_pretrained(tmp_path)
    model = flex.load(tmp_path, "nf4", shared_experts=kind)
    assert all(isinstance(module, QuantizedMLP) for module in shared_of(model).values())
    eager = decoded(tiny(architecture), "nf4", kind)
    exact = copy.deepcopy(eager).double()
    assert (logits(model) - logits(exact)).abs().max() <= 4 * (logits(eager) - logits(exact)).abs().max()


def test_codes_and_scales_take_the_place_of_the_projections():
    before = tiny("qwen2_moe").state_dict()
    model, report = grafted("qwen2_moe", "int8", "nf4", personal=None, start=None)
    after = model.state_dict()
    home = "model.layers.1.mlp.shared_expert"
    parts = [n.removeprefix(home) for n in after if n.startswith(f"{home}.")]
    assert sorted(parts) == [f".{w}.{t}" for w in ("down_proj", "gate_up_proj") for t in ("codes", "scales")]
    gate_up = torch.cat([before[f"{home}.{projection}.weight"] for projection in PROJECTIONS[:2]])
    expected = quantize(gate_up, "nf4")
    assert torch.equal(after[f"{home}.gate_up_proj.codes"], expected.codes)
    assert torch.equal(after[f"{home}.gate_up_proj.scales"], expected.scales)
    # [80, 32] and [32, 40] in 2 layers: half a byte a weight, a scale a row of less than 64 columns.
    weights, rows = 2 * 3 * 40 * 32, 2 * (80 + 32)
    assert report.shared_experts == "nf4" and report.experts == "int8"
    assert report.shared_expert_bytes_before == 4 * weights
    assert report.shared_expert_bytes == weights // 2 + 2 * rows
    assert report.frozen == sum(t.numel() for t in before.values()) and report.trainable == 0
    assert report.to_dict()["shared_expert_bytes"] == report.shared_expert_bytes


def test_a_model_without_shared_experts_reports_none():
    model = tiny("mixtral")
    report = flex.graft(model, start=[0, 0], experts="nf4")
    assert report.shared_experts is None and report.shared_expert_bytes == 0


@architectures
@kinds
@pytest.mark.parametrize("hub_layout", [True, False])
def test_loading_gives_the_bits_of_quantising_afterwards(architecture, kind, hub_layout, tmp_path):
    tiny(architecture).save_pretrained(tmp_path, save_original_format=hub_layout)
    model = flex.load(tmp_path, "int8", shared_experts=kind)
    flex.graft(model, personal=None)
    same_bits(model, grafted(architecture, "int8", kind, personal=None, start=None)[0])


@architectures
@kinds
def test_a_saved_model_loads_to_the_same_bits(architecture, kind, tmp_path):
    tiny(architecture).save_pretrained(tmp_path / "plain")
    model, _ = grafted(architecture, "nf4", kind)
    flex.save(model, tmp_path / "small")
    written = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "flex_kernels", "experts": "nf4", "shared_experts": kind}
    expected = flex.load(tmp_path / "plain", "nf4", shared_experts=kind)
    for given in ({}, {"shared_experts": kind}, {"experts": "nf4", "shared_experts": kind}):
        same_bits(flex.load(tmp_path / "small", **given), expected)
    another = flex.load(tmp_path / "small", dtype=torch.bfloat16)
    module = next(iter(shared_of(another).values()))
    assert module.gate_up_proj.scales.dtype == torch.bfloat16
    assert torch.equal(module.down_proj.codes, next(iter(shared_of(expected).values())).down_proj.codes)
    with torch.no_grad():
        assert another(tokens()).logits.dtype == torch.bfloat16


def test_a_folder_with_plain_shared_experts_can_be_loaded_with_quantised_ones(tmp_path):
    tiny("qwen2_moe").save_pretrained(tmp_path / "plain")
    flex.save(flex.load(tmp_path / "plain", "nf4"), tmp_path / "small")
    written = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert "shared_experts" not in written
    model = flex.load(tmp_path / "small", shared_experts="int8")
    same_bits(model, flex.load(tmp_path / "plain", "nf4", shared_experts="int8"))
    flex.save(model, tmp_path / "smaller")
    same_bits(flex.load(tmp_path / "smaller"), model)
    with pytest.raises(ValueError, match=r"shared_experts='nf4': those of .*smaller are quantised already"):
        flex.load(tmp_path / "smaller", shared_experts="nf4")


def test_routed_experts_in_codes_may_get_shared_ones_by_a_graft(tmp_path):
    tiny("deepseek_v2").save_pretrained(tmp_path / "plain")
    model = flex.load(tmp_path / "plain", "nf4")
    report = flex.graft(model, personal=None, shared_experts="int8")
    assert report.experts == "nf4" and report.shared_experts == "int8"
    assert report.shared_expert_bytes < report.shared_expert_bytes_before / 3.5
    same_bits(model, grafted("deepseek_v2", "nf4", "int8", personal=None, start=None)[0])
    with pytest.raises(ValueError, match=r"flex.save\(model, folder\)"):
        model.save_pretrained(tmp_path / "x")


@backends
@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v3_groups"])
def test_the_personal_part_gets_the_gradients_over_decoded_weights(architecture, backend):
    model, _ = grafted(architecture, "int8", "nf4", backend=backend)
    plain = decoded(tiny(architecture), "int8", "nf4")
    flex.graft(plain, start=[1] * len(find_blocks(plain)), backend=backend)
    for m in (model, plain):
        m(tokens(), labels=tokens()).loss.backward()
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (".personal." in name)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model, _ = grafted("qwen2_moe", "nf4", "int8")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 4
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_block_compiles_in_one_graph():
    torch.compiler.reset()
    model, _ = grafted("qwen2_moe", "nf4", "int8", backend=runnable_backends()[-1])
    block = grafted_blocks(model)["model.layers.1.mlp"]
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_a_change_of_dtype_leaves_codes_and_scales_alone():
    model, _ = grafted("qwen2_moe", "int8", "int8")
    expected = copy.deepcopy(model).state_dict()
    model.to(torch.float16)
    held = [n for n in expected if n.endswith((".codes", ".scales"))]
    assert sum("shared_expert." in n for n in held) == 8
    assert all(torch.equal(model.state_dict()[n], expected[n]) for n in held)


def test_no_rows_are_no_rows(tmp_path):
    tiny("qwen2_moe").save_pretrained(tmp_path)
    model = flex.load(tmp_path, "int8", shared_experts="int8")
    module = next(iter(shared_of(model).values()))
    assert module(torch.zeros(2, 0, 32)).shape == (2, 0, 32)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (
            "qwen2_moe",
            {"experts": "nf4", "shared_experts": "int4"},
            "shared_experts='int4' is not one of",
        ),
        ("qwen2_moe", {"shared_experts": "int8"}, "goes with quantised routed experts: give experts='int8'"),
        ("mixtral", {"experts": "nf4", "shared_experts": "int8"}, "has no shared experts"),
        (
            "olmoe",
            {"shared_experts": "int8", "experts": "int8"},
            "shared_experts='int8'.*no shared",
        ),
    ],
)
def test_a_request_that_cannot_be_met_changes_nothing(architecture, options, message, tmp_path):
    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        flex.graft(model, start=[0, 0], **options)
    assert not any(isinstance(m, GraftedBlock | QuantizedWeight) for m in model.modules())
    # Said before a tensor is read.
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        flex.load(tmp_path, **options)


def test_codes_of_one_kind_are_not_turned_into_another():
    model, _ = grafted("qwen2_moe", "nf4", "int8", personal=None, start=None)
    for block in grafted_blocks(model).values():
        assert isinstance(block.shared_expert, QuantizedMLP)
    loaded = tiny("qwen2_moe")
    for name, block in grafted_blocks(model).items():
        loaded.get_submodule(name).shared_expert = block.shared_expert
        loaded.get_submodule(name).experts = block.experts
    with pytest.raises(ValueError, match="shared experts are quantised already, to 'int8'"):
        flex.graft(loaded, start=[0, 0], shared_experts="nf4")
    loaded.model.layers[0].mlp.shared_expert = tiny("qwen2_moe").model.layers[0].mlp.shared_expert
    with pytest.raises(ValueError, match=r"shared experts are held in different ways \(int8, plain\)"):
        flex.graft(loaded, start=[0, 0])


def test_a_weight_that_is_not_finite_is_named_before_anything_is_quantised(tmp_path):
    model = tiny("qwen2_moe")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.shared_expert.up_proj.weight[3, 0] = float("nan")
    message = "up_proj of the shared expert of layer model.layers.1.mlp has values that are not finite"
    with pytest.raises(ValueError, match=message):
        flex.graft(model, start=[0, 0], experts="nf4", shared_experts="int8")
    assert not any(isinstance(m, QuantizedWeight) for m in model.modules())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.shared_expert.up_proj.weight"][3, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.shared_expert.up_proj.weight: .* not finite"):
        flex.load(tmp_path, "nf4", shared_experts="int8")


def test_a_projection_of_another_shape_is_named(tmp_path):
    tiny("qwen2_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.shared_expert.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: the files have \[32, 39\].*wants \[32, 40\]"):
        flex.load(tmp_path, "nf4", shared_experts="int8")


def test_a_missing_projection_is_named(tmp_path):
    tiny("qwen2_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        flex.load(tmp_path, "nf4", shared_experts="int8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its decoded twin and rows."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("model", "decoded"):
        model = tiny("qwen2_moe", **SIZES)
        (decoded(model, "nf4", "int8") if name == "decoded" else model).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "rows.jsonl", {"anna": 12, "bert": 9})
    return folder


def config(place, model, run, **settings):
    tables = {"model": settings, "evaluation": {"generate": False}}
    return tiny_config(place / model, place / "rows.jsonl", run, **tables)


def losses(folder):
    lines = (folder / "rounds" / "history.jsonl").read_text().splitlines()
    return [e["loss_after"] for e in map(json.loads, lines) if e["event"] == "client"]


def test_a_federation_trains_as_it_does_on_the_decoded_model(place, tmp_path, capsys):
    flex.run(config(place, "model", tmp_path / "codes", experts="nf4", shared_experts="int8"))
    flex.run(config(place, "decoded", tmp_path / "decoded"))
    got, expected = losses(tmp_path / "codes"), losses(tmp_path / "decoded")
    assert len(got) == 4 and got == pytest.approx(expected, rel=1e-5)
    assert Config.from_toml(tmp_path / "codes" / "config.toml").model.shared_experts == "int8"
    assert cli.main(["evaluate", str(tmp_path / "codes"), "--client", "bert", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["bert"]["loss"] > 0
    with pytest.raises(ValueError, match=r"is a run, which has model.shared_experts in its config.toml"):
        open_writer(str(tmp_path / "codes"), "anna", shared_experts="int8")


def test_the_comparison_runs_the_stock_layer_on_the_model_as_it_is(place, tmp_path):
    settings = config(place, "model", tmp_path / "x", experts="nf4", shared_experts="int8")
    save_batches(settings, load_clients(settings)[0], 2, tmp_path / "batches.safetensors")
    batches = load_batches(tmp_path / "batches.safetensors")
    stock, ours = (measure(layer, settings, batches)["losses"] for layer in ("eager", "flex-recompute"))
    plain = measure("flex-recompute", config(place, "model", tmp_path / "x"), batches)["losses"]
    assert plain == pytest.approx(stock, rel=1e-4) and ours != pytest.approx(stock, rel=1e-6)


def test_commands_pass_the_setting_on(place, tmp_path, capsys):
    arguments = ["--calibration", str(place / "rows.jsonl"), "--out", str(tmp_path), "--rows", "8"]
    precision = ["--experts", "nf4", "--shared-experts", "int8"]
    assert cli.main(["graft", str(place / "model"), *arguments, *precision]) == 0
    assert "shared experts in int8: 0.0 MiB" in capsys.readouterr().out
    report = json.loads((tmp_path / "graft.json").read_text())
    assert report["shared_experts"] == "int8" and report["experts"] == "nf4"
    assert cli.main(["generate", str(place / "model"), "say a 1", *precision, "--max-new-tokens", "2"]) == 0
    writer = open_writer(str(place / "model"), experts="nf4", shared_experts="int8")
    assert shared_kind_of(shared_of(writer.model).values()) == "int8"
    assert cli.main(["generate", str(place / "model"), "say a 1", "--shared-experts", "int8"]) == 2
    assert "model.shared_experts='int8' goes with model.experts" in capsys.readouterr().err


def test_the_demo_passes_the_setting_on(tmp_path):
    settings = DemoSettings(tmp_path, experts="nf4", shared_experts="int8")
    assert all(demo_config(settings, s).model.shared_experts == "int8" for s in ("local", "fedavg", "flex"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"shared_experts": "int4"}, r"model\.shared_experts='int4' is not one of '', 'int8', 'nf4'"),
        ({"shared_experts": "nf4"}, r"model\.shared_experts='nf4' goes with model\.experts='int8' or 'nf4'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_loaded(model, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"model": model})
