"""Federated algorithms, one file each: ``flex``, ``fedavg`` (FedIT), ``local``."""

from __future__ import annotations

from flex.strategies.base import Strategy, Update, weighted_mean
from flex.strategies.fedavg import FedAvg
from flex.strategies.flex import Flex
from flex.strategies.local import Local

STRATEGIES: dict[str, type[Strategy]] = {s.name: s for s in (Flex, FedAvg, Local)}

__all__ = ["STRATEGIES", "FedAvg", "Flex", "Local", "Strategy", "Update", "weighted_mean"]
