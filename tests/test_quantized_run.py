"""A federation over quantised experts, from the settings to the answers: that of the decoded model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import make_model, make_tokenizer, save_tiny, tiny_config, write_rows
from transformers import AutoModelForCausalLM

import flex
from flex import cli
from flex.compare import load_batches, measure, save_batches
from flex.config import Config, ConfigError
from flex.data import load_clients
from flex.demo import DemoSettings, demo_config
from flex.generate import open_writer
from flex.models import find_blocks
from flex.quantized import kind_of
from flex.session import load_model, open_run
from flex_kernels import allow_int8_products
from flex_kernels.precision import int8_products_allowed
from flex_kernels.quantize import quantize


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its decoded twin for each kind, rows, and a finished run on NF4 experts."""
    folder = tmp_path_factory.mktemp("quantised")
    save_tiny(folder / "model")
    for kind in ("int8", "nf4"):
        model = make_model()
        for block, _ in find_blocks(model).values():
            for name in ("gate_up_proj", "down_proj"):
                weight = block.experts.get_parameter(name)
                weight.data = quantize(weight, kind).dequantize()
        model.save_pretrained(folder / f"decoded-{kind}")
        make_tokenizer().save_pretrained(folder / f"decoded-{kind}")
    write_rows(folder / "rows.jsonl", {"anna": 12, "bert": 9})
    flex.run(config(folder, "model", "run", experts="nf4"))
    return folder


def config(place, model, run, experts="", strategy="flex", **tables):
    return tiny_config(
        place / model,
        place / "rows.jsonl",
        place / run,
        **{"model": {"experts": experts}, "federation": {"strategy": strategy}} | tables,
    )


def losses(folder):
    lines = (folder / "rounds" / "history.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [e["loss"] for e in events if e["event"] == "evaluation"] + [
        e["loss_after"] for e in events if e["event"] == "client"
    ]


@pytest.mark.parametrize(
    ("strategy", "kind", "personal"),
    [("flex", "nf4", "full"), ("flex", "int8", "lora"), ("fedavg", "nf4", "full"), ("local", "int8", "full")],
)
def test_every_strategy_trains_as_it_does_on_the_decoded_model(place, tmp_path, strategy, kind, personal):
    tables = {"personal": {"kind": personal}, "evaluation": {"generate": False, "rows": 3}}
    for model, experts in (("model", kind), (f"decoded-{kind}", "")):
        flex.run(config(place, model, tmp_path / model, experts, strategy, **tables))
    got, expected = losses(tmp_path / "model"), losses(tmp_path / f"decoded-{kind}")
    assert len(got) == len(expected) > 4
    assert got == pytest.approx(expected, rel=1e-6)
    assert got != pytest.approx(losses_of_the_plain_start(place, tmp_path, strategy, tables), rel=1e-6)


def losses_of_the_plain_start(place, tmp_path, strategy, tables):
    flex.run(config(place, "model", tmp_path / "plain", "", strategy, **tables))
    return losses(tmp_path / "plain")


def test_a_finished_run_is_opened_evaluated_and_answers_with_its_quantised_experts(place, capsys):
    session = open_run(place / "run")
    blocks = {n: (b, b.adapter) for n, b in session.model.named_modules() if hasattr(b, "adapter")}
    assert kind_of(adapter.experts(block) for block, adapter in blocks.values()) == "nf4"
    assert session.parameters["frozen"] == sum(p.numel() for p in make_model().parameters())
    assert cli.main(["evaluate", str(place / "run"), "--client", "bert", "--json", "-q"]) == 0
    measured = json.loads(capsys.readouterr().out)["bert"]["loss"]
    assert measured == pytest.approx(losses(place / "run")[5], rel=1e-6)
    assert cli.main(["generate", str(place / "run"), "say a 1", "--client", "anna", "--compare"]) == 0
    assert "without the personal experts" in capsys.readouterr().out


def test_a_folder_saved_quantised_needs_no_setting(place, tmp_path):
    flex.save(flex.load(place / "model", "int8"), tmp_path / "small", make_tokenizer())
    tables = {"evaluation": {"generate": False}}
    flex.run(config(place, str(tmp_path / "small"), tmp_path / "one", **tables))
    flex.run(config(place, "model", tmp_path / "two", "int8", **tables))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    refused = config(place, str(tmp_path / "small"), tmp_path / "three", strategy="fedavg")
    settings = refused.to_dict()
    settings["model"]["experts_implementation"] = "eager"
    with pytest.raises(ConfigError, match="only 'flex_kernels' computes with the int8 experts of"):
        flex.run(Config.from_dict(settings))


def test_the_writer_of_a_model_quantises_it_and_that_of_a_run_has_its_setting(place):
    writer = open_writer(str(place / "model"), experts="int8")
    blocks = find_blocks(writer.model)
    assert kind_of(adapter.experts(block) for block, adapter in blocks.values()) == "int8"
    assert isinstance(writer.answer("say a 1", max_new_tokens=3), str)
    with pytest.raises(ValueError, match=r"is a run, which has model.experts in its config.toml"):
        open_writer(str(place / "run"), "anna", experts="int8")


def test_the_graft_command_says_how_the_experts_are_held(place, tmp_path, capsys):
    arguments = ["--calibration", str(place / "rows.jsonl"), "--out", str(tmp_path), "--rows", "8"]
    assert cli.main(["graft", str(place / "model"), *arguments, "--experts", "nf4"]) == 0
    assert "routed experts in nf4: 0.0 MiB" in capsys.readouterr().out
    report = json.loads((tmp_path / "graft.json").read_text())
    # 4 experts of [32, 32] and [32, 16] in 2 layers: half a byte a weight, and two bytes a row.
    assert report["experts"] == "nf4"
    assert report["expert_bytes"] == 2 * 4 * ((32 * 32 + 32 * 16) // 2 + 2 * (32 + 32))
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    flex.graft(model, start=[0, 0], experts="nf4", personal_dtype=torch.float32)
    flex.load_personal(model, tmp_path / "personal.safetensors")


def test_the_comparison_measures_our_layer_quantised_and_the_stock_one_as_it_is(place, tmp_path):
    settings = config(place, "model", tmp_path / "x", "nf4")
    client = load_clients(settings)[0]
    save_batches(settings, client, 2, tmp_path / "batches.safetensors")
    batches = load_batches(tmp_path / "batches.safetensors")
    ours, stock = (measure(layer, settings, batches) for layer in ("flex-recompute", "eager"))
    products = replace(settings, model=replace(settings.model, experts="int8", int8_products=True))
    assert measure("eager", products, batches)["losses"] == stock["losses"]
    assert not int8_products_allowed()
    plain = measure("flex-recompute", config(place, "model", tmp_path / "x"), batches)
    assert plain["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    assert ours["losses"] != pytest.approx(stock["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"experts": "int4"}, r"model\.experts='int4' is not one of '', 'int8', 'nf4'"),
        ({"experts": "flex_kernels"}, r"model\.experts='flex_kernels' is not one of"),
        (
            {"int8_products": True},
            r"model\.int8_products=true goes with model\.experts='int8' or 'nf4', got model\.experts=''",
        ),
        (
            {"experts": "nf4", "experts_implementation": "eager"},
            r"model\.experts_implementation='eager': only 'flex_kernels' computes with quantised experts",
        ),
    ],
)
def test_a_precision_that_cannot_be_is_refused_before_anything_is_loaded(model, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"model": model})


@pytest.mark.parametrize("allowed", [True, False])
def test_loading_a_model_sets_what_its_products_may_round(place, tmp_path, allowed):
    settings = config(place, "model", tmp_path / "x", "int8")
    try:
        load_model(replace(settings, model=replace(settings.model, int8_products=allowed)))
        assert int8_products_allowed() == allowed
    finally:
        allow_int8_products(False)


def test_the_demo_passes_the_precision_on(tmp_path):
    settings = DemoSettings(tmp_path, experts="nf4")
    assert all(demo_config(settings, s).model.experts == "nf4" for s in ("local", "fedavg", "flex"))
    assert Config.from_toml(write(tmp_path, demo_config(settings, "flex"))).model.experts == "nf4"


def test_the_demo_command_passes_the_precision_on(tmp_path, monkeypatch, capsys):
    seen = []

    def stop(settings, *rest, **options):
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("flex.demo.run_demo", stop)
    assert cli.main(["demo", "--experts", "int8", "--out", str(tmp_path / "demo")]) == 2
    assert seen[0].experts == "int8" and "enough" in capsys.readouterr().err


def write(folder, settings):
    (folder / "config.toml").write_text(settings.to_toml(comments=True))
    return folder / "config.toml"


def test_a_checkpoint_that_cannot_be_read_is_named_with_its_setting(place, tmp_path):
    broken = save_tiny(tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ConfigError, match=r"model.path=.* cannot be loaded: .*model.safetensors is truncated"
    ):
        load_model(config(place, str(broken), tmp_path / "run", "nf4"))
