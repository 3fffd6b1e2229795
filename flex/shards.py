"""The safetensors files of a Hugging Face checkpoint, found, checked and read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def shard_files(path: str, revision: str | None = None) -> dict[Path, frozenset[str]]:
    """The files of a checkpoint -> the tensors that its index promises there (none without an index).

    Args:
        path: a folder, or the id of a model on the Hugging Face hub, which is downloaded.

    Raises:
        FileNotFoundError: a shard that the index names is not there.
        ValueError: no safetensors at all, or an index that cannot be read; names it.
    """
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    index = find(INDEX)
    if index is None:
        one = find(ONE_FILE)
        if one is None:
            raise ValueError(
                f"{path} has neither {ONE_FILE} nor {INDEX}: only safetensors are read piece by piece"
            )
        return {Path(one): frozenset()}
    try:
        homes: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(homes.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not the index of a checkpoint: {error!r}") from error
    files = {}
    for name in names:
        found = find(name)
        if found is None:
            raise FileNotFoundError(f"{path} lacks the shard {name}, which {INDEX} names")
        files[Path(found)] = frozenset(tensor for tensor, home in homes.items() if home == name)
    return files


@contextmanager
def open_shards(files: dict[Path, frozenset[str]]) -> Iterator[dict[str, Any]]:
    """Tensor name -> a safetensors slice that is read when it is indexed, into memory of its own.

    Mapped files would count as the process's memory page by page until the last shard is closed.

    Raises:
        ValueError: a file that is truncated, no safetensors, or not the one that the index describes; names
            it.
    """
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file, promised in files.items():
            try:
                shard = stack.enter_context(safe_open(file, framework="pt", device="cpu", backend="pread"))
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or is not a safetensors file: {error}") from error
            held = set(shard.keys())
            absent = sorted(promised - held)
            if absent:
                raise ValueError(
                    f"{file} is not the shard that {INDEX} describes: it lacks {first_few(absent)}"
                )
            tensors |= {name: shard.get_slice(name) for name in held}
        yield tensors


def first_few(names: Sequence[str]) -> str:
    """For a message: the first three names, and how many there are."""
    return ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if len(names) > 3 else "")
