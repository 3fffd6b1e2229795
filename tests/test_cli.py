"""flex-moe: exit codes, messages and files of the commands, on a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_config, write_rows

from flex import cli
from flex.commands import console

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows, a configuration, and a finished run of two rounds."""
    folder = tmp_path_factory.mktemp("cli")
    model = save_tiny(folder / "model")
    rows = write_rows(folder / "rows.jsonl", {"anna": 12, "bert": 12})
    config = tiny_config(model, rows, folder / "run")
    (folder / "config.toml").write_text(config.to_toml())
    assert cli.main(["train", str(folder / "config.toml"), "--quiet"]) == 0
    return folder


def failed(capsys, *argv: str) -> str:
    """Runs a command that must be refused, and returns its message."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    return err


def test_training_prints_tables_and_leaves_a_run(place, capsys):
    code = cli.main(
        ["train", str(place / "config.toml"), "--out", str(place / "second"), "--set", "federation.rounds=1"]
    )
    out, err = capsys.readouterr()
    assert code == 0
    assert "anna" in out and "before" in out and "perplexity" in out
    assert f"report: flex-moe report {place / 'second'}" in out
    assert "round 1, anna: training loss" in err and "tokens/s" in err
    assert "round 1 of 1 done" in err
    assert (place / "second" / "latest").exists()


def test_quiet_training_says_nothing_on_the_way(place, capsys):
    settings = ["--set", "federation.rounds=1", "--set", "evaluation.generate=false"]
    assert (
        cli.main(["train", str(place / "config.toml"), "--out", str(place / "third"), "-q", *settings]) == 0
    )
    assert capsys.readouterr().err == ""


def test_an_unknown_key_is_named_with_a_suggestion(place, capsys):
    err = failed(capsys, "train", str(place / "config.toml"), "--set", "federation.round=3")
    assert "federation.round is unknown; did you mean 'rounds'?" in err
    assert err.count("\n") == 1


def test_a_missing_configuration_is_named(tmp_path, capsys):
    assert f"{tmp_path}/no.toml: cannot be read" in failed(capsys, "train", f"{tmp_path}/no.toml")


def test_a_folder_that_holds_a_run_is_not_overwritten(place, capsys):
    assert "already holds a run" in failed(capsys, "train", str(place / "config.toml"))


def test_resume_needs_a_run(tmp_path, capsys):
    assert f"{tmp_path} holds no run" in failed(capsys, "train", "--resume", str(tmp_path))


@pytest.mark.parametrize(
    "argv",
    [
        ["train"],
        ["train", "a.toml", "--resume", "b"],
        ["train", "--resume", "b", "--set", "run.seed=1"],
        ["train", "a.toml", "--out", ""],
        ["train", "--resume", ""],
        ["demo", "--out", ""],
        ["sing"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(argv, capsys):
    assert "usage: flex-moe" in failed(capsys, *argv)


def test_debug_shows_the_traceback(place):
    with pytest.raises(ValueError, match="unknown"):
        cli.main(["--debug", "train", str(place / "config.toml"), "--set", "federation.round=3"])
    with pytest.raises(ValueError, match="unknown"):
        cli.main(["train", str(place / "config.toml"), "--set", "federation.round=3", "--debug"])


def test_an_interrupted_run_says_how_to_resume_and_does(place, capsys, monkeypatch):
    from flex.progress import Lines

    run = place / "interrupted"
    finished = Lines.round_finished

    def stop_after_one(self, record):
        finished(self, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Lines, "round_finished", stop_after_one)
    code = cli.main(["train", str(place / "config.toml"), "--out", str(run)])
    err = capsys.readouterr().err
    assert code == 130
    assert f"continue with: flex-moe train --resume {run}" in err
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(run), "-q"]) == 0
    last = [json.loads(line) for line in (run / "rounds" / "history.jsonl").read_text().splitlines()]
    whole = [
        json.loads(line) for line in (place / "run" / "rounds" / "history.jsonl").read_text().splitlines()
    ]
    assert [e["loss"] for e in last if e["event"] == "evaluation"] == [
        e["loss"] for e in whole if e["event"] == "evaluation"
    ]


def test_a_failing_run_that_has_finished_rounds_says_how_to_resume(place, capsys):
    with pytest.raises(RuntimeError), console.resumable(place / "run"):
        raise RuntimeError("disk full")
    assert f"--resume {place / 'run'}" in capsys.readouterr().err


def test_interrupted_before_anything_was_written_says_so(tmp_path):
    with (
        pytest.raises(console.Interrupted, match="nothing was written yet"),
        console.resumable(tmp_path / "none"),
    ):
        raise KeyboardInterrupt


def test_the_settings_are_shown_with_their_meaning(place, capsys):
    assert cli.main(["train", str(place / "config.toml"), "--set", "run.seed=7", "--show-config"]) == 0
    out = capsys.readouterr().out
    assert "seed = 7  # of sampling" in out
    assert "[federation]" in out


def test_evaluate_repeats_the_numbers_of_the_run(place, capsys):
    assert cli.main(["evaluate", str(place / "run"), "--client", "bert", "--json", "-q"]) == 0
    measured = json.loads(capsys.readouterr().out)
    events = [
        json.loads(line) for line in (place / "run" / "rounds" / "history.jsonl").read_text().splitlines()
    ]
    last = [e for e in events if e["event"] == "evaluation" and e["client"] == "bert"][-1]
    assert list(measured) == ["bert"]
    assert measured["bert"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert measured["bert"]["rouge_l"] == last["rouge_l"]


def test_evaluate_prints_a_table(place, capsys):
    assert cli.main(["evaluate", str(place / "run"), "--no-generate", "--rows", "2"]) == 0
    out, err = capsys.readouterr()
    assert "flex after round 2" in out
    assert "anna" in out and "bert" in out and "ROUGE-L" not in out
    assert "measuring bert (2 of 2)" in err


def test_an_unknown_client_is_refused_with_the_names(place, capsys):
    err = failed(capsys, "evaluate", str(place / "run"), "--client", "ana")
    assert "no client is called 'ana'; did you mean 'anna'? (anna, bert)" in err


def test_graft_prints_the_choice_and_saves_what_can_be_loaded(place, capsys):
    import flex
    from flex.grafting import graft

    out = place / "grafted"
    arguments = [
        "--calibration",
        str(place / "rows.jsonl"),
        "--out",
        str(out),
        "--dtype",
        "float32",
        "--rows",
        "8",
    ]
    assert cli.main(["graft", str(place / "model"), *arguments]) == 0
    assert "model.layers.1.mlp" in capsys.readouterr().out
    report = json.loads((out / "graft.json").read_text())
    assert report["rows"] == 8
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype="float32")
    graft(model, start=[0, 0])
    flex.load_personal(model, out / "personal.safetensors")
    chosen = [int(t) for name, t in flex.personal_state(model).items() if name.endswith(".expert")]
    assert chosen == list(report["start"].values())


def test_graft_refuses_malformed_calibration_by_line(place, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    err = failed(
        capsys, "graft", str(place / "model"), "--calibration", str(rows), "--out", str(tmp_path / "o")
    )
    assert f"{rows}:2: 'output' is missing" in err


def test_report_of_a_real_run_is_written_where_asked(place, capsys):
    assert cli.main(["report", str(place / "run"), "--out", str(place / "report")]) == 0
    names = {path.name for path in (place / "report").iterdir()}
    assert names == {"report.html", "report.json", "loss.png", "gates.png", "bytes.png", "memory.png"}
    assert str(place / "report" / "report.html") in capsys.readouterr().out


def test_report_refuses_a_folder_that_is_no_run(tmp_path, capsys):
    assert f"{tmp_path} is not a run" in failed(capsys, "report", str(tmp_path))


def test_a_missing_package_is_named_with_what_brings_it():
    error = ModuleNotFoundError("No module named 'peft'", name="peft")
    assert (
        cli.described(error)
        == "the package peft is not installed; pip install 'flex-kernels[federated]' brings it"
    )
    error = ModuleNotFoundError("No module named 'gguf.x'", name="gguf.x")
    assert "flex-kernels[demo]" in cli.described(error)


def test_bench_without_the_source_tree_says_where_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flex.__file__", str(tmp_path / "flex" / "__init__.py"))
    assert "clone the repository" in failed(capsys, "bench", "--quick")


def test_help_needs_neither_torch_nor_transformers():
    script = (
        "import sys; from flex import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'rich', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert f"    {command} " in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m flex.cli train --show-config | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[model]\n"
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_bench_hands_on_what_was_asked_for_and_draws_the_result(tmp_path, monkeypatch, capsys):
    asked = {}

    class Layer:
        @staticmethod
        def run(**given):
            asked.update(given)
            samples = {"flex recompute": [0.1, 0.3, 0.2], "transformers eager": [0.4]}
            return {
                "cases": {
                    f"T={t}": {
                        "shape": "demo",
                        "dtype": "bf16",
                        "tokens": t,
                        "mode": "forward",
                        "samples_seconds": samples,
                    }
                    for t in (64, 256)
                },
                "memory": {"demo bf16 flex recompute": {"64": 2**20, "256": 2**22}},
            }

    monkeypatch.setattr("flex.commands.bench.benchmark", lambda name: Layer)
    out = tmp_path / "layer.json"
    assert cli.main(["bench", "--quick", "--tokens", "64", "256", "--out", str(out), "--no-memory"]) == 0
    assert asked["shapes"] == ("demo",) and asked["tokens"] == [64, 256]
    assert asked["memory"] is False and asked["out"] == out
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "layer.png") in capsys.readouterr().out


def test_a_benchmark_without_cases_is_refused(tmp_path):
    from flex.report.bench import plot_bench

    with pytest.raises(ValueError, match="no case to draw"):
        plot_bench({"cases": {}}, tmp_path / "x.png")


def test_tuning_without_a_gpu_says_so_in_one_line(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = ["--hidden", "64", "--width", "32", "--experts", "4", "--top-k", "2"]
    err = failed(capsys, "tune", *sizes)
    assert err == "flex-moe tune: tuning measures on a GPU, and torch sees no CUDA device\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--hidden, --width, --experts, --top-k missing: give --model, or all of"),
        (["--hidden", "64", "--experts", "4"], "--width, --top-k missing"),
        (
            ["--hidden", "64", "--width", "9", "--experts", "4", "--top-k", "5"],
            "--top-k 5 exceeds --experts 4",
        ),
        (["--model", "demo", "--width", "9"], "--width and --model exclude each other"),
        (["--model", "/no/such/folder"], "--model /no/such/folder: its configuration cannot be read"),
        (["--hidden", "0"], "0 is not at least 1"),
    ],
)
def test_sizes_to_tune_for_that_make_no_sense_are_named(argv, message, capsys):
    assert message in failed(capsys, "tune", *argv)


def test_a_dense_model_cannot_be_tuned_for(tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    err = failed(capsys, "tune", "--model", str(tmp_path))
    assert "(LlamaConfig) has no num_experts or n_routed_experts or num_local_experts" in err


@pytest.mark.parametrize(
    ("name", "settings", "want"),
    [
        ("Qwen2MoeConfig", {}, (2048, 1408, 60, 4, 5632)),
        ("MixtralConfig", {}, (4096, 14336, 8, 2, 0)),
        ("OlmoeConfig", {"hidden_size": 2048, "intermediate_size": 1024}, (2048, 1024, 64, 8, 0)),
        ("DeepseekV2Config", {"n_routed_experts": 64, "num_experts_per_tok": 6}, (4096, 1407, 64, 6, 2814)),
        ("Qwen3MoeConfig", {}, (2048, 768, 128, 8, 0)),
        ("Ernie4_5_MoeConfig", {}, (2560, 1536, 64, 6, 3072)),
    ],
)
def test_the_sizes_of_a_layer_are_read_from_the_models_configuration(name, settings, want, tmp_path):
    import transformers

    from flex.commands.tune import Sizes, sizes_of_model

    getattr(transformers, name)(**settings).save_pretrained(tmp_path)
    assert sizes_of_model(str(tmp_path)) == Sizes(*want)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_tuning_measures_each_set_of_experts_and_says_where_it_keeps_them(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    import torch

    from flex_kernels import triton as backend
    from flex_kernels.triton import tune
    from flex_kernels.triton.tiles import Tile, same

    asked = []

    def measured(dtype, H, I, E, K, T, weights, workers):
        asked.append((dtype, H, I, E, K, T, weights, workers))
        return tune.Best(same(Tile(64, 128, 32, per_sm=2)), dict.fromkeys(tune.PRODUCTS, 0.25), 12, 1, {})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "status", lambda device_type: "")
    monkeypatch.setattr(tune, "tune", measured)
    monkeypatch.setattr(tune, "cache_file", lambda device: tmp_path / "plans.json")
    sizes = ["--hidden", "64", "--width", "32", "--experts", "4", "--top-k", "2", "--shared", "48"]
    options = ["--tokens", "100", "120", "16", "--weights", "nf4", "--workers", "3"]
    assert cli.main(["tune", *sizes, *options]) == 0
    out, err = capsys.readouterr()
    bf16 = torch.bfloat16
    assert asked == [
        (bf16, 64, width, *who, tokens, weights, 3)
        for tokens in (16, 128)
        for width, who, weights in ((32, (4, 2), "nf4"), (32, (1, 1), "plain"), (48, (1, 1), "plain"))
    ]
    assert "routed experts, 128 tokens" in err
    assert f"kept in {tmp_path / 'plans.json'}" in out
    assert out.count("down_backward") == 6 and "0.250" in out
