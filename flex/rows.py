"""One example of instruction data, and what one client holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One example. ``check`` is what a verifier needs to score an answer (see :mod:`flex.tasks`), on held-out
    rows.
    """

    instruction: str
    output: str
    category: str = ""
    client: str = ""
    check: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ClientData:
    """What one client holds: rows to train on and rows kept back to measure with."""

    name: str
    train: list[Row]
    test: list[Row]
