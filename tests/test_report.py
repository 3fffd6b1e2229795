"""flex.report and its parts: the numbers taken from a run, the tables, the plots, the page."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import tiny_config

from flex.report import make_report
from flex.report.data import (
    SPEED_FILE,
    cost_table,
    final_table,
    human_bytes,
    human_count,
    median,
    unique_labels,
)
from flex.report.plots import STRATEGY_COLOURS, colours
from flex.report.reader import read_run, read_runs

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]


class Page(HTMLParser):
    """Cells of tables, pictures, headings, and every address the page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.pictures: list[bytes] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for address in (given.get("src"), given.get("href")):
            if address and address.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(address.partition(",")[2]))
            elif address:
                self.fetched.append(address)
        if tag in ("script", "link"):
            self.fetched.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def write_run(
    folder: Path, strategy: str, planned: int = 3, finished: int = 3, clients=("anna", "bert")
) -> Path:
    """A run's folder with numbers that are easy to check: client c's loss after round r is 4 - c - r / 2."""
    config = tiny_config(
        Path("model"), Path("rows"), folder, federation={"strategy": strategy, "rounds": planned}
    )
    (folder / "rounds").mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    sent = 0 if strategy == "local" else 1024
    events: list[dict] = [
        {
            "event": "run",
            "round": 0,
            "clients": {c: [9, 3] for c in clients},
            "parameters": {"shared": 1500, "personal": 2_500_000 if strategy == "flex" else 0, "frozen": 9},
        }
    ]
    for r in range(finished + 1):
        for client in clients:
            if r:
                work = {"tokens": 100, "seconds": 0.5, "peak_bytes": 2**30 + r}
                events.append({"event": "client", "round": r, "client": client, **work})
        if r:
            n = len(clients)
            events.append({"event": "round", "round": r, "bytes_up": sent * n, "bytes_down": 2 * sent * n})
        for c, client in enumerate(clients):
            measured = {"loss": 4 - c - r / 2, "perplexity": 10.0}
            if r in (0, finished):
                measured |= {"exact_match": 0.25 * r, "rouge_l": 0.5}
            if r and strategy == "flex":
                measured["gates"] = dict(zip(LAYERS, (0.5, 0.25 + 0.1 * c, 0.75)))
            events.append({"event": "evaluation", "round": r, "client": client, **measured})
    (folder / "rounds" / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


@pytest.fixture
def three_runs(tmp_path):
    return [write_run(tmp_path / strategy, strategy) for strategy in ("local", "fedavg", "flex")]


def test_the_numbers_of_a_run_are_those_of_its_history(tmp_path):
    run = read_run(write_run(tmp_path / "r", "flex"))
    assert run.clients == ["anna", "bert"]
    assert run.loss["bert"] == {0: 3.0, 1: 2.5, 2: 2.0, 3: 1.5}
    assert run.mean_loss() == {0: 3.5, 1: 3.0, 2: 2.5, 3: 2.0}
    assert run.traffic == {r: (2048, 4096) for r in (1, 2, 3)}
    assert (run.tokens, run.seconds, run.tokens_per_second) == (600, 3.0, 200.0)
    assert run.peak_memory == 2**30 + 3
    assert run.gates["bert"] == {LAYERS[0]: 0.5, LAYERS[1]: 0.35, LAYERS[2]: 0.75}
    assert (run.travelling, run.staying) == (1500, 2_500_000)
    assert run.complete


def test_lora_of_the_local_strategy_counts_as_staying(tmp_path):
    run = read_run(write_run(tmp_path / "r", "local"))
    assert (run.travelling, run.staying) == (0, 1500)


def test_the_final_table_has_the_start_and_the_last_of_each_metric(three_runs):
    headings, rows = final_table(read_runs(three_runs))
    assert headings == ["client", "run", "loss", "perplexity", "exact match", "ROUGE-L"]
    assert rows[0] == ["anna", "before", "4.000", "10.00", "0%", "0.500"]
    assert rows[3] == ["anna", "flex", "2.500", "10.00", "75%", "0.500"]
    assert rows[-1] == ["mean", "flex", "2.000", "10.00", "75%", "0.500"]
    assert len(rows) == 3 * 4


def test_the_cost_table_adds_up_all_rounds(three_runs):
    _, rows = cost_table(read_runs(three_runs))
    local, _, flex = rows
    assert local[:4] == ["local", "3", "0 B", "0 B"]
    assert flex == ["flex", "3", "6.0 KiB", "12.0 KiB", "1.5K", "2.5M", "1.0 GiB", "200"]


def test_the_page_stands_alone_and_holds_every_plot_and_number(three_runs, tmp_path):
    ours = {"name": "flex_kernels", "tokens_per_second": [300, 340, 400], "extra_memory": [2**20] * 3}
    stock = {"name": "transformers, eager", "tokens_per_second": [100], "extra_memory": [2**22]}
    layers = [layer | {"peak_memory": [2**30]} for layer in (ours, stock)]
    (tmp_path / SPEED_FILE).write_text(json.dumps({"what": "one step <b>", "layers": layers}))
    report = make_report(three_runs, tmp_path / "out")
    text = report.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert sorted(p.name for p in report.pictures) == [
        "bytes.png",
        "gates.png",
        "loss.png",
        "memory.png",
        "speed.png",
    ]
    assert sorted(page.pictures) == sorted(p.read_bytes() for p in report.pictures)
    assert all(picture.startswith(b"\x89PNG") for picture in page.pictures)
    drawn = ["Loss", "Gate openings", "Bytes sent", "Peak memory", "Against the stock layer"]
    assert page.headings == ["Final metrics", "Cost", *drawn, "Settings"]
    for cell in ("anna", "bert", "mean", "2.500", "75%", "6.0 KiB", "340", "4.0 MiB"):
        assert cell in page.cells
    assert "one step &lt;b&gt;" in text
    numbers = json.loads(report.numbers.read_text())
    assert [run["strategy"] for run in numbers["runs"]] == ["local", "fedavg", "flex"]
    assert numbers["runs"][2]["loss"]["bert"]["3"] == 1.5


def test_an_unfinished_run_is_reported_up_to_where_it_is(tmp_path):
    run = write_run(tmp_path / "r", "fedavg", planned=9, finished=2)
    report = make_report([run], tmp_path / "out")
    assert "2 of 9 rounds so far" in report.page.read_text()
    assert "gates.png" not in [p.name for p in report.pictures]


def test_a_run_that_has_only_begun_is_reported(tmp_path):
    run = write_run(tmp_path / "r", "flex")
    history = run / "rounds" / "history.jsonl"
    # Cut in the middle of the first evaluation's line, as a kill leaves it.
    history.write_text("".join(history.read_text().splitlines(True)[:1]) + '{"event": "evalua')
    report = make_report([run], tmp_path / "out")
    assert report.pictures == []
    assert "0 of 3 rounds so far" in report.page.read_text()


@pytest.mark.parametrize("picture", ["loss.png", "bytes.png"])
def test_a_plot_that_a_full_disk_cuts_short_is_named_and_leaves_the_earlier_one(tmp_path, picture):
    """The system itself refuses (RLIMIT_FSIZE), in a process of its own: the limit would hit the test runner
    too.
    """
    run = write_run(tmp_path / "r", "flex")
    make_report([run], tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    function = {"loss.png": "plot_loss", "bytes.png": "plot_bytes"}[picture]
    program = f"""
import resource, signal
from pathlib import Path
from flex.report.plots import {function}
from flex.report.reader import read_runs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
runs = read_runs([Path({str(run)!r})])
{function}(runs, Path({str(tmp_path / "warm.png")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    {function}(runs, Path({str(tmp_path / "out" / picture)!r}))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "File too large while writing" in done.stdout and f"out/{picture}" in done.stdout
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_refused_updates_are_listed(tmp_path):
    run = write_run(tmp_path / "r", "flex")
    with open(run / "rounds" / "history.jsonl", "a") as out:
        out.write(
            json.dumps(
                {"event": "refused", "round": 3, "client": "anna", "reason": "loss is nan", "bytes_down": 1}
            )
            + "\n"
        )
    page = Page(make_report([run], tmp_path / "out").page.read_text())
    assert "Refused updates" in page.headings
    assert "loss is nan" in page.cells


def test_a_run_without_a_start_borrows_it_from_one_with_the_same_settings(three_runs):
    for folder in three_runs[1:]:
        history = folder / "rounds" / "history.jsonl"
        kept = [
            line
            for line in history.read_text().splitlines(True)
            if '"round": 0' not in line or '"run"' in line
        ]
        history.write_text("".join(kept))
    local, fedavg, _ = read_runs(three_runs)
    assert fedavg.loss["anna"] == local.loss["anna"] | {0: 4.0}
    other = three_runs[1] / "config.toml"
    other.write_text(other.read_text().replace("seed = 0", "seed = 1"))
    assert 0 not in read_runs(three_runs)[1].loss["anna"]


def test_many_clients_and_layers_still_draw(tmp_path):
    run = write_run(tmp_path / "r", "flex", clients=[f"client-{i:02d}" for i in range(50)])
    assert len(make_report([run], tmp_path / "out").pictures) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", "no such folder"),
        (lambda p: p, "no config.toml in it; it holds the runs flex"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path, make, message):
    write_run(tmp_path / "flex", "flex")
    folder = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        make_report([folder], tmp_path / "out")
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        make_report([], tmp_path)


def test_a_damaged_history_is_named(tmp_path):
    run = write_run(tmp_path / "r", "flex")
    history = run / "rounds" / "history.jsonl"
    history.write_text('{"event": "client", "round": 1}\n' + history.read_text())
    with pytest.raises(ValueError, match="'client' event without 'tokens'"):
        read_run(run)


def test_labels_tell_runs_apart():
    assert unique_labels([("flex", "a"), ("local", "b")]) == ["flex", "local"]
    assert unique_labels([("flex", "a"), ("flex", "b")]) == ["flex (a)", "flex (b)"]
    assert unique_labels([("flex", "a"), ("flex", "a")]) == ["flex (a) #1", "flex (a) #2"]


def test_every_run_has_a_colour_of_its_own(tmp_path):
    runs = read_runs([write_run(tmp_path / name, "flex") for name in "abc"])
    assert colours(runs)[0] == STRATEGY_COLOURS["flex"]
    assert len(set(colours(runs))) == 3


def test_sizes_are_written_for_people():
    assert [human_bytes(n) for n in (0, 1023, 1024, 3 * 2**20, 2**40)] == [
        "0 B", "1023 B", "1.0 KiB", "3.0 MiB", "1024.0 GiB",
    ]  # fmt: skip
    assert [human_count(n) for n in (12, 1500, 2_000_000, 3e9)] == ["12", "1.5K", "2.0M", "3.0B"]
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5
