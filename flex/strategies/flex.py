"""FLEx (arXiv 2506.00965): personal experts and gates stay home, LoRA on attention is averaged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flex.state import load_personal, personal_state
from flex.strategies.base import State, Strategy


class Flex(Strategy):
    name = "flex"
    personal = True

    def home(self, model: Any) -> dict[str, Tensor]:
        return personal_state(model)

    def restore(self, model: Any, kept: State) -> None:
        load_personal(model, kept)
