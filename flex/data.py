"""Rows of instruction data and the clients that hold them.

A row has an ``instruction`` and an ``output``, and may have a ``category`` and a ``client``. Rows come from
reasoning-gym (generated, with verifiers), from the user's JSON-lines files, or from a Hugging Face data set.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flex.config import Config, Partition
from flex.partition import deal, shares_for
from flex.rows import ClientData, Row
from flex.seeds import generator


class DataError(ValueError):
    """Data that cannot be used; the message names the file and line, or the client."""


def load_clients(config: Config) -> list[ClientData]:
    """Reads, partitions and splits the data of ``config``; clients in order of name.

    The partition's shares (which part of a category goes to which client) are drawn once and used for the
    training and for the test rows, so that a client is tested on what it is trained on.

    Raises:
        DataError: a malformed line (by file and line), a row without the field that is partitioned on, a
            client without training or held-out rows (by name).
    """
    data, seed = config.data, config.run.seed
    if data.source == "reasoning_gym":
        from flex.tasks import reasoning_gym_rows

        train, test = reasoning_gym_rows(data.skills, data.rows_per_skill, data.test_rows_per_skill, seed)
    elif data.source == "jsonl":
        train = read_jsonl(data.path, data.columns)
        test = read_jsonl(data.test_path, data.columns) if data.test_path else []
    else:
        train = read_huggingface(data.path, data.subset, data.split, data.columns)
        test = (
            read_huggingface(data.path, data.subset, data.test_split, data.columns) if data.test_split else []
        )
    check_partitioned([*train, *test], config.partition)
    shares = shares_for(train, config.partition, seed)
    split = bool(test)
    held = dict(deal(test, shares, config.partition, seed, "test")) if split else {}
    clients = []
    for name, rows in deal(train, shares, config.partition, seed, "train"):
        mine = held.get(name, [])
        if not split:
            rows, mine = split_off(rows, data.held_out, name, seed)
        if data.max_rows and len(rows) > data.max_rows:
            kept = generator(seed, "max_rows", name).permutation(len(rows))[: data.max_rows]
            rows = [rows[i] for i in sorted(kept)]
        for kind, some in (("training", rows), ("held-out", mine)):
            if not some:
                raise DataError(
                    f"client {name!r} has no {kind} rows of {len(train)} training and {len(test)} test rows; "
                    "use fewer clients, a larger partition.alpha, another run.seed, or data.held_out in "
                    "place of a test file"
                )
        clients.append(ClientData(name, rows, mine))
    return sorted(clients, key=lambda client: client.name)


def check_partitioned(rows: Iterable[Row], partition: Partition) -> None:
    """Raise DataError on a row without the field that the partition goes by."""
    if partition.scheme == "iid":
        return
    by = "field" if partition.scheme == "field" else "scheme"
    field = partition.field if by == "field" else "category"
    for row in rows:
        if not getattr(row, field):
            needs = "" if by == "field" else f" goes by {field!r}"
            raise DataError(
                f"partition.{by}={getattr(partition, by)!r}{needs}, but the row {row.instruction[:60]!r} has "
                "none; add it to the data, map it with data.columns, or choose another partition.scheme"
            )


def split_off(rows: list[Row], fraction: float, name: str, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows: max(1, round(fraction * n)) seeded ones are held out, the order is kept."""
    count = min(max(1, round(fraction * len(rows))), max(len(rows) - 1, 0))
    held = set(generator(seed, "held_out", name).permutation(len(rows))[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def read_jsonl(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of a JSON-lines file, ``.gz`` or plain; blank lines are passed over.

    Args:
        columns: our name -> the file's name, for the names that differ.

    Raises:
        DataError: the file cannot be read, holds no row, or a line is malformed (named by file and line).
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    rows = []
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(
                            f"{path}:{number}: not JSON: {error.msg} at column {error.colno}"
                        ) from error
                    rows.append(row_of(record, columns or {}, f"{path}:{number}"))
    except DataError:
        raise
    except (OSError, EOFError, UnicodeDecodeError) as error:
        where = f"{path}:{number + 1}" if number else str(path)
        raise DataError(f"{where}: cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def read_huggingface(path: str, subset: str, split: str, columns: Mapping[str, str]) -> list[Row]:
    """Rows of a Hugging Face data set (a name on the hub, or a local folder), by the ``datasets`` library.

    Raises:
        DataError: ``datasets`` is missing, the data set cannot be loaded, or a row is malformed (named by its
            number).
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source='huggingface' needs the datasets library: pip install datasets"
        ) from error
    try:
        table = datasets.load_dataset(path, subset or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set {path!r} (subset {subset!r}, split {split!r}): {error}") from error
    rows = [row_of(record, columns, f"{path}[{split}]:{i}") for i, record in enumerate(table)]
    if not rows:
        raise DataError(f"data set {path!r}, split {split!r}: holds no rows")
    return rows


def row_of(record: Any, columns: Mapping[str, str], where: str) -> Row:
    if not isinstance(record, Mapping):
        raise DataError(
            f"{where}: a {type(record).__name__}; expected an object with 'instruction' and 'output'"
        )
    values: dict[str, Any] = {}
    for name, needed in (("instruction", True), ("output", True), ("category", False), ("client", False)):
        column = columns.get(name, name)
        value = record.get(column)
        if value is None and not needed and name not in columns:
            continue
        if name in ("category", "client") and isinstance(value, int):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            given = "is missing" if value is None else f"is {value!r}"
            found = f"; the row has {', '.join(map(str, record))}" if value is None else ""
            raise DataError(f"{where}: {column!r} {given}; expected a string that is not empty{found}")
        values[name] = value
    return Row(**values)


def fingerprint(clients: Iterable[ClientData]) -> dict[str, Any]:
    """Sizes and a SHA-256 of every client's rows, kept with a run so that it resumes on the same data or not
    at all.
    """
    digest = hashlib.sha256()
    sizes = {}
    for client in clients:
        sizes[client.name] = [len(client.train), len(client.test)]
        for rows in (client.train, client.test):
            for row in rows:
                digest.update(json.dumps([client.name, row.instruction, row.output]).encode())
    return {"sizes": sizes, "sha256": digest.hexdigest()}
