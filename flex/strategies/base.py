"""What a federated algorithm decides: what is trained, what stays, what travels, how it is combined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one client sends after its local steps: its travelling tensors and its weight in the average."""

    client: str
    weight: float
    state: State


class Strategy:
    """Base of the strategies; stateless, so that a resumed server needs no more than the shared state.

    Attributes:
        name: as in ``federation.strategy``.
        personal: every MoE layer gets a personal expert and a gate.
        travels: the shared part (LoRA) is sent down before and up after a client's local steps.
    """

    name: ClassVar[str]
    personal: ClassVar[bool]
    travels: ClassVar[bool] = True

    def home(self, model: Any) -> dict[str, Tensor]:
        """Copies, on the CPU, of what the client keeps."""
        raise NotImplementedError

    def restore(self, model: Any, kept: State) -> None:
        """Puts what :meth:`home` gave back into the model. Raises ValueError if it does not fit."""
        raise NotImplementedError

    def aggregate(self, shared: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The next shared state. ``updates`` is consumed one at a time, while clients train: keep none of
        them.

        Raises ValueError when no update came.
        """
        return weighted_mean(updates)


def weighted_mean(updates: Iterable[Update]) -> dict[str, Tensor]:
    """sum_c w_c theta_c / sum_c w_c, tensor by tensor (FedAvg, McMahan et al., arXiv 1602.05629, algorithm
    1).

    Summed in float64, in the order of ``updates``, and given back in the updates' dtype; memory is that of
    one sum.

    Raises:
        ValueError: no update, a weight that is not above 0, names or shapes that differ between clients.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    weights = 0.0
    for update in updates:
        if not 0 < update.weight < float("inf"):
            raise ValueError(f"client {update.client!r}: weight {update.weight} is not above 0 and finite")
        if not weights:
            dtypes = {name: t.dtype for name, t in update.state.items()}
            total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in update.state.items()}
        if update.state.keys() != total.keys():
            differing = sorted(update.state.keys() ^ total.keys())
            raise ValueError(
                f"client {update.client!r} sent other tensors than those before it: "
                f"{', '.join(differing[:3])}"
            )
        for name, t in update.state.items():
            if t.shape != total[name].shape:
                raise ValueError(
                    f"client {update.client!r} sent {name} {list(t.shape)}; "
                    f"the clients before it {list(total[name].shape)}"
                )
            total[name].add_(t.double(), alpha=update.weight)
        weights += update.weight
    if not weights:
        raise ValueError("no client sent an update")
    return {name: (t / weights).to(dtypes[name]) for name, t in total.items()}


def size_in_bytes(state: State) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())
