"""From a run's folder (settings and history) to the report's plain numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex.config import Config
from flex.history import read_history
from flex.report.data import METRICS, RunData, unique_labels
from flex.strategies import STRATEGIES


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs in the order given, labelled so that they can be told apart.

    Raises:
        ValueError: no folder, or one is not a run (named, with what is missing), or its history is damaged.
    """
    if not folders:
        raise ValueError("no run was given; a report needs at least one run's folder")
    runs = [read_run(folder) for folder in folders]
    for run, label in zip(runs, unique_labels([(run.strategy, run.folder.name) for run in runs])):
        run.label = label
    share_start(runs)
    return runs


def share_start(runs: Sequence[RunData]) -> None:
    """Gives what one run measured before training to those that would have measured the same but did not."""
    for run, other in itertools.permutations(runs, 2):
        same = all(run.config[table] == other.config[table] for table in ("data", "partition"))
        same = same and all(
            run.config["model"][key] == other.config["model"][key] for key in ("path", "dtype")
        )
        same = same and all(
            run.config["evaluation"][key] == other.config["evaluation"][key]
            for key in ("rows", "generate", "generate_rows", "max_new_tokens")
        )
        if not same or run.config["run"]["seed"] != other.config["run"]["seed"]:
            continue
        for client, metrics in other.metrics.items():
            if 0 in metrics and 0 not in run.metrics.get(client, {}):
                run.metrics.setdefault(client, {})[0] = metrics[0]
                run.loss.setdefault(client, {})[0] = metrics[0]["loss"]


def read_run(folder: Path) -> RunData:
    """One run, finished or not. Raises ValueError: ``folder`` is no run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run: there is no such folder")
    if not (folder / "config.toml").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.toml"))
        hint = f"; it holds the runs {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} is not a run: there is no config.toml in it{hint}")
    config = Config.from_toml(folder / "config.toml")
    strategy, rounds = config.federation.strategy, config.federation.rounds
    run = RunData(folder.resolve(), strategy, strategy, rounds, 0, config=config.to_dict())
    if not (folder / "rounds" / "history.jsonl").is_file():
        return run
    for event in read_history(folder):
        take = TAKE.get(event["event"])
        if take is not None:
            try:
                take(run, event)
            except KeyError as missing:
                raise ValueError(
                    f"{folder}: its history has a {event['event']!r} event without {missing}"
                ) from None
    return run


def take_run(run: RunData, event: dict[str, Any]) -> None:
    run.clients = list(event["clients"])
    shared, personal = (event["parameters"][kind] for kind in ("shared", "personal"))
    run.travelling, run.staying = (
        (shared, personal) if STRATEGIES[run.strategy].travels else (0, shared + personal)
    )


def take_client(run: RunData, event: dict[str, Any]) -> None:
    run.tokens += event["tokens"]
    run.seconds += event["seconds"]
    run.peak_memory = max(run.peak_memory, event["peak_bytes"])


def take_round(run: RunData, event: dict[str, Any]) -> None:
    run.finished = event["round"]
    run.traffic[event["round"]] = (event["bytes_up"], event["bytes_down"])


def take_refused(run: RunData, event: dict[str, Any]) -> None:
    run.refused.append((event["round"], event["client"], event["reason"]))


def take_evaluation(run: RunData, event: dict[str, Any]) -> None:
    client, round_ = event["client"], event["round"]
    if client not in run.clients:
        run.clients.append(client)
    run.loss.setdefault(client, {})[round_] = event["loss"]
    run.metrics.setdefault(client, {})[round_] = {key: event[key] for key in METRICS if key in event}
    if event.get("gates") and round_:
        run.gates[client] = event["gates"]


TAKE = {
    "run": take_run,
    "client": take_client,
    "round": take_round,
    "refused": take_refused,
    "evaluation": take_evaluation,
}
