"""The run's record: JSON lines, one event a line, on disk as it happens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flex.store import StoreError


class History:
    """Appends events to ``path``.

    Args:
        path: the file; made if it is not there.
        keep: bytes that belong to finished rounds; the rest, written by a round that did not finish, is cut
            off.
        intact: says what of the run stands, for the message of a write that failed.

    Raises:
        ValueError: the file is shorter than ``keep``: it was changed since.
        StoreError: it cannot be written, here or later; names the file.
    """

    def __init__(self, path: str | os.PathLike, keep: int = 0, intact: Callable[[], str] = lambda: ""):
        self.path, self.intact = Path(path), intact
        with self.named():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = self.path.stat().st_size if self.path.exists() else 0
        if size < keep:
            raise ValueError(
                f"{path} has {size} bytes, but {keep} were written by finished rounds; it was changed since"
            )
        # Unbuffered, so that an event is with the operating system when append returns.
        with self.named():
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self.file.truncate(keep)

    @contextmanager
    def named(self) -> Iterator[None]:
        """An OSError of the block becomes a StoreError that names the file and what stands."""
        try:
            yield
        except OSError as error:
            stands = self.intact()
            raise StoreError(
                f"could not write {self.path}: {error.strerror or error}{f'; {stands}' if stands else ''}"
            ) from error

    def append(self, event: str, **values: Any) -> dict[str, Any]:
        """Writes one line; returns what it holds. A write that fails may leave a part of the line, which a
        resumed run cuts off.
        """
        record = {"event": event, **values}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self.named():
            while line:
                line = line[self.file.write(line) :]
        return record

    def sync(self) -> int:
        """Flushes to the disk; returns the length in bytes."""
        with self.named():
            os.fsync(self.file.fileno())
            return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_history(self.path)


def read_history(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The events of a history file (or of a run's folder), one at a time; a last line cut short by a kill is
    passed over.

    Raises:
        FileNotFoundError, ValueError: there is no such file; a line in its middle is not JSON (named by
            number).
    """
    file = Path(path) / "rounds" / "history.jsonl" if Path(path).is_dir() else Path(path)
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{file}:{number}: not JSON: {error.msg}") from error


def select_events(events: Any, event: str, **wanted: Any) -> list[Mapping[str, Any]]:
    """The events of one kind whose keys have the wanted values."""
    return [e for e in events if e["event"] == event and all(e.get(k) == v for k, v in wanted.items())]
