"""A run's folder: what is in it, and how a round becomes permanent in one step.

    run/config.toml                          the settings
    run/data.json                            sizes and SHA-256 of every client's rows
    run/latest                               which round is finished: the one file whose renaming commits a
    round run/rounds/history.jsonl                 one event a line run/rounds/0003.shared.safetensors
    what the server holds after round 3 run/clients/<name>/0003.safetensors      what stayed with the client
    when it last took part, in round 3

Files of round r+1 are written beside those of round r under new names. Renaming ``latest`` makes them
current; until then they count for nothing and a resumed run deletes them. So a run may die at any moment,
also between two clients.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flex.files import atomic_write, load_tensors, save_tensors

ROUND_FILE = re.compile(r"^(\d{4,})\.(?:shared\.)?safetensors$")


class StoreError(RuntimeError):
    """A file of the run cannot be written or read; names client and file. What was committed is intact."""


@dataclass(frozen=True)
class Commit:
    """``round`` is finished, ``evaluated`` if its evaluation is too; the history counts up to a byte."""

    round: int
    evaluated: bool
    history_bytes: int


class Store:
    """The files of one run. Holds no tensors: memory does not grow with the number of clients."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.rounds = self.folder / "rounds"
        self.clients = self.folder / "clients"
        self.history = self.rounds / "history.jsonl"
        self.committed: Commit | None = None
        self.lock: Any = None

    def exists(self) -> bool:
        return (self.folder / "config.toml").exists()

    def create(self, config_toml: str, data: Mapping[str, Any]) -> None:
        """Raises StoreError: the folder already holds a run, or cannot be written."""
        if self.exists():
            raise StoreError(f"{self.folder} already holds a run; resume it, or choose another run.folder")
        try:
            self.rounds.mkdir(parents=True, exist_ok=True)
            self.clients.mkdir(exist_ok=True)
            self.acquire()
            self.sweep(-1)
            self.write_text("data.json", json.dumps(data, indent=1, ensure_ascii=False))
            # Last: a folder with config.toml is a run that can be resumed.
            self.write_text("config.toml", config_toml)
        except OSError as error:
            raise StoreError(f"{self.folder}: the run's folder cannot be written: {error}") from error

    def open(self) -> Commit | None:
        """Reads what is committed and removes what is not. None: no round, not even 0, was committed.

        Raises:
            StoreError: there is no run here, another process is running it, or ``latest`` is not readable.
        """
        if not self.exists():
            raise StoreError(f"{self.folder} holds no run: there is no config.toml in it")
        self.acquire()
        self.committed = self.read_latest()
        self.sweep(-1 if self.committed is None else self.committed.round)
        return self.committed

    def sweep(self, last: int) -> None:
        """Deletes half-written files and those of rounds after ``last``."""
        for folder in (self.folder, self.rounds, *(f for f in self.clients.iterdir() if f.is_dir())):
            for file in folder.iterdir():
                number = round_of(file)
                if file.name.endswith(".tmp") or (number is not None and number > last):
                    file.unlink()

    def read_latest(self) -> Commit | None:
        path = self.folder / "latest"
        if not path.exists():
            return None
        try:
            return Commit(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{path} cannot be read ({error}); it says which round is finished") from error

    def acquire(self) -> None:
        """One process a run: the lock goes when the process does, however it ends."""
        try:
            import fcntl
        except ImportError:
            return
        self.lock = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{self.folder}: another process is running this run") from error

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def commit(self, round_: int, evaluated: bool, history_bytes: int) -> Commit:
        """Makes ``round_`` the finished one, in one rename, then deletes the shared state it replaces."""
        commit = Commit(round_, evaluated, history_bytes)
        try:
            self.write_text("latest", json.dumps(asdict(commit)))
        except OSError as error:
            raise StoreError(f"round {round_} could not be committed: {error}; {self.intact()}") from error
        self.committed = commit
        self.forget_before(self.rounds, round_)
        return commit

    def save_shared(self, round_: int, state: Mapping[str, Tensor]) -> None:
        self.save(self.shared_path(round_), state, f"the shared state of round {round_}")

    def load_shared(self, round_: int) -> dict[str, Tensor]:
        return self.load(self.shared_path(round_), f"the shared state of round {round_}")

    def save_client(self, name: str, round_: int, state: Mapping[str, Tensor]) -> None:
        """Writes beside the client's earlier state, which counts until the round is committed.

        Raises StoreError naming client and file on a full or read-only disk; nothing saved is touched.
        """
        self.save(self.client_folder(name) / f"{round_:04d}.safetensors", state, f"client {name!r}")

    def tidy(self, names: Iterable[str]) -> None:
        """Deletes what these clients kept before the state that is current now; call it after a commit."""
        for name in names:
            current = self.client_path(name)
            if current is not None:
                self.forget_before(current.parent, round_of(current) or 0)

    def load_client(self, name: str) -> dict[str, Tensor] | None:
        """What the client kept in the last committed round that it took part in; None if it never did.

        Raises StoreError naming client and file when the file is truncated or foreign.
        """
        path = self.client_path(name)
        return None if path is None else self.load(path, f"client {name!r}")

    def client_path(self, name: str) -> Path | None:
        """The file of the client's current state, or None."""
        folder = self.client_folder(name)
        if self.committed is None or not folder.is_dir():
            return None
        last = self.committed.round
        numbers = [n for n in map(round_of, folder.iterdir()) if n is not None and n <= last]
        return folder / f"{max(numbers):04d}.safetensors" if numbers else None

    def client_folder(self, name: str) -> Path:
        return self.clients / folder_name(name)

    def shared_path(self, round_: int) -> Path:
        return self.rounds / f"{round_:04d}.shared.safetensors"

    def save(self, path: Path, state: Mapping[str, Tensor], what: str) -> None:
        try:
            save_tensors(path, state)
        except OSError as error:
            raise StoreError(
                f"{what}: could not write {path}: {error.strerror or error}; {self.intact()}"
            ) from error

    def load(self, path: Path, what: str) -> dict[str, Tensor]:
        try:
            return load_tensors(path)
        except (OSError, ValueError) as error:
            raise StoreError(f"{what}: could not read {path}: {error}") from error

    def intact(self) -> str:
        if self.committed is None:
            return "nothing was committed yet"
        return f"the run is intact up to round {self.committed.round} and can be resumed"

    def forget_before(self, folder: Path, round_: int) -> None:
        for file in folder.iterdir():
            number = round_of(file)
            if number is not None and number < round_:
                file.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def round_of(file: Path) -> int | None:
    match = ROUND_FILE.match(file.name)
    return int(match.group(1)) if match else None


def folder_name(client: str) -> str:
    """A folder's name for any client name: itself if it is plain, else a plain part and a hash that keeps it
    unique.
    """
    # Lower case only: some file systems do not tell case apart.
    if re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", client) and not client.endswith("."):
        return client
    plain = re.sub(r"[^a-z0-9_-]+", "-", client.lower()).strip("-")[:48] or "client"
    return f"{plain}~{hashlib.sha256(client.encode()).hexdigest()[:12]}"
