"""FedIT (Zhang et al., arXiv 2305.05644): every client trains LoRA, the server averages it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flex.strategies.base import State, Strategy


class FedAvg(Strategy):
    name = "fedavg"
    personal = False

    def home(self, model: Any) -> dict[str, Tensor]:
        return {}

    def restore(self, model: Any, kept: State) -> None:
        if kept:
            raise ValueError(f"fedavg keeps nothing on a client, but {len(kept)} tensors were stored")
