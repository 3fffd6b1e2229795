"""Random numbers that depend on what they are for, never on what was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for example ``derive_seed(0, "training", round, client)``."""
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, *purpose))


@contextmanager
def torch_seed(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seeds torch's global generators inside the block and gives the caller's state back after it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield
