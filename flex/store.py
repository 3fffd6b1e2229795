"""A run's folder: what is in it, and how a round becomes permanent in one step.

    run/config.toml                          the settings
    run/data.json                            sizes and SHA-256 of every client's rows
    run/latest                               which round is finished, and the round of every client's
                                             state: the one file whose renaming commits a round
    run/rounds/history.jsonl                 one event a line
    run/rounds/0003.shared.safetensors       what the server holds after round 3
    run/clients/<name>/0003.safetensors      what stayed with the client when it last took part, in round 3

Files of round r+1 are written beside those of round r under new names. Renaming ``latest`` makes them
current; until then they count for nothing and a resumed run deletes them. So a run may die at any moment,
also between two clients. Other files in the folder are no concern of a run: it deletes what has a name of its
own making.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flex.files import atomic_write, load_tensors, save_tensors

ROUND_FILE = re.compile(r"^(\d{4,})\.(?:shared\.)?safetensors$")
# What flex.files.atomic_write calls its temporary files, for the names of a run.
TEMPORARY = re.compile(
    r"^\.(?:config\.toml|data\.json|latest|\d{4,}\.(?:shared\.)?safetensors)\.\d+\.[0-9a-f]+\.tmp$"
)


class StoreError(RuntimeError):
    """A file of the run cannot be written or read; names client and file. What was committed is intact."""


@dataclass(frozen=True)
class Commit:
    """``round`` is finished, ``evaluated`` if its evaluation is too; the history counts up to a byte.

    ``clients`` has every client that has kept a state, with the round of the state that counts.
    """

    round: int
    evaluated: bool
    history_bytes: int
    clients: Mapping[str, int] = field(default_factory=dict)


class Store:
    """The files of one run. Holds no tensors: memory does not grow with the number of clients."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.rounds = self.folder / "rounds"
        self.clients = self.folder / "clients"
        self.history = self.rounds / "history.jsonl"
        self.committed: Commit | None = None
        # Clients whose state was written since the last commit, with its round.
        self.saved: dict[str, int] = {}
        self.lock: Any = None

    def exists(self) -> bool:
        return (self.folder / "config.toml").exists()

    def create(self, config_toml: str, data: Mapping[str, Any]) -> None:
        """Makes a run in a folder that may hold other files: they stay as they are.

        Raises StoreError: see :meth:`check_free`; or the folder cannot be written.
        """
        self.check_free()
        try:
            self.rounds.mkdir(parents=True, exist_ok=True)
            self.clients.mkdir(exist_ok=True)
            self.acquire()
            self.remove_temporary(self.folder)
            self.write_text("data.json", json.dumps(data, indent=1, ensure_ascii=False))
            # Last: a folder with config.toml is a run that can be resumed.
            self.write_text("config.toml", config_toml)
        except OSError as error:
            raise StoreError(f"{self.folder}: the run's folder cannot be written: {error}") from error

    def check_free(self) -> None:
        """Raises StoreError: the folder holds a run, or something else under a name that a run writes. What a
        run that died before it had its settings left behind is no obstacle.
        """
        if self.exists():
            raise StoreError(f"{self.folder} already holds a run; resume it, or choose another run.folder")
        for name in ("data.json", "latest", "lock", "rounds", "clients"):
            path = self.folder / name
            if path.exists() and not left_behind(path):
                raise StoreError(
                    f"{self.folder} holds {found(path).relative_to(self.folder)}, a name that a run writes, "
                    "but no config.toml of a run; move it away, or choose another run.folder"
                )

    def open(self) -> Commit | None:
        """Reads what is committed and removes what is not. None: no round, not even 0, was committed.

        Raises:
            StoreError: there is no run here, another process is running it, ``latest`` is not readable, or a
                client's state that it counts is not there (client and file are named).
        """
        if not self.exists():
            raise StoreError(f"{self.folder} holds no run: there is no config.toml in it")
        self.acquire()
        try:
            self.committed = self.read_latest()
            if self.committed is None:
                self.check_never_committed()
            else:
                for name in self.committed.clients:
                    self.check_kept(name)
            self.sweep(-1 if self.committed is None else self.committed.round)
        except OSError as error:
            self.release()
            raise StoreError(f"{self.folder}: half-written files cannot be removed: {error}") from error
        except StoreError:
            self.release()
            raise
        return self.committed

    def check_never_committed(self) -> None:
        """Without ``latest`` every round is unfinished: files of later ones must not be deleted for that."""
        for folder in self.state_folders():
            for file in folder.iterdir():
                if round_of(file):
                    raise StoreError(
                        f"{self.folder / 'latest'} is missing, but there is {file}; latest says which round "
                        "is finished: put it back, or start a new run"
                    )

    def check_kept(self, name: str) -> None:
        """Raises StoreError: what the client kept is recorded as committed, and its file is not there."""
        path = self.client_path(name)
        if self.committed is not None and path is not None and not path.is_file():
            raise StoreError(
                f"client {name!r}: {path} is missing; it holds what stayed with the client in round "
                f"{self.committed.clients[name]}: put it back, or start a new run"
            )

    def sweep(self, last: int) -> None:
        """Deletes half-written files and those of rounds after ``last``; of our own names alone."""
        self.remove_temporary(self.folder)
        for folder in self.state_folders():
            self.remove_temporary(folder)
            for file in folder.iterdir():
                number = round_of(file)
                if number is not None and number > last:
                    file.unlink()

    def state_folders(self) -> list[Path]:
        """``rounds`` and every client's folder, as far as they are there."""
        own = self.clients.iterdir() if self.clients.is_dir() else ()
        return [folder for folder in (self.rounds, *own) if folder.is_dir()]

    def remove_temporary(self, folder: Path) -> None:
        for file in folder.iterdir():
            if TEMPORARY.match(file.name):
                file.unlink()

    def read_latest(self) -> Commit | None:
        path = self.folder / "latest"
        if not path.exists():
            return None
        try:
            return parse_commit(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); it says which round is finished") from error

    def acquire(self) -> None:
        """One process a run: the lock goes when the process does, however it ends."""
        try:
            import fcntl
        except ImportError:
            return
        self.lock = open(self.folder / "lock", "a")  # noqa: SIM115
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
        earlier = {} if self.committed is None else self.committed.clients
        commit = Commit(round_, evaluated, history_bytes, {**earlier, **self.saved})
        try:
            self.write_text("latest", json.dumps(asdict(commit)))
        except OSError as error:
            raise StoreError(f"round {round_} could not be committed: {error}; {self.intact()}") from error
        self.committed, self.saved = commit, {}
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
        self.saved[name] = round_

    def tidy(self, names: Iterable[str]) -> None:
        """Deletes what these clients kept before the state that is current now; call it after a commit."""
        for name in names:
            current = self.client_path(name)
            if current is not None:
                self.forget_before(current.parent, round_of(current) or 0)

    def load_client(self, name: str) -> dict[str, Tensor] | None:
        """What the client kept in the last committed round that it took part in; None if it never did.

        Raises StoreError naming client and file when the file is truncated, foreign or gone.
        """
        self.check_kept(name)
        path = self.client_path(name)
        return None if path is None else self.load(path, f"client {name!r}")

    def client_path(self, name: str) -> Path | None:
        """The file of the client's current state, there or not; None if it never kept any."""
        if self.committed is None or name not in self.committed.clients:
            return None
        return self.client_folder(name) / f"{self.committed.clients[name]:04d}.safetensors"

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
        again = f"flex-moe train --resume {shlex.quote(str(self.folder))}"
        return f"the run is intact up to round {self.committed.round} and can be resumed ({again})"

    def forget_before(self, folder: Path, round_: int) -> None:
        for file in folder.iterdir():
            number = round_of(file)
            if number is not None and number < round_:
                file.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def parse_commit(record: Any) -> Commit:
    """The content of ``latest``. Raises ValueError naming the key of another type, or all that are there."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, expected an object")
    known = {"round": "a number", "evaluated": "true or false", "history_bytes": "a number"}
    known["clients"] = "an object of numbers"
    if record.keys() != known.keys():
        raise ValueError(f"it has {', '.join(record) or 'nothing'}; expected {', '.join(known)}")
    clients = record["clients"]
    fits = {
        "round": is_count(record["round"]),
        "evaluated": isinstance(record["evaluated"], bool),
        "history_bytes": is_count(record["history_bytes"]),
        "clients": isinstance(clients, dict) and all(map(is_count, clients.values())),
    }
    for key, fit in fits.items():
        if not fit:
            raise ValueError(f"{key} is {record[key]!r}, expected {known[key]}")
    return Commit(**record)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def left_behind(path: Path) -> bool:
    """Whether a run that died before it had its settings may have left this: an empty folder or lock, or the
    sizes and hash of its rows.
    """
    if path.is_dir():
        return not any(path.iterdir())
    if path.name == "data.json":
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(stored, dict) and stored.keys() == {"sizes", "sha256"}
    return path.name == "lock" and not path.stat().st_size


def found(path: Path) -> Path:
    """``path``, or the first thing in it."""
    return min(path.iterdir(), default=path) if path.is_dir() else path


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
