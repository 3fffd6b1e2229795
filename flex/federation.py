"""A whole federation from its settings, and its continuation after any kind of end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flex.config import Config, ConfigError
from flex.data import DataError, fingerprint, load_clients
from flex.history import History, read_history
from flex.memory import PeakMemory
from flex.observer import Observer
from flex.server import Server, sample_clients
from flex.session import Session, load_session, usable_device
from flex.store import Commit, Store, StoreError

MAY_DIFFER = {"run.folder", "run.threads"}
"""Settings that a resumed run may change without changing what it computes."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        folder: the run's folder. rounds: how many were trained.
        metrics: client -> its last evaluation (see :func:`flex.evaluate.evaluate_rows`).
    """

    folder: Path
    rounds: int
    metrics: dict[str, dict[str, Any]]

    def history(self) -> Iterator[dict[str, Any]]:
        """The events, one at a time, from the file."""
        return read_history(self.folder)


def run(
    config: Config | None = None,
    resume: str | os.PathLike | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """Trains a federation, or continues one.

    A run that was killed, at any moment, continues after its last finished round and ends with the numbers of
    a run that was not: every random number depends on the seed, the round and the client, never on what was
    drawn before. (The same machine and number of threads; other ones may round differently.)

    Args:
        config: the settings; with ``resume`` it may be left out, and must otherwise be the run's own.
        resume: folder of a run to continue.
        observer: is told what happens; the library itself prints nothing.

    Raises:
        ConfigError, DataError: a setting or the data is refused, before a model is loaded.
        StoreError: the folder holds a run already (or none, to resume), another process is running it, the
            disk is full, a client's file is damaged or gone. RoundError: no client of a round returned a
            usable update. What was committed before is intact and can be resumed.
    """
    observer = observer or Observer()
    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"config must be a flex.Config, got {type(config).__name__}; "
            "from plain dicts use Config.from_dict"
        )
    if resume is not None:
        store = Store(resume)
        config = stored_config(store, config)
    elif config is None:
        raise ConfigError("config is missing; give a flex.Config, or resume=FOLDER")
    else:
        store = Store(config.run.folder)
        store.check_free()
    usable_device(config)
    clients = load_clients(config)
    data = fingerprint(clients)
    sample_clients(list(data["sizes"]), config, 1)
    check_length(config)
    try:
        with threads(config.run.threads):
            commit = None
            if resume is not None:
                commit = store.open()
                check_same_data(store, data)
            session = load_session(config, clients, store)
            # Only now: a run whose model cannot be loaded leaves no folder behind.
            if resume is None:
                store.create(config.to_toml(), data)
            return train(session, commit, data, observer)
    finally:
        store.release()


def check_length(config: Config) -> None:
    """Raise ConfigError when rows may be longer than the model's positions; reads its config.json alone."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(config.model.local_path())
    except (OSError, ValueError):
        return  # Loading the model says why, in terms of model.path.
    most = getattr(settings, "max_position_embeddings", None)
    if most is None:
        return
    # YaRN and its kin stretch the positions; some checkpoints give the stretched number, some the original.
    rope = getattr(settings, "rope_parameters", None) or {}
    stretched = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0)
    if config.data.max_length > max(most, stretched):
        raise ConfigError(
            f"data.max_length={config.data.max_length} exceeds the {max(most, stretched):.0f} positions of "
            f"model.path={config.model.path!r} (max_position_embeddings)"
        )


def train(session: Session, commit: Commit | None, data: Mapping[str, Any], observer: Observer) -> RunResult:
    store, rounds = session.store, session.config.federation.rounds
    history = History(store.history, commit.history_bytes if commit else 0, store.intact)
    try:
        server = Server(session, history, observer)
        started = {"round": commit.round if commit else 0, **describe(session, data)}
        if commit is None:
            history.append("run", **started)
            store.save_shared(0, session.shared)
            commit = store.commit(0, not server.evaluates(0), history.sync())
        observer.run_started({"event": "run", **started})
        if not commit.evaluated:
            server.evaluate(commit.round)
        for round_ in range(commit.round + 1, rounds + 1):
            server.train_round(round_)
            if server.evaluates(round_):
                server.evaluate(round_)
        result = RunResult(store.folder, rounds, last_metrics(store.history))
        observer.run_finished({"event": "finished", "round": rounds, "metrics": result.metrics})
        return result
    finally:
        history.close()


def last_metrics(history: Path) -> dict[str, dict[str, Any]]:
    """Client -> its last evaluation."""
    metrics: dict[str, dict[str, Any]] = {}
    for event in read_history(history):
        if event["event"] == "evaluation":
            metrics[event["client"]] = {k: v for k, v in event.items() if k not in ("event", "client")}
    return dict(sorted(metrics.items()))


def describe(session: Session, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the history wants to know first."""
    import transformers

    device = next(session.model.parameters()).device
    return {
        "strategy": session.strategy.name,
        "rounds": session.config.federation.rounds,
        "clients": data["sizes"],
        "model": type(session.model).__name__,
        "parameters": session.parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "memory_kind": PeakMemory(device).kind,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def stored_config(store: Store, given: Config | None) -> Config:
    """The run's own settings, with ``given``'s folder and threads. Raises ConfigError when another setting
    differs.
    """
    if not store.exists():
        raise StoreError(f"{store.folder} holds no run to resume: there is no config.toml in it")
    stored = Config.from_toml(store.folder / "config.toml")
    if given is None:
        return stored
    theirs, ours = stored.to_dict(), given.to_dict()
    for table, values in theirs.items():
        for key, value in values.items():
            if ours[table][key] != value and f"{table}.{key}" not in MAY_DIFFER:
                raise ConfigError(
                    f"{table}.{key}={ours[table][key]!r}, but the run in {store.folder} was started "
                    f"with {value!r}; resume with its own settings, or start a new run"
                )
    return given


def check_same_data(store: Store, data: Mapping[str, Any]) -> None:
    path = store.folder / "data.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if stored == data:
        return
    for name in sorted(stored["sizes"].keys() | data["sizes"].keys()):
        before, now = stored["sizes"].get(name), data["sizes"].get(name)
        if before != now:
            raise DataError(
                f"client {name!r} had (training, held-out) rows {before} when the run began, now {now}"
            )
    raise DataError(
        f"the rows differ from those that the run in {store.folder} began with (SHA-256 in {path})"
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
