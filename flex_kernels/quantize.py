"""Frozen weights in 8 or 4 bits: how they are laid out, made and read back.

Letters: R rows and C columns of one weight matrix, in groups of G = 64 columns.

    int8   W[r, c] = codes[r, c] scales[r]                     a byte a weight, 2 bytes a row
    nf4    W[r, c] = NF4_LEVELS[code of (r, c)] scales[r, c // G]   half a byte a weight, 2 bytes a group

Codes keep the weight's own layout, so that forward and backward read the same ones; scales are bfloat16.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["int8", "nf4"]
KINDS = ("int8", "nf4")
GROUP_COLUMNS = 64
LARGEST_INT8 = 127
# The 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E), each level rounded to bfloat16: what a kernel
# multiplies in bfloat16 is then the level itself.
NF4_LEVELS = (
    *(-1.0, -0.6953125, -0.5234375, -0.39453125, -0.28515625, -0.1845703125, -0.0908203125, 0.0),
    *(0.07958984375, 0.1611328125, 0.24609375, 0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0),
)
# Weights that are quantised at a time: bounds the float32 copies made on the way, which then stay in cache.
CHUNK = 1 << 18


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


def quantize(weight: Tensor, kind: Kind) -> Quantized:
    """Round a float weight [..., R, C] to the nearest codes; the largest of a row or group sets its scale.

    Raises:
        TypeError: ``weight`` is not a float tensor of at least two dimensions.
        ValueError: ``kind`` is unknown, or a weight is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, KINDS))}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim < 2:
        given = (
            f"{list(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        )
        raise TypeError(f"weight must be a float tensor [..., R, C], got {given}")
    quantized = empty(weight.shape, kind, weight.device)
    codes, scales, columns = quantized.codes, quantized.scales, quantized.columns
    weight_RC = weight.detach().reshape(-1, columns)
    codes_R, scales_R = codes.view(-1, codes.shape[-1]), scales.view(-1, *scales.shape[weight.ndim - 1 :])
    step = max(1, CHUNK // max(1, columns))
    encode = encode_int8 if kind == "int8" else encode_nf4
    for start in range(0, weight_RC.shape[0], step):
        rows = slice(start, start + step)
        piece_RC = weight_RC[rows].float()
        if not torch.isfinite(piece_RC).all():
            raise ValueError(
                f"weight {list(weight.shape)} holds values that are not finite: nothing to round to"
            )
        codes_R[rows], scales_R[rows] = encode(piece_RC)
    return quantized


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


def encode_nf4(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [R, ceil(C / 2)] uint8, scales [R, ceil(C / 64)] bfloat16) of finite float32 weights."""
    rows, columns = weight_RC.shape
    groups = -(-columns // GROUP_COLUMNS)
    padded_RC = torch.nn.functional.pad(weight_RC, (0, groups * GROUP_COLUMNS - columns))
    weight_RGC = padded_RC.view(rows, groups, GROUP_COLUMNS)
    scales_RG = weight_RGC.abs().amax(-1).bfloat16()
    scaled_RGC = weight_RGC / nonzero(scales_RG)[..., None]
    # A code is the number of borders below the weight: fifteen comparisons beat torch.bucketize.
    codes_RGC = torch.zeros(weight_RGC.shape, dtype=torch.uint8, device=weight_RC.device)
    for below, above in itertools.pairwise(NF4_LEVELS):
        codes_RGC += (scaled_RGC > (below + above) / 2).view(torch.uint8)
    codes_RC = codes_RGC.view(rows, -1)[:, : columns + columns % 2]
    return codes_RC[:, ::2] | codes_RC[:, 1::2] << 4, scales_RG


def nonzero(scales: Tensor) -> Tensor:
    """Scales to divide by, in float32: 1 where all weights are zero (or too small for bfloat16)."""
    return torch.where(scales == 0, 1.0, scales.float())
