"""The Local baseline: every client trains its own LoRA from the same start, nothing travels, nothing is
averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from flex.state import load_shared, shared_state
from flex.strategies.base import State, Strategy, Update


class Local(Strategy):
    name = "local"
    personal = False
    travels = False

    def home(self, model: Any) -> dict[str, Tensor]:
        return shared_state(model)

    def restore(self, model: Any, kept: State) -> None:
        load_shared(model, kept)

    def aggregate(self, shared: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        if not sum(1 for _ in updates):
            raise ValueError("no client sent an update")
        return dict(shared)
