"""The quality benchmark on tiny models: its numbers by hand, its file, its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import save_tiny, tiny_config, write_rows
from tiny_models import tiny, tokens

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.quantized_quality import (
    PRODUCTS,
    federation_config,
    layer_errors,
    measure,
    multiplies_int8,
)
from benchmarks.tables import quality_tables
from flex.moefication.measure import perplexity
from flex_kernels.quantize import quantize


def test_a_layers_error_is_that_of_the_routed_sum_over_decoded_experts():
    model, inputs = tiny("qwen2_moe"), {}
    for name, block in enumerate(layer.mlp for layer in model.model.layers):
        block.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        errors = layer_errors(model, tokens())
        for number, layer in enumerate(model.model.layers):
            x_TH, block = inputs[number].flatten(0, 1).double(), layer.mlp
            p_TE = (x_TH @ block.gate.weight.double().T).softmax(-1)
            best_TK = p_TE.topk(3).indices
            for kind, error in errors.items():
                plain = block.experts.gate_up_proj, block.experts.down_proj
                rounded = tuple(quantize(weight, kind).dequantize() for weight in plain)
                outputs = []
                for gate_up, down in (plain, rounded):
                    gate_up, down = gate_up.double(), down.double()
                    y_TH = torch.zeros_like(x_TH)
                    for t in range(len(x_TH)):
                        for e in best_TK[t].tolist():
                            gate, up = (gate_up[e] @ x_TH[t]).chunk(2)
                            y_TH[t] += p_TE[t, e] * (down[e] @ (F.silu(gate) * up))
                    outputs.append(y_TH)
                expected = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
                assert error[f"model.layers.{number}.mlp"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    save_tiny(folder / "model")
    rows = write_rows(folder / "rows.jsonl", {"anna": 12, "bert": 9})
    texts = {"one": torch.arange(40).view(2, 20), "two": torch.arange(100, 132).view(2, 16)}
    evaluation = {"generate": False, "rows": 3, "every": 0}
    config = tiny_config(
        folder / "model", rows, folder / "run", evaluation=evaluation, model={"experts": "nf4"}
    )
    calibration = [torch.arange(50, 90).view(2, 20)]
    measure(str(folder / "model"), folder / "out.json", texts, {"nf4": config}, 1, calibration)
    return folder


def test_the_file_holds_every_part(place):
    content = json.loads((place / "out.json").read_text())
    kinds = {"bfloat16", "int8", "nf4", "nf4 calibrated", "nf4 gptq"}
    assert set(content["models"]) == (kinds | set(PRODUCTS) if multiplies_int8() else kinds)
    for name, kind in PRODUCTS.items() if multiplies_int8() else ():
        products, codes = (content["models"][of]["divergence"]["one"] for of in (name, kind))
        assert products != codes
    assert content["models"]["bfloat16"]["divergence"] == {"one": 0.0, "two": 0.0}
    assert all(
        0 < of["divergence"]["one"] < 0.1 for name, of in content["models"].items() if name != "bfloat16"
    )
    assert content["calibration_tokens"] == 40
    import flex

    model = flex.load(place / "model", dtype=torch.bfloat16)
    expected = perplexity(model, torch.arange(40).view(2, 20), skip=1)
    assert content["models"]["bfloat16"]["perplexity"]["one"] == pytest.approx(expected, rel=0.05)
    assert content["models"]["bfloat16"]["expert_bytes"] == 2 * 2 * 4 * 3 * 32 * 16
    assert content["held_out_tokens"] == {"one": 40, "two": 32}
    federation = content["federation"]["nf4"]
    assert set(federation["before"]) == {"anna", "bert"}
    assert all(federation["after"][name] < before for name, before in federation["before"].items())
    assert 0 < content["layer_error"]["one"]["int8"]["model.layers.0.mlp"] < 0.05
    assert content["layer_error"]["one"]["nf4"]["model.layers.0.mlp"] < 0.4
    errors = content["layer_error"]["one"]
    assert errors["nf4 calibrated"] != errors["nf4"] and errors["nf4 gptq"] != errors["nf4 calibrated"]
    assert content["models"]["nf4 gptq"]["expert_bytes"] == content["models"]["nf4"]["expert_bytes"]


def test_parts_that_the_file_holds_are_kept(place):
    content = json.loads((place / "out.json").read_text())
    content["federation"]["nf4"]["rounds"] = 99
    (place / "out.json").write_text(json.dumps(content))
    texts = {"one": torch.arange(40).view(2, 20)}
    measure(str(place / "model"), place / "out.json", texts, {"nf4": None}, threads=1)
    assert json.loads((place / "out.json").read_text())["federation"]["nf4"]["rounds"] == 99


def test_a_kind_that_the_file_lacks_is_measured_beside_those_it_holds(place, tmp_path):
    content = json.loads((place / "out.json").read_text())
    whole = content["layer_error"]["one"].pop("nf4 gptq")
    content["layer_error"]["one"]["int8"] = {"kept": 1.0}
    (tmp_path / "out.json").write_text(json.dumps(content))
    texts = {"one": torch.arange(40).view(2, 20)}
    measure(str(place / "model"), tmp_path / "out.json", texts, {}, 1, [torch.arange(50, 90).view(2, 20)])
    errors = json.loads((tmp_path / "out.json").read_text())["layer_error"]["one"]
    assert errors["int8"] == {"kept": 1.0} and errors["nf4 gptq"] == whole


def test_the_tables_show_ratios_to_bfloat16():
    layers = {"model.layers.0.mlp": 0.01, "model.layers.1.mlp": 0.03}
    result = {
        "held_out_tokens": {"story": 100},
        "layer_error": {"story": {"int8": layers, "nf4": {name: 10 * e for name, e in layers.items()}}},
        "models": {
            "bfloat16": {
                "perplexity": {"story": 20.0},
                "divergence": {"story": 0.0},
                "expert_bytes": 400 * 2**20,
            },
            "nf4": {
                "perplexity": {"story": 21.0},
                "divergence": {"story": 0.0625},
                "expert_bytes": 100 * 2**20,
            },
        },
        "federation": {
            "bfloat16": {"rounds": 3, "before": {"a": 4.0, "b": 2.0}, "after": {"a": 2.0, "b": 1.0}},
            "nf4": {"rounds": 3, "before": {"a": 4.2, "b": 2.0}, "after": {"a": 2.2, "b": 1.0}},
        },
    }
    text = quality_tables(result)
    assert "| story | 0.020 (0.010 to 0.030) | 0.200 (0.100 to 0.300) |" in text
    assert "| nf4 | 100 | 21.00 (1.050) |" in text
    assert "| nf4 | 0.0625 |" in text
    assert "| nf4 | 3.100 | 1.600 |" in text


def test_the_federation_is_the_demos_with_losses_before_and_after(tmp_path):
    pytest.importorskip("reasoning_gym")
    config = federation_config("demo", "int8", tmp_path, rounds=2, threads=1)
    assert config.model.experts == "int8" and config.federation.strategy == "flex"
    assert config.federation.rounds == 2 and config.evaluation.before and not config.evaluation.generate
