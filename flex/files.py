"""Files that are complete or absent: a write that fails, at any moment, leaves the old file as it was."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, flush it to disk and rename it to ``path``.

    The block writes the temporary file, in the same folder. If the block or the flush raises, the temporary
    file is removed and ``path`` is untouched; a killed process may leave one, named ``.<name>.*.tmp``, that
    nothing reads. Missing parent folders are made.

    Raises:
        FileNotFoundError: the block wrote nothing.
        OSError: the disk is full or not writable; the message names ``path``.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            raise OSError(error.errno, f"{error.strerror or error} while writing", str(target)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself is only durable once the folder's entry is.
    flush_to_disk(target.parent)


def flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to a safetensors file, atomically.

    Args:
        path: the file; replaced as a whole or not at all.
        tensors: name -> tensor on any device, any strides; tensors that share memory are each
            written in full.
        metadata: short strings kept in the file's header.

    Raises:
        OSError: the disk is full or not writable; names ``path``, which still holds what it held before.
    """
    plain = {name: own_memory(t) for name, t in tensors.items()}
    with atomic_write(path) as temporary:
        # safetensors makes files that only their owner can read; ours get the permissions of any new file.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(plain, temporary, metadata=dict(metadata or {}))
            temporary.chmod(mode)
        except SafetensorError as error:
            # safetensors reports a failed write as its own error, with the system's number in the text.
            code = re.search(r"os error (\d+)", str(error))
            number = int(code.group(1)) if code else errno.EIO
            raise OSError(number, os.strerror(number)) from error


def own_memory(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or is not a safetensors file; names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "no such safetensors file", str(path))
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or is not a safetensors file: {error}") from error


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError naming the first tensor of ``what`` that holds NaN or infinity."""
    for name, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            bad = int((~torch.isfinite(t)).sum())
            raise ValueError(f"{what}: {name} {list(t.shape)} has {bad} values that are not finite")
