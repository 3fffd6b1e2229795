"""A run killed at any moment continues from its last finished round and ends with the same numbers, to the
bit.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_config, write_rows

from flex.config import ConfigError
from flex.data import DataError
from flex.federation import run
from flex.observer import Observer
from flex.store import StoreError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    rows = write_rows(folder / "rows.jsonl", {"anna": 8, "bert": 8, "cleo": 8})
    return save_tiny(folder / "model"), rows


# Data, settings, shared state, commit, evaluation: 5 writes before round 1. Then each round has two clients'
# (none with fedavg), the shared state, the commit, the evaluation.
@pytest.mark.parametrize(
    "strategy, numbers, writes",
    [("flex", "all", range(1, 16)), ("local", "7 13", [7, 13]), ("fedavg", "6 10", [6, 10])],
)
def test_a_run_killed_before_a_write_ends_as_if_it_had_not_been(tiny, tmp_path, strategy, numbers, writes):
    arguments = [str(tiny[0]), str(tiny[1]), str(tmp_path), strategy, *numbers.split()]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_runs.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    whole, *killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert whole["exit"] == 0, done.stderr
    assert len(whole["state"]["tensors"]) >= 1 and len(whole["state"]["history"]) > 10
    assert [result["killed_at"] for result in killed] == list(writes)
    for result in killed:
        assert result["exit"] == 0, done.stderr
        assert result["state"] == whole["state"], f"killed at write {result['killed_at']}"


class Stop(Observer):
    """Ends the run, as a person would, in the middle of a client's steps."""

    def __init__(self, after: int):
        self.left = after

    def step(self, client, tokens, loss):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def metrics_of(result) -> dict:
    return {
        c: {k: v for k, v in m.items() if k not in ("seconds", "peak_bytes")}
        for c, m in result.metrics.items()
    }


def test_a_run_stopped_between_two_steps_ends_with_the_same_metrics(tiny, tmp_path):
    whole = run(tiny_config(*tiny, tmp_path / "whole"))
    for after in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            run(tiny_config(*tiny, tmp_path / f"stopped-{after}"), observer=Stop(after))
        assert metrics_of(run(resume=tmp_path / f"stopped-{after}")) == metrics_of(whole)


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    first = run(tiny_config(*tiny, tmp_path / "run"))
    history = (tmp_path / "run/rounds/history.jsonl").read_bytes()
    again = run(resume=tmp_path / "run")
    assert again.metrics == first.metrics
    assert (tmp_path / "run/rounds/history.jsonl").read_bytes() == history


def test_a_run_may_be_moved_and_then_resumed(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(*tiny, tmp_path / "here"), observer=Stop(9))
    (tmp_path / "here").rename(tmp_path / "there")
    result = run(tiny_config(*tiny, tmp_path / "anywhere"), resume=tmp_path / "there")
    assert result.folder == tmp_path / "there" and not (tmp_path / "here").exists()


def test_other_settings_other_data_and_no_run_are_refused_by_name(tiny, tmp_path):
    model, rows = tiny
    mine = tmp_path / "rows.jsonl"
    mine.write_bytes(rows.read_bytes())
    config = tiny_config(model, mine, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=Stop(1))
    other = dataclasses.replace(config, training=dataclasses.replace(config.training, clip=0.5))
    with pytest.raises(ConfigError, match=r"training\.clip=0\.5, but the run in .* was started with 1\.0"):
        run(other, resume=tmp_path / "run")
    with pytest.raises(StoreError, match=r"nowhere holds no run to resume"):
        run(resume=tmp_path / "nowhere")
    mine.write_text(rows.read_text().replace("say b 3", "say b three"))
    with pytest.raises(DataError, match=r"the rows differ from those that the run .* began with"):
        run(resume=tmp_path / "run")
    mine.write_text("".join(rows.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(
        DataError, match=r"client 'cleo' had \(training, held-out\) rows \[6, 2\] .*, now \[4, 1\]"
    ):
        run(resume=tmp_path / "run")
