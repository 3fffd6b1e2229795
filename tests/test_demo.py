"""flex.demo, flex.compare and flex.progress: the whole demo on a tiny model, and its parts alone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_model, save_tiny, tiny_config, write_rows

from flex import cli, compare, progress
from flex.demo import DemoSettings, Stages, demo_config, free_folder, partition_for, what_it_shows
from flex.report.data import SPEED_FILE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    save_tiny(folder / "model")
    write_rows(folder / "rows.jsonl", {"anna": 12, "bert": 12})
    return folder


def test_the_demo_trains_compares_and_reports(place, capsys):
    out = place / "out"
    command = [
        "demo",
        "--model",
        str(place / "model"),
        "--data",
        str(place / "rows.jsonl"),
        "--out",
        str(out),
        "--quick",
    ]
    assert cli.main([*command, "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "clients, training + held-out rows: anna (11 + 1 rows), bert (11 + 1 rows)",
        "before",
        "exact match",
        "sent up",
        "trained, stays",
        "transformers, grouped_mm",
        "the beginning of a training",
        str(out / "report" / "report.html"),
    ):
        assert expected in shown
    content = json.loads((out / SPEED_FILE).read_text())
    assert content["failed"] == {}
    names = [layer["name"] for layer in content["layers"]]
    assert names == [
        "flex_kernels, preact",
        "flex_kernels, recompute",
        "transformers, grouped_mm",
        "transformers, eager",
    ]
    assert all(
        layer["tokens_per_second"][0] > 0 and layer["extra_memory"][0] > 0 for layer in content["layers"]
    )
    # The same client, start and batches: in bfloat16 the losses agree to about its rounding.
    losses = [content["samples"][name][0]["losses"] for name in names]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=0.02)
    report = (out / "report" / "report.html").read_text()
    assert "Against the stock layer" in report and "Gate openings" in report

    # A second call finds everything done.
    before = {path: path.read_text() for path in out.rglob("history.jsonl")}
    assert cli.main([*command, "--threads", "1", "-q"]) == 0
    assert "exact match" in capsys.readouterr().out
    assert {path: path.read_text() for path in out.rglob("history.jsonl")} == before

    # Other settings do not fit what is there.
    assert cli.main([*command, "--rounds", "5"]) == 2
    assert "federation.rounds=5" in capsys.readouterr().err


def test_the_stock_layer_beside_a_personal_expert_is_the_grafted_one():
    import flex
    from flex.config import Config

    config = Config.from_dict({"model": {"dtype": "float32", "backend": "reference"}, "shared": {"rank": 2}})
    ours, stock = make_model(), make_model()
    from flex.session import prepare_model
    from flex.strategies import STRATEGIES

    prepare_model(ours, config, STRATEGIES["flex"]())
    compare.prepare_stock(stock, config, "eager")
    ids = torch.arange(12)[None]
    found, wanted = stock(ids).logits, ours(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    wanted.square().mean().backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert {n for n, p in stock.named_parameters() if p.requires_grad} == gradients.keys()
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)
    assert flex.personal_state(ours)


def test_batches_survive_the_way_to_another_process(place):
    from flex.data import load_clients

    config = tiny_config(place / "model", place / "rows.jsonl", place / "unused")
    tokens = compare.save_batches(config, load_clients(config)[0], 3, place / "batches.safetensors")
    batches = compare.load_batches(place / "batches.safetensors")
    assert [batch.tokens for batch in batches] == tokens
    # Nine rows in batches of four: a pass ends with one.
    assert [batch.examples for batch in batches] == [4, 4, 1]
    assert all(len(batch.targets_N) == len(batch.where_N) > 0 for batch in batches)


def test_a_process_that_fails_is_reported_by_layer(tmp_path, monkeypatch):
    worker = tmp_path / "python"
    worker.write_text("#!/bin/sh\necho some noise >&2\necho 'MemoryError: too big' >&2\nexit 1\n")
    worker.chmod(0o755)
    monkeypatch.setattr(compare.sys, "executable", str(worker))
    with pytest.raises(compare.ComparisonError, match="measuring 'eager' failed: MemoryError: too big"):
        compare.measure_in_process("eager", tmp_path / "config.toml", tmp_path / "batches.safetensors")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind threads")
def test_processes_of_the_comparison_are_not_held_to_the_core_that_openmp_took(tmp_path):
    free = subprocess.run(
        [sys.executable, "-c", f"{compare.UNBOUND} print(len(os.sched_getaffinity(0)))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    code = (
        "import subprocess, sys, torch, flex.compare as c; torch.ones(9) @ torch.ones(9);"
        "end = 'print(len(os.sched_getaffinity(0)))'; line = c.start()[1].split('from')[0] + end;"
        "print(subprocess.run([sys.executable, '-c', line], check=True, capture_output=True).stdout.decode())"
    )
    bound = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_PROC_BIND": "true"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(bound.stdout) == int(free.stdout)


def test_the_worker_is_the_module_itself_where_nothing_binds(monkeypatch):
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    assert compare.start() == ["-m", "flex.compare"]


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'flex_kernels' is not one of 'flex-preact', 'flex-recompute'"):
        compare.measure_model(None, "flex_kernels", None, [])


def test_a_stock_layer_that_fails_is_left_out_and_named(place, tmp_path, monkeypatch):
    from flex.data import load_clients

    def measured(layer, settings, batches):
        if layer == "grouped_mm":
            raise compare.ComparisonError("no grouped_mm here")
        return {"tokens_per_second": 10.0, "peak_bytes": 7, "loaded_bytes": 3}

    monkeypatch.setattr(compare, "measure_in_process", measured)
    config = tiny_config(place / "model", place / "rows.jsonl", place / "unused")
    content = json.loads(compare.compare(config, load_clients(config), tmp_path, repeats=2).read_text())
    measured_layers = ["flex_kernels, preact", "flex_kernels, recompute", "transformers, eager"]
    assert [layer["name"] for layer in content["layers"]] == measured_layers
    assert content["layers"][0]["extra_memory"] == [4, 4]
    assert content["what"].endswith("Not measured: no grouped_mm here.")


def test_every_strategy_gets_the_same_settings_but_for_its_own():
    configs = [demo_config(DemoSettings(Path("out")), s).to_dict() for s in ("local", "fedavg", "flex")]
    assert [c["run"].pop("folder") for c in configs] == ["out/local", "out/fedavg", "out/flex"]
    assert [c["federation"].pop("strategy") for c in configs] == ["local", "fedavg", "flex"]
    assert [c["evaluation"].pop("before") for c in configs] == [True, False, False]
    assert configs[0] == configs[1] == configs[2]


def test_given_numbers_reach_the_settings():
    settings = DemoSettings(Path("out"), rounds=7, clients=6, rows=33, steps=5, quick=True, seed=3, threads=2)
    config = demo_config(settings, "flex")
    assert config.federation.rounds == 7
    assert len(config.data.skills) == len(set(config.data.skills)) == 6
    assert config.data.rows_per_skill == 33
    assert config.training.local_steps == 5
    assert (config.run.seed, config.run.threads) == (3, 2)


def test_more_clients_than_skills_are_refused():
    with pytest.raises(ValueError, match="clients=99 exceeds the"):
        demo_config(DemoSettings(Path("out"), clients=99), "flex")


def test_a_file_is_split_by_the_fields_it_has(tmp_path):
    def written(**extra: str) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"instruction": "a", "output": "b"} | extra) + "\n")
        return path

    assert partition_for(written(client="x", category="y"), None) == {"scheme": "field", "field": "client"}
    assert partition_for(written(category="y"), None) == {"scheme": "field", "field": "category"}
    assert partition_for(written(), None) == {"scheme": "iid", "clients": 4}
    assert partition_for(written(category="y"), 3) == {"scheme": "dirichlet", "clients": 3}
    assert partition_for(written(), 3) == {"scheme": "iid", "clients": 3}


def test_a_new_demo_takes_a_folder_that_is_free(tmp_path):
    assert free_folder(tmp_path) == tmp_path / "demo-1"
    (tmp_path / "demo-1").mkdir()
    assert free_folder(tmp_path) == tmp_path / "demo-2"


def test_what_it_shows_names_the_sizes():
    text = what_it_shows(DemoSettings(Path("out"), quick=True, rounds=2))
    assert "2 rounds of 1 step of 4 rows" in text
    assert "one answer moves them by 50%" in text


def test_an_interrupted_demo_says_how_to_go_on(place, capsys, monkeypatch):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("flex.demo.run_demo", stop)
    assert cli.main(["demo", "--out", str(place / "stopped")]) == 130
    assert f"the same command: --out {place / 'stopped'} goes on" in capsys.readouterr().err


def test_stages_are_said_once():
    said: list[str] = []
    stages = Stages(said.append)
    for stage, share in (("layers", 0.1), ("layers", 0.9), ("recovering", 0.5)):
        stages(stage, share)
    assert [line.strip() for line in said[1:]] == ["layers", "recovering"]


def run_of_two_rounds(observer: progress.Lines) -> None:
    with observer:
        for round_ in (1, 2):
            observer.round_started(round_, 2, ["anna"])
            observer.client_started(round_, "anna", 1)
            observer.step("anna", 50, 2.0)
            observer.client_finished(
                {
                    "round": round_, "client": "anna", "loss_before": 2.0, "loss_after": 1.5, "steps": 1,
                    "tokens": 50, "seconds": 0.5, "peak_bytes": 2**20,
                }
            )  # fmt: skip
            observer.round_finished({"round": round_, "bytes_up": 10, "bytes_down": 20})
            observer.evaluation_started(round_, ["anna", "bert"])
            observer.evaluated({"round": round_, "client": "anna", "loss": 1.0})
            observer.evaluated({"round": round_, "client": "bert", "loss": 3.0})


@pytest.mark.parametrize("kind", [progress.Lines, progress.Bars])
def test_progress_tells_losses_speed_and_bytes(kind):
    stream = io.StringIO()
    run_of_two_rounds(kind(stream, "flex"))
    text = " ".join(stream.getvalue().split())
    assert "flex: round 1, anna: training loss 2.000 -> 1.500, 1 step, 100 tokens/s, peak 1.0 MiB" in text
    assert "round 2 of 2 done: 10 B up, 20 B down" in text
    assert "held-out loss after round 2: mean 2.000 (anna 1.000, bert 3.000)" in text


def test_quiet_progress_says_only_what_was_refused():
    stream = io.StringIO()
    observer = progress.observer_for(quiet=True, stream=stream)
    run_of_two_rounds(observer)
    observer.client_refused({"round": 2, "client": "bert", "reason": "client 'bert': loss is nan"})
    assert stream.getvalue() == "round 2: REFUSED client 'bert': loss is nan\n"


def test_the_time_left_follows_the_last_whole_round(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = progress.Pace()
    pace.round_started(1, 4, 2)
    assert pace.left() == 0.0
    pace.client_started(10)
    now[0] = 110.0
    for _ in range(5):
        pace.step(10)
    # A quarter of the round took 10 s: 30 s are left of it, and three rounds of 40 s.
    assert pace.left() == pytest.approx(150.0)
    now[0] = 160.0
    pace.round_started(2, 4, 2)
    pace.client_finished()
    # The first round took 60 s in all: half of one and two more.
    assert pace.left() == pytest.approx(150.0)


def test_speed_is_that_of_the_last_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = progress.Pace()
    pace.client_started(30)
    assert pace.tokens_per_second() == 0.0
    for i in range(20):
        now[0] += 10.0 if i < 5 else 2.0
        pace.step(100)
    assert pace.tokens_per_second() == pytest.approx(50.0)


def test_durations_are_written_for_people():
    assert [progress.duration(s) for s in (0.4, 59, 61, 200, 3600, 7500)] == [
        "0 s", "59 s", "1 min 01 s", "3 min 20 s", "1 h 0 min", "2 h 5 min",
    ]  # fmt: skip
