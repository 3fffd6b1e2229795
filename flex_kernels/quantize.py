"""Frozen weights in 8 or 4 bits: how they are laid out, made and read back.

Letters: M matrices of R rows and C columns each; G = 64 columns of a group.

    int8   W[r, c] = codes[r, c] scales[r]                     a byte a weight, 2 bytes a row
    nf4    W[r, c] = NF4_LEVELS[code of (r, c)] scales[r, c // G]   half a byte a weight, 2 bytes a group

Codes keep the weight's own layout, so that forward and backward read the same ones. Scales are bfloat16,
those of nf4 of either sign (:mod:`flex_kernels.nf4`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flex_kernels.gptq import round_with_feedback
from flex_kernels.nf4 import GROUP_COLUMNS, NF4_LEVELS, Nf4Encoder, nonzero

Kind = Literal["int8", "nf4"]
KINDS = ("int8", "nf4")
LARGEST_INT8 = 127
# Added to the importance of every column, times their mean: none counts for nothing.
DAMPING = 0.01
# Likewise of second moments. GPTQ adds 0.01; 0.1 loses less where inputs are fewer than columns.
FEEDBACK_DAMPING = 0.1
# Rows that are rounded with error feedback at a time: what a column's step touches then stays in cache.
ROWS = 4096
# Weights that are quantised at a time: bounds the float32 copies made on the way, which then stay in cache.
CHUNK = 1 << 18
# On a GPU, where a step takes about two hundred launches whatever its size: 0.2 GB of copies.
GPU_CHUNK = 1 << 23


@dataclass(frozen=True)
class Quantized:
    """Weight matrices [..., R, C] as codes and scales; a leading dimension counts experts.

    Attributes:
        codes: int8 [..., R, C] for "int8"; uint8 [..., R, ceil(C / 2)] for "nf4", column 2c in the low four
            bits of byte c, column 2c + 1 in the high four.
        scales: bfloat16, [..., R] for "int8", [..., R, ceil(C / 64)] for "nf4".
        columns: C.
    """

    codes: Tensor
    scales: Tensor
    columns: int

    @property
    def kind(self) -> Kind:
        return "int8" if self.codes.dtype == torch.int8 else "nf4"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.columns))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> Quantized:
        """Some of the leading dimensions and rows: an index that leaves the columns whole."""
        return Quantized(self.codes[index], self.scales[index], self.columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [..., R, C] in ``dtype``, each product of level and scale rounded once."""
        if self.kind == "int8":
            return (self.codes.float() * self.scales.float()[..., None]).to(dtype)
        levels = torch.tensor(NF4_LEVELS, device=self.device)
        pair = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).int()
        values = levels[pair].flatten(-2)[..., : self.columns]
        scales = self.scales.float().repeat_interleave(GROUP_COLUMNS, dim=-1)[..., : self.columns]
        return (values * scales).to(dtype)


def quantize(weight: Tensor, kind: Kind, importance: Tensor | None = None) -> Quantized:
    """Round a float weight [..., R, C] to the nearest codes.

    The largest weight of a row sets its int8 scale. The scale of an nf4 group is the one, of those tried,
    that leaves the least sum over its columns c of importance[c] (W[r, c] - decoded)^2.

    Args:
        importance: for "nf4" alone. [..., C] float, not negative: what the squared error of a column counts;
            None counts all alike. With the mean square of what a column is multiplied with, the sum is the
            expected squared error of the output but for the inputs' correlation. [..., C, C] float: the mean
            of x x^T over the inputs x, with their correlation. Then a column is not rounded to the nearest
            codes, but so that it makes up for the columns before it (:mod:`flex_kernels.gptq`).

    Raises:
        TypeError: ``weight`` is not a float tensor of at least two dimensions; ``importance`` is no float
            tensor.
        ValueError: ``kind`` is unknown, a weight is not finite, or ``importance`` is given for "int8", has
            another shape, holds a value that is not finite or (of moments: on the diagonal) negative, or
            cannot be a mean of x x^T; with second moments also a weight beyond 1e30.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, KINDS))}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim < 2:
        given = (
            f"{list(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        )
        raise TypeError(f"weight must be a float tensor [..., R, C], got {given}")
    if importance is not None:
        check_importance(importance, weight, kind)
        if importance.ndim == weight.ndim:
            return quantize_with_feedback(weight, importance)
    importance_MC = None if importance is None else damped(importance, weight)
    quantized = empty(weight.shape, kind, weight.device)
    codes, scales, columns = quantized.codes, quantized.scales, quantized.columns
    weight_RC = weight.detach().reshape(-1, columns)
    codes_R, scales_R = codes.view(-1, codes.shape[-1]), scales.view(-1, *scales.shape[weight.ndim - 1 :])
    step = max(1, (CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // max(1, columns))
    encoder: Nf4Encoder | None = None
    for start in range(0, weight_RC.shape[0], step):
        rows = slice(start, start + step)
        piece_RC = weight_RC[rows].float()
        if not torch.isfinite(piece_RC).all():
            raise ValueError(
                f"weight {list(weight.shape)} holds values that are not finite: nothing to round to"
            )
        if kind == "int8":
            codes_R[rows], scales_R[rows] = encode_int8(piece_RC)
            continue
        if encoder is None or encoder.rows != len(piece_RC):
            encoder = Nf4Encoder(len(piece_RC), columns, weight.device)
        importance_RC = None
        if importance_MC is not None:
            row_R = torch.arange(start, start + len(piece_RC), device=weight.device)
            importance_RC = importance_MC[row_R // weight.shape[-2]]
        codes_R[rows], scales_R[rows] = encoder.encode(piece_RC, importance_RC)
    return quantized


def quantize_with_feedback(weight: Tensor, moments: Tensor) -> Quantized:
    """:func:`quantize` to "nf4" by second moments [..., C, C] of the inputs, some matrices at a time."""
    *_, R, C = weight.shape
    quantized = empty(weight.shape, "nf4", weight.device)
    codes_M, scales_M = (t.view(-1, R, t.shape[-1]) for t in (quantized.codes, quantized.scales))
    weight_MRC, moments_MCC = weight.detach().reshape(-1, R, C), moments.detach().reshape(-1, C, C)
    step = max(1, ROWS // max(1, R))
    for start in range(0, len(weight_MRC), step):
        some = slice(start, start + step)
        damped_MCC = moments_MCC[some].to(weight.device, torch.float64, copy=True)
        diagonal_MC = damped_MCC.diagonal(dim1=-2, dim2=-1)
        mean_M1 = diagonal_MC.mean(-1, keepdim=True)
        # Of inputs that were never seen nothing is known: their columns count alike.
        diagonal_MC += torch.where(mean_M1 > 0, FEEDBACK_DAMPING * mean_M1, 1.0)
        codes_M[some], scales_M[some] = round_with_feedback(weight_MRC[some].float(), damped_MCC)
    return quantized


def check_importance(importance: Tensor, weight: Tensor, kind: Kind) -> None:
    """Raise unless ``importance`` is one for ``weight``, of columns or of pairs of them."""
    if kind == "int8":
        raise ValueError(
            "importance is for kind='nf4'; the scale of an int8 row is set by its largest weight"
        )
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        given = importance.dtype if isinstance(importance, Tensor) else type(importance).__name__
        raise TypeError(f"importance must be a float tensor [..., C] or [..., C, C], got {given}")
    *outer, _, C = weight.shape
    if list(importance.shape) not in ([*outer, C], [*outer, C, C]):
        raise ValueError(
            f"importance of a weight {list(weight.shape)} must be {[*outer, C]} or {[*outer, C, C]}, "
            f"got {list(importance.shape)}"
        )
    of_columns = importance
    if importance.ndim == weight.ndim:
        of_columns = importance.diagonal(dim1=-2, dim2=-1)
    if not torch.isfinite(importance).all() or (of_columns < 0).any():
        raise ValueError(f"importance {list(importance.shape)} holds values that are negative or not finite")


def damped(importance: Tensor, weight: Tensor) -> Tensor:
    """``importance`` [..., C] as [M, C] float32 beside the weight: in units of its mean, plus DAMPING."""
    importance_MC = importance.detach().to(weight.device, torch.float32).reshape(-1, weight.shape[-1])
    mean_M1 = importance_MC.mean(-1, keepdim=True)
    # Columns of which nothing is known, such as those of an expert that no token chose, count alike.
    return torch.where(mean_M1 > 0, importance_MC / mean_M1 + DAMPING, 1.0)


def empty(shape: Sequence[int], kind: Kind, device: torch.device | str = "cpu") -> Quantized:
    """Weights [..., R, C] whose codes and scales have yet to be written."""
    *outer, columns = shape
    width = columns if kind == "int8" else -(-columns // 2)
    groups = () if kind == "int8" else (-(-columns // GROUP_COLUMNS),)
    dtype = torch.int8 if kind == "int8" else torch.uint8
    return Quantized(
        torch.empty(*outer, width, dtype=dtype, device=device),
        torch.empty(*outer, *groups, dtype=torch.bfloat16, device=device),
        columns,
    )


def encode_int8(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [R, C] int8, scales [R] bfloat16) of finite float32 weights."""
    scales_R = (weight_RC.abs().amax(-1) / LARGEST_INT8).bfloat16()
    scaled_RC = weight_RC / nonzero(scales_R)[:, None]
    return scaled_RC.round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), scales_R
