"""Which pretrained expert a client starts from: the one that alone best reproduces each layer on its data.

FLEx (arXiv 2506.00965): c* = argmin_c sum_b || MoE(X_b) - E_c(X_b) ||_F over calibration batches X_b, the
retained expert with weight 1. A shared expert stays in the pruned layer as well, so it cancels: MoE here is
the routed sum.

Letters: T tokens of a batch (padding left out), H hidden, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flex.block import GraftedBlock, gates_shut, moe_blocks
from flex.models import Adapter
from flex.watch import body_of, watch_inputs
from flex_kernels import flex_moe
from flex_kernels.reference import at_least_float32, swiglu_ffn

Batch = Tensor | Mapping[str, Tensor]
ACCEPTED = ("input_ids", "attention_mask", "position_ids")
IGNORED = ("labels", "token_type_ids")
# Tokens whose expert output is held at a time.
CHUNK = 2048


@dataclass(frozen=True)
class LayerSelection:
    """One layer's outcome.

    Attributes:
        layer: the block's name in the model.
        expert: the chosen one, of lowest error; the lowest index of equals.
        errors: per expert c, sum_b || MoE(X_b) - E_c(X_b) ||_F.
        norm: sum_b || MoE(X_b) ||_F, the error of a layer that returns zero.
        tokens: how many were seen.
    """

    layer: str
    expert: int
    errors: tuple[float, ...]
    norm: float
    tokens: int

    @property
    def relative(self) -> tuple[float, ...]:
        """errors / norm."""
        return tuple(e / self.norm if self.norm else float("inf") for e in self.errors)


@dataclass(frozen=True)
class Selection:
    """The outcome for a model: one :class:`LayerSelection` a layer, in order."""

    layers: tuple[LayerSelection, ...]

    @property
    def experts(self) -> list[int]:
        """The chosen expert of each layer."""
        return [layer.expert for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            layer.layer: {
                "expert": layer.expert,
                "errors": list(layer.errors),
                "norm": layer.norm,
                "tokens": layer.tokens,
            }
            for layer in self.layers
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows of strings, the header first: layer, chosen expert, its relative error, the others' range."""
        rows: list[tuple[str, ...]] = [("layer", "expert", "relative error", "others")]
        for layer in self.layers:
            rest = sorted(r for c, r in enumerate(layer.relative) if c != layer.expert)
            others = f"{rest[0]:.3f} to {rest[-1]:.3f}" if rest else ""
            rows.append((layer.layer, str(layer.expert), f"{layer.relative[layer.expert]:.3f}", others))
        return rows


def watch_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    blocks: Mapping[str, tuple[nn.Module, Adapter]],
    see: Callable[[int, str, Tensor], None],
) -> None:
    """Run the frozen model over ``batches``; ``see`` gets a batch's number, a block's name and its x [T, H].

    Raises:
        TypeError, ValueError: no batch at all, or one of another form (named by its number).
    """
    modules = {name: block for name, (block, _) in blocks.items()}
    body = body_of(model)
    was_training = [module for module in model.modules() if module.training]
    number = -1
    try:
        model.eval()
        with torch.no_grad(), gates_shut(model):
            for number, batch in enumerate(checked_batches(batches)):
                inputs = prepare(batch, number, body)
                with watch_inputs(model, modules, partial(see, number)):
                    body(**inputs, use_cache=False)
    finally:
        for module in was_training:
            module.training = True
    if number < 0:
        raise ValueError("calibration holds no batch: at least one batch of token ids is needed")


def select_experts(model: nn.Module, batches: Iterable[Batch], backend: str | None = None) -> Selection:
    """Run the pretrained model over ``batches`` once and choose an expert for every MoE layer.

    Works on a grafted model (its gates are shut meanwhile) and on one that is not; LoRA adapters stay active.
    Each batch is forgotten after its errors were added: memory does not depend on how many there are. On a
    quantised model the choice is made with the quantised experts, decoded one at a time.

    Args:
        batches: token ids, [B, S] or [S] integers, or dicts with ``input_ids`` and optionally
            ``attention_mask`` (2-D, zero at padding, which is left out) and ``position_ids``; ``labels`` and
            ``token_type_ids`` are ignored.
        backend: of the fused layer; None takes the grafted block's own, "auto" without one.

    Raises:
        TypeError, ValueError: no tokens at all, a batch of another form (named by its number), ids outside
            the vocabulary.
        NotFiniteError: a ValueError; activations are not finite (the layer is named).
    """
    blocks = moe_blocks(model)
    sums = {name: LayerSums(name, block, adapter, backend) for name, (block, adapter) in blocks.items()}

    def see(number: int, name: str, x_TH: Tensor) -> None:
        sums[name].batch = number
        sums[name].add(x_TH)

    watch_batches(model, batches, blocks, see)
    return Selection(tuple(layer.result() for layer in sums.values()))


class NotFiniteError(ValueError):
    """A layer's input or an expert's output is NaN or infinite on the calibration data."""


class LayerSums:
    """Running sums of one layer; what it holds has the size of E numbers."""

    def __init__(self, name: str, block: nn.Module, adapter: Adapter, backend: str | None):
        self.name, self.block, self.adapter = name, block, adapter
        own = block.backend if isinstance(block, GraftedBlock) else "auto"
        self.backend = backend or own
        self.errors_E: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0
        self.tokens = 0
        self.batch = 0

    def add(self, x_TH: Tensor) -> None:
        """The tokens of batch number ``self.batch`` that entered the layer."""
        if not torch.isfinite(x_TH).all():
            raise NotFiniteError(
                f"calibration batch {self.batch}: the input of layer {self.name} is not finite; "
                "look for NaN in the model's weights or for overflow in its dtype"
            )
        experts = self.adapter.experts(self.block)
        squares_E = torch.zeros(experts.count, dtype=torch.float64, device=x_TH.device)
        norm_square = torch.zeros((), dtype=torch.float64, device=x_TH.device)
        for x_tH in x_TH.split(CHUNK):
            y_tH = flex_moe(x_tH, self.adapter.route(self.block, x_tH), experts, backend=self.backend)
            y_tH = at_least_float32(y_tH)
            norm_square += y_tH.square().sum(dtype=torch.float64)
            for c in range(len(squares_E)):
                # One expert is decoded at a time where they are quantised.
                miss_tH = y_tH - at_least_float32(swiglu_ffn(x_tH, *experts.expert(c, x_tH.dtype)))
                squares_E[c] += miss_tH.square_().sum(dtype=torch.float64)
        if not torch.isfinite(squares_E).all():
            worst = int(torch.nonzero(~torch.isfinite(squares_E))[0])
            raise NotFiniteError(
                f"calibration batch {self.batch}: the output of expert {worst} of layer {self.name} "
                "is not finite"
            )
        self.errors_E = self.errors_E + squares_E.sqrt()
        self.norm = self.norm + norm_square.sqrt()
        self.tokens += x_TH.shape[0]

    def result(self) -> LayerSelection:
        if not self.tokens:
            raise ValueError(
                f"calibration holds no token that reached layer {self.name}: every position is padding"
            )
        errors = torch.as_tensor(self.errors_E).tolist()
        return LayerSelection(
            self.name, errors.index(min(errors)), tuple(errors), float(self.norm), self.tokens
        )


def checked_batches(batches: Iterable[Batch]) -> Iterable[Batch]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"calibration must be an iterable of batches (tensors or dicts), "
            f"got one {type(batches).__name__}: put it in a list"
        )
    return batches


def prepare(batch: Batch, number: int, body: nn.Module) -> dict[str, Tensor]:
    """A batch as keyword arguments of the model, checked and on its device."""
    embeddings: Any = body.get_input_embeddings()  # type: ignore[operator]
    vocabulary, device = embeddings.weight.shape[0], embeddings.weight.device
    return {key: t.to(device) for key, t in checked_batch(batch, number, vocabulary).items()}


def checked_batch(batch: Batch, number: int, vocabulary: int) -> dict[str, Tensor]:
    """A batch as keyword arguments of a model of so many token ids, each [B, S].

    Raises:
        TypeError, ValueError: it is of another form; named by its number.
    """
    where = f"calibration batch {number}"
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"{where} must be a tensor of token ids or a dict of tensors, got {type(batch).__name__}"
        )
    inputs = {str(k): v for k, v in inputs.items() if k not in IGNORED}
    strange = sorted(inputs.keys() - set(ACCEPTED))
    if "input_ids" not in inputs or strange:
        has = ", ".join(inputs) or "nothing"
        raise ValueError(f"{where} must have input_ids, and of {', '.join(ACCEPTED[1:])} any; it has {has}")
    for key, t in inputs.items():
        if (
            not isinstance(t, Tensor)
            or t.ndim not in (1, 2)
            or t.dtype.is_floating_point
            or t.dtype.is_complex
        ):
            got = f"{list(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{where}: {key} must be an integer tensor [B, S] or [S], got {got}")
        if t.shape != inputs["input_ids"].shape:
            raise ValueError(
                f"{where}: {key} {list(t.shape)} and input_ids {list(inputs['input_ids'].shape)} differ"
            )
    ids = inputs["input_ids"]
    if not ids.numel():
        raise ValueError(f"{where} is empty: input_ids {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"{where}: token ids run from {int(ids.min())} to {int(ids.max())}, "
            f"the vocabulary from 0 to {vocabulary - 1}"
        )
    return {k: t if t.ndim == 2 else t[None] for k, t in inputs.items()}
