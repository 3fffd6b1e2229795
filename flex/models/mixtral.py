"""Mixtral: softmax over all experts, the chosen weights always normalised."""

from __future__ import annotations

from typing import Any

from torch import nn

from flex.models.base import Adapter, Unsupported


class MixtralAdapter(Adapter):
    def check(self, block: nn.Module) -> None:
        noise: Any = getattr(block, "jitter_noise", 0.0)
        if noise:
            raise Unsupported(
                f"router_jitter_noise={noise} perturbs the router's input in training: "
                "set it to 0 in the model's config"
            )
        super().check(block)


ADAPTER = MixtralAdapter("mixtral", ("MixtralSparseMoeBlock",), normalize=True)
