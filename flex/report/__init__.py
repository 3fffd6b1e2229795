"""Plots and one HTML page about one run, or several compared, finished or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flex.files import atomic_write
from flex.report.data import (
    RunData,
    cost_table,
    final_table,
    load_speed,
    speed_table,
)
from flex.report.page import Section, Table, page
from flex.report.plots import plot_bytes, plot_gates, plot_loss, plot_memory, plot_speed
from flex.report.reader import read_runs


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    pictures: list[Path]
    numbers: Path


def make_report(folders: Sequence[str | Path], out: str | Path) -> Report:
    """Reads the runs and writes ``report.html``, ``report.json`` and the PNG plots into ``out``.

    A run that has not finished is reported up to where it is.

    Raises:
        ValueError: ``folders`` is empty, or one of them is not a run (named).
        OSError: ``out`` cannot be written.
    """
    runs = read_runs([Path(folder) for folder in folders])
    speeds, speed_text = load_speed([run.folder for run in runs])
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    pictures = {
        "loss": plot_loss(runs, target / "loss.png"),
        "gates": plot_gates(runs, target / "gates.png"),
        "bytes": plot_bytes(runs, target / "bytes.png"),
        "memory": plot_memory(runs, target / "memory.png"),
        "speed": plot_speed(speeds, target / "speed.png"),
    }
    sections = [
        Section(
            "Final metrics",
            "On each client's held-out rows; the newest measurement of each metric. Loss is the mean over "
            "the answer's tokens in nats. 'before' is the pretrained model.",
            table=Table(*final_table(runs), words=2),
        ),
        Section("Cost", COST_TEXT, table=Table(*cost_table(runs))),
    ]
    if pictures["loss"]:
        sections.append(Section("Loss", LOSS_TEXT, pictures["loss"]))
    if pictures["gates"]:
        sections.append(Section("Gate openings", GATES_TEXT, pictures["gates"]))
    if pictures["bytes"]:
        sections.append(Section("Bytes sent", BYTES_TEXT, pictures["bytes"]))
    if pictures["memory"]:
        sections.append(Section("Peak memory", MEMORY_TEXT, pictures["memory"]))
    if speeds:
        sections.append(
            Section("Against the stock layer", speed_text, pictures["speed"], Table(*speed_table(speeds)))
        )
    refused = [[run.label, str(r), client, why] for run in runs for r, client, why in run.refused]
    if refused:
        sections.append(
            Section(
                "Refused updates",
                "Left out of their round's average; the client kept its earlier state.",
                table=Table(["run", "round", "client", "reason"], refused, words=4),
            )
        )
    settings = [(run.label, (run.folder / "config.toml").read_text(encoding="utf-8")) for run in runs]
    with atomic_write(target / "report.html") as temporary:
        temporary.write_text(page("FLEx federation", lead(runs), sections, settings), encoding="utf-8")
    with atomic_write(target / "report.json") as temporary:
        temporary.write_text(json.dumps(numbers(runs, speeds), indent=1), encoding="utf-8")
    return Report(target / "report.html", [p for p in pictures.values() if p], target / "report.json")


def lead(runs: Sequence[RunData]) -> str:
    progress = [
        f"{run.label}: {run.finished} rounds"
        if run.complete
        else f"{run.label}: {run.finished} of {run.rounds} rounds so far"
        for run in runs
    ]
    models = sorted({str(run.config.get("model", {}).get("path", "?")) for run in runs})
    clients = sorted({len(run.clients) for run in runs})
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    counts = " / ".join(map(str, clients))
    return f"Model {', '.join(models)}; {counts} clients; {'; '.join(progress)}. Made {made}."


def numbers(runs: Sequence[RunData], speeds: Sequence[Any]) -> dict[str, Any]:
    """Every number of the report, for other programs."""
    return {
        "runs": [{**asdict(run), "folder": str(run.folder)} for run in runs],
        "layers": [asdict(speed) for speed in speeds],
    }


COST_TEXT = (
    "Bytes are counted from the tensors that went up to the server and down to the clients, over all rounds. "
    "What is trained and travels is averaged by the server; what stays never leaves its client. Tokens per "
    "second are of local training alone, without selection and evaluation."
)
LOSS_TEXT = "Held-out loss of each client against the round; round 0, dotted, is the pretrained model."
GATES_TEXT = (
    "How far each layer lets the client's personal expert in: the gate's mean over the client's held-out "
    "tokens, in the last evaluation that recorded it. 0 leaves the pretrained layer as it was."
)
BYTES_TEXT = (
    "All clients of a round together. Above the line: sent to the server. Below: sent to the clients."
)
MEMORY_TEXT = (
    "The most that one client's training needed, the frozen model included: the process's resident memory on "
    "a CPU, what torch allocated on a GPU."
)
