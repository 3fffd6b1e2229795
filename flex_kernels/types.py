"""The arguments of the layer: small frozen records of tensors and settings.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, Ip personal width, Is shared width.
Weights use Hugging Face's layout: ``gate_up`` stacks the gate rows on the up rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flex_kernels.quantize import Kind, Quantized, quantize

Score = Literal["softmax", "sigmoid"]
Mix = Literal["add", "convex"]
Save = Literal["auto", "recompute", "preact"]


@dataclass(frozen=True)
class Router:
    """The pretrained router: scores every expert, keeps the ``top_k`` best.

    Args:
        weight: [E, H], any float dtype; the product with x is accumulated and kept in float32.
        top_k: experts per token, 1 <= top_k <= E. Ties go to the lowest index.
        normalize: divide the chosen scores by their sum.
        score: ``"softmax"`` over all experts, or ``"sigmoid"`` of each logit (DeepSeek-V3).
        scale: factor applied to the weights last (DeepSeek's ``routed_scaling_factor``).
        bias: [E], added to the scores for the choice only, never to the weights
            (DeepSeek-V3's ``e_score_correction_bias``). It gets no gradient.
    """

    weight: Tensor
    top_k: int
    normalize: bool = False
    score: Score = "softmax"
    scale: float = 1.0
    bias: Tensor | None = None


@dataclass(frozen=True)
class Routed:
    """A routing decision made elsewhere, used in place of a :class:`Router`.

    Args:
        ids: [T, K] integers in [0, E]; the value E marks a slot to skip (a token of another rank). Others
            are refused in eager calls on the CPU, and skipped on a GPU and under torch.compile.
        weights: [T, K], any float dtype; differentiable.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Experts:
    """The routed experts, E_j(x) = down_j (silu(gate_j x) * (up_j x)).

    Args:
        gate_up: [E, 2I, H], gate rows first; a tensor, or frozen in 8 or 4 bits (:meth:`quantize`).
        down: [E, H, I]; likewise.
    """

    gate_up: Tensor | Quantized
    down: Tensor | Quantized

    @classmethod
    def quantize(
        cls, gate_up: Tensor, down: Tensor, kind: Kind, importance: tuple[Tensor, Tensor] | None = None
    ) -> Experts:
        """Frozen experts in 8 bits ("int8", a scale a row) or 4 ("nf4", a scale for 64 weights of a row).

        Args:
            importance: of the columns of ``gate_up`` [E, H] and of ``down`` [E, I], for "nf4": the mean
                squares of x and of silu(gate_j x) * (up_j x) over the tokens that expert j sees. None counts
                all columns alike. Or their second moments [E, H, H] and [E, I, I], for error feedback.

        Raises:
            TypeError, ValueError: as :func:`flex_kernels.quantize.quantize`.
        """
        of_gate_up, of_down = importance or (None, None)
        return cls(quantize(gate_up, kind, of_gate_up), quantize(down, kind, of_down))

    @property
    def count(self) -> int:
        """E, the number of experts."""
        return self.gate_up.shape[0]

    def expert(self, index: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(gate_up [2I, H], down [H, I]) of one expert: views where nothing has to be converted.

        ``dtype`` None keeps that of plain weights, and gives quantised ones in float32.
        """
        return plain(self.gate_up[index], dtype), plain(self.down[index], dtype)


@dataclass(frozen=True)
class Personal:
    """The client's own expert and its adaptive gate g = sigmoid(x . gate_weight + gate_bias).

    Args:
        gate_up: [2 Ip, H], gate rows first; may be kept in float32 beside bf16 experts.
        down: [H, Ip].
        gate_weight: [H].
        gate_bias: scalar tensor [], or None for zero.
    """

    gate_up: Tensor
    down: Tensor
    gate_weight: Tensor
    gate_bias: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """The pretrained expert that every token passes through.

    Args:
        gate_up: [2 Is, H], gate rows first; a tensor, or frozen in 8 or 4 bits (:meth:`quantize`).
        down: [H, Is]; likewise.
        gate_weight: [H] for Qwen2-MoE's sigmoid gate, or None for a plain sum.
    """

    gate_up: Tensor | Quantized
    down: Tensor | Quantized
    gate_weight: Tensor | None = None

    @classmethod
    def quantize(cls, gate_up: Tensor, down: Tensor, kind: Kind, gate_weight: Tensor | None = None) -> Shared:
        """A frozen shared expert in 8 bits ("int8") or 4 ("nf4"), as :meth:`Experts.quantize`.

        Raises:
            TypeError, ValueError: as :func:`flex_kernels.quantize.quantize`.
        """
        return cls(quantize(gate_up, kind), quantize(down, kind), gate_weight)


def plain(weight: Tensor | Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """A weight as a tensor; ``dtype`` None keeps a tensor's own, and gives quantised ones in float32."""
    if isinstance(weight, Quantized):
        return weight.dequantize(dtype or torch.float32)
    return weight if dtype is None else weight.to(dtype)
