"""Which columns of the routed experts' weights count most: how large what they are multiplied with is.

Rounding to 4 bits can spare some columns at the cost of others (:func:`flex_kernels.quantize.quantize`). In a
trained model a few inputs are many times as large as the rest, and so is what an error in their columns does.

Letters: T tokens of a batch (padding left out), n of them that chose an expert, H hidden, E experts, I width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex.block import moe_blocks
from flex.models import Adapter
from flex.select import Batch, watch_batches
from flex_kernels import Experts, Router
from flex_kernels.reference import route

Importance = Mapping[str, tuple[Tensor, Tensor]]


def column_importance(model: nn.Module, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run ``model`` over ``batches`` and take the mean squares of what each routed expert's columns see.

    For :func:`flex.graft` with ``experts="nf4"``. A few thousand tokens of any text like that which the model
    will read are enough. What is held is E (H + I) numbers a layer, whatever the number of batches.

    Args:
        batches: token ids as for :func:`flex.select_experts`.

    Returns:
        layer name -> (mean squares of x [E, H], for gate_up; of silu(gate x) * (up x) [E, I], for down), over
        the tokens that chose the expert; zeros where none did. float32, on the CPU.

    Raises:
        TypeError, ValueError: as :func:`flex.select_experts` of the batches.
        ValueError: what a layer's experts see is not finite; names the layer.
    """
    blocks = moe_blocks(model)
    sums = {name: ColumnSums(block, adapter) for name, (block, adapter) in blocks.items()}
    watch_batches(model, batches, blocks, lambda number, name, x_TH: sums[name].add(x_TH))
    for name, layer in sums.items():
        if not (layer.x_EH.isfinite().all() and layer.a_EI.isfinite().all()):
            raise ValueError(f"the inputs of layer {name} or of its experts' down projections are not finite")
    return {name: layer.means() for name, layer in sums.items()}


class ColumnSums:
    """Running sums of squares of one layer."""

    def __init__(self, block: nn.Module, adapter: Adapter):
        self.block, self.adapter = block, adapter
        experts = adapter.experts(block)
        (E, H, I), device = experts.down.shape, experts.down.device
        self.x_EH = torch.zeros(E, H, dtype=torch.float64, device=device)
        self.a_EI = torch.zeros(E, I, dtype=torch.float64, device=device)
        self.tokens_E = torch.zeros(E, dtype=torch.float64, device=device)

    def add(self, x_TH: Tensor) -> None:
        experts, router = self.adapter.experts(self.block), self.adapter.route(self.block, x_TH)
        ids_TK = route(x_TH, router)[0] if isinstance(router, Router) else router.ids
        for e in range(experts.count):
            x_nH = x_TH[(ids_TK == e).any(-1)]
            gate_nI, up_nI = F.linear(x_nH, experts.expert(e, x_TH.dtype)[0]).chunk(2, dim=-1)
            self.x_EH[e] += x_nH.double().square().sum(0)
            self.a_EI[e] += (F.silu(gate_nI) * up_nI).double().square().sum(0)
            self.tokens_E[e] += len(x_nH)

    def means(self) -> tuple[Tensor, Tensor]:
        tokens_E1 = self.tokens_E.clamp_min(1.0)[:, None]
        return (self.x_EH / tokens_E1).float().cpu(), (self.a_EI / tokens_E1).float().cpu()


def check_importance(importance: Any, kind: str | None, layers: Mapping[str, Experts]) -> None:
    """Raise unless ``importance`` is None, or one for experts that are to become "nf4", layer by layer.

    Raises:
        TypeError: it is no mapping of pairs of float tensors.
        ValueError: it has no use, or names or shapes are others than those of ``layers``.
    """
    if importance is None:
        return
    if kind != "nf4":
        raise ValueError(f"importance is for experts='nf4', got experts={kind!r}: leave it out")
    if not isinstance(importance, Mapping):
        raise TypeError(
            f"importance must be what flex.column_importance gives, got {type(importance).__name__}"
        )
    if set(importance) != set(layers):
        raise ValueError(f"importance is of the layers {list(importance)}, the model has {list(layers)}")
    for name, experts in layers.items():
        E, H, I = experts.down.shape
        got = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in importance[name]]
        if got != [[E, H], [E, I]]:
            raise ValueError(f"importance of layer {name} must be [[{E}, {H}], [{E}, {I}]], got {got}")
        if any(
            not t.is_floating_point() or not t.isfinite().all() or (t < 0).any() for t in importance[name]
        ):
            raise ValueError(f"importance of layer {name} must hold finite floats of at least 0")
