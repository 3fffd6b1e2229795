"""What a report says about a run: plain numbers, taken from the run's history and settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = {
    # key in the history -> (heading, format, whether more is better)
    "loss": ("loss", "{:.3f}", False),
    "perplexity": ("perplexity", "{:.2f}", False),
    "verifier": ("verifier", "{:.0%}", True),
    "exact_match": ("exact match", "{:.0%}", True),
    "rouge_l": ("ROUGE-L", "{:.3f}", True),
}
SPEED_FILE = "stock_comparison.json"


@dataclass
class RunData:
    """One run.

    Attributes:
        label: what the plots call it.
        rounds, finished: rounds planned, and the last that is on disk.
        loss: client -> {round: held-out loss}; round 0 is the pretrained model.
        metrics: client -> {round: the metrics measured then}, keys of :data:`METRICS`.
        gates: client -> {layer: mean gate opening, 0 to 1} of the last evaluation that has any.
        traffic: round -> (bytes up, bytes down), all clients together.
        tokens, seconds: of all local training.
        travelling, staying: how many numbers a client trains that go to the server, and that never leave it.
        refused: (round, client, reason) of updates left out.
    """

    folder: Path
    label: str
    strategy: str
    rounds: int
    finished: int
    clients: list[str] = field(default_factory=list)
    loss: dict[str, dict[int, float]] = field(default_factory=dict)
    metrics: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    gates: dict[str, dict[str, float]] = field(default_factory=dict)
    traffic: dict[int, tuple[int, int]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    travelling: int = 0
    staying: int = 0
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.finished >= self.rounds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def first(self, client: str) -> dict[str, float]:
        """The client's metrics before training; {} when they were not measured."""
        return self.metrics.get(client, {}).get(0, {})

    def last(self, client: str) -> dict[str, float]:
        """The newest value of each of the client's metrics after round 0; some are measured less often."""
        newest: dict[str, float] = {}
        for round_, values in sorted(self.metrics.get(client, {}).items()):
            if round_:
                newest.update(values)
        return newest

    def mean_loss(self) -> dict[int, float]:
        """Round -> mean over the clients, for rounds in which all of them were measured."""
        rounds = set.intersection(*(set(values) for values in self.loss.values())) if self.loss else set()
        return {r: sum(values[r] for values in self.loss.values()) / len(self.loss) for r in sorted(rounds)}


@dataclass(frozen=True)
class Speed:
    """One way to compute the layer in one federation step, from :mod:`flex.compare`.

    Attributes:
        name: for example "flex_kernels, preact" or "transformers, grouped_mm".
        tokens_per_second: of each timed process (their medians).
        extra_memory: bytes above the loaded model, of each process.
        peak_memory: bytes, of each process.
    """

    name: str
    tokens_per_second: list[float]
    extra_memory: list[int]
    peak_memory: list[int]


def load_speed(folders: Iterable[Path]) -> tuple[list[Speed], str]:
    """The comparison with the stock layer kept beside the runs, and how it was made; ([], "") if none."""
    for folder in folders:
        for place in (folder, folder.parent):
            path = place / SPEED_FILE
            if path.is_file():
                content = json.loads(path.read_text(encoding="utf-8"))
                return [Speed(**entry) for entry in content["layers"]], str(content["what"])
    return [], ""


def unique_labels(names: Sequence[tuple[str, str]]) -> list[str]:
    """Labels for (strategy, folder name) pairs: the strategy where that tells the runs apart, else both."""
    strategies = [strategy for strategy, _ in names]
    labels = [s if strategies.count(s) == 1 else f"{s} ({name})" for s, name in names]
    return [x if labels.count(x) == 1 else f"{x} #{i + 1}" for i, x in enumerate(labels)]


def final_table(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the last metrics: one row a client and run, the model before training first.

    Only metrics that some run measured get a column. The clients' mean stands last.
    """
    keys = [
        k for k in METRICS if any(k in run.last(c) or k in run.first(c) for run in runs for c in run.clients)
    ]
    headings = ["client", "run", *(METRICS[k][0] for k in keys)]
    clients = list(dict.fromkeys(c for run in runs for c in run.clients))
    rows: list[list[str]] = []
    columns: dict[str, list[Mapping[str, float]]] = {}
    for client in clients:
        before = next((run.first(client) for run in runs if run.first(client)), {})
        entries = [("before", before)] if before else []
        entries += [(run.label, run.last(client)) for run in runs if run.last(client)]
        for label, values in entries:
            columns.setdefault(label, []).append(values)
            rows.append([client, label, *(shown(k, values.get(k)) for k in keys)])
    if len(clients) > 1:
        for label, measured in columns.items():
            means = {
                k: sum(v[k] for v in measured) / len(measured) for k in keys if all(k in v for v in measured)
            }
            rows.append(["mean", label, *(shown(k, means.get(k)) for k in keys)])
    return headings, rows


def cost_table(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of what each run cost: one row a run."""
    headings = [
        "run", "rounds", "sent up", "sent down",
        "trained, travels", "trained, stays", "peak memory", "tokens/s",
    ]  # fmt: skip
    rows = []
    for run in runs:
        up, down = (sum(pair[i] for pair in run.traffic.values()) for i in (0, 1))
        rows.append(
            [
                run.label,
                f"{run.finished}" if run.complete else f"{run.finished} of {run.rounds}",
                human_bytes(up),
                human_bytes(down),
                human_count(run.travelling),
                human_count(run.staying),
                human_bytes(run.peak_memory) if run.peak_memory else "",
                f"{run.tokens_per_second:,.0f}" if run.seconds else "",
            ]
        )
    return headings, rows


def speed_table(speeds: Sequence[Speed]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): the layers side by side, medians over the processes."""
    rows = [
        [
            s.name,
            f"{median(s.tokens_per_second):,.0f}",
            human_bytes(median(s.extra_memory)),
            human_bytes(median(s.peak_memory)),
            str(len(s.tokens_per_second)),
        ]
        for s in speeds
    ]
    return ["layer", "tokens/s", "memory above the loaded model", "peak memory", "processes"], rows


def shown(key: str, value: float | None) -> str:
    return "" if value is None else METRICS[key][1].format(value)


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_count(count: float) -> str:
    for unit in ("", "K", "M"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}B"
