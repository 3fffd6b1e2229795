"""The 4-bit NormalFloat: its levels, and how a group of weights finds its scale and codes.

Letters: R rows and C columns of weights; N groups of G = 64 columns of a row, one scale each.

The levels are QLoRA's (arXiv 2305.14314). Its scale is the group's largest absolute value; here several are
tried, that one among them and either sign of each, and the one that leaves the least squared error is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP_COLUMNS = 64
# QLoRA's appendix E, each level rounded to bfloat16: what a kernel multiplies in bfloat16 is then that level.
NF4_LEVELS = (
    *(-1.0, -0.6953125, -0.5234375, -0.39453125, -0.28515625, -0.1845703125, -0.0908203125, 0.0),
    *(0.07958984375, 0.1611328125, 0.24609375, 0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0),
)
# Levels are whole multiples of 1 / 2048, so the borders midway between them are whole multiples of 1 / CELLS.
CELLS = 4096
# Scales that are tried, in units of a group's largest absolute value and of either sign. The last two put it
# on an outer level, 0.72 or -0.70: weights that were rounded before find their scale again.
MULTIPLES = (1.0, 0.92, 1.06, 1 / NF4_LEVELS[14], -1 / NF4_LEVELS[1])
# With an importance of columns the error depends on few weights, and its least value lies anywhere.
MULTIPLES_OF_IMPORTANCE = (*MULTIPLES, 0.72, 0.76, 0.8, 0.84, 0.88, 0.96, 1.03, 1.1)


def nonzero(scales: Tensor) -> Tensor:
    """Scales to divide by, in float32: 1 where all weights are zero (or too small for bfloat16)."""
    return torch.where(scales == 0, 1.0, scales.float())


def cells(scaled: Tensor) -> Tensor:
    """Numbers, as floats from 0 to 2 CELLS, of the cells that hold CELLS weight / scale; overwrites them."""
    return scaled.ceil_().clamp_(-CELLS, CELLS).add_(CELLS)


class Nf4Encoder:
    """Rounds ``rows`` rows of ``columns`` float32 weights at a time, in memory that is taken once.

    A code is looked up by the cell of width 1 / CELLS that a weight divided by its scale lies in. The borders
    between codes are borders of cells: the code is that of the nearest level, as comparisons would find it.
    """

    def __init__(self, rows: int, columns: int, device: torch.device):
        self.rows, self.columns = rows, columns
        levels = torch.tensor(NF4_LEVELS, device=device)
        cell = torch.arange(-CELLS, CELLS + 1, device=device) / CELLS
        code = torch.bucketize(cell, (levels[1:] + levels[:-1]) / 2)
        # The tables: a code in the low or the high half of a byte, its level, and its level under the scale's
        # negative. A weight in cell i, (i - 1, i], is in cell 1 - i when turned round.
        self.low, self.high = code.to(torch.uint8), (code << 4).to(torch.uint8)
        self.level = levels[code]
        self.turned = -self.level.flip(0).roll(1)
        self.turned[0] = -levels[-1]
        self.padded_RC = torch.zeros(rows, -(-columns // GROUP_COLUMNS) * GROUP_COLUMNS, device=device)
        self.weight_NG = self.padded_RC.view(-1, GROUP_COLUMNS)
        self.scaled_NG, self.level_NG, self.miss_NG = (torch.empty_like(self.weight_NG) for _ in range(3))
        self.cell_NG = torch.empty_like(self.weight_NG, dtype=torch.int64)
        self.importance_NG: Tensor | None = None

    def encode(self, weight_RC: Tensor, importance_RC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(codes [R, ceil(C / 2)] uint8, scales [R, ceil(C / 64)] bfloat16) of finite float32 weights.

        Args:
            importance_RC: what a weight's squared error counts; None counts all alike.
        """
        self.take(weight_RC, importance_RC)
        scales_N = self.best_scales()
        self.place(scales_N)
        even, odd = self.cell_NG[:, ::2], self.cell_NG[:, 1::2]
        low, high = (table.expand(len(even), -1) for table in (self.low, self.high))
        codes_RC = (low.gather(1, even) | high.gather(1, odd)).view(self.rows, -1)
        return codes_RC[:, : -(-self.columns // 2)], scales_N.view(self.rows, -1)

    def take(self, weight_RC: Tensor, importance_RC: Tensor | None) -> None:
        """The weights that :meth:`best_scales` is then about."""
        self.padded_RC[:, : self.columns] = weight_RC
        if importance_RC is not None:
            missing = self.padded_RC.shape[1] - self.columns
            padded_RC = torch.nn.functional.pad(importance_RC, (0, missing))
            self.importance_NG = padded_RC.reshape(-1, GROUP_COLUMNS)

    def best_scales(self) -> Tensor:
        """The scale [N] bfloat16 of each group that leaves the least error of those tried."""
        largest_N = torch.abs(self.weight_NG, out=self.miss_NG).amax(-1)
        unit_N = 1 / nonzero(largest_N)
        best_N, least_N = largest_N.bfloat16(), torch.full_like(largest_N, math.inf)
        for multiple in MULTIPLES if self.importance_NG is None else MULTIPLES_OF_IMPORTANCE:
            scales_N = (largest_N * multiple).bfloat16()
            self.place(scales_N)
            for signed_N, table in ((scales_N, self.level), (-scales_N, self.turned)):
                error_N = self.error(table, scales_N, unit_N)
                best_N = torch.where(error_N < least_N, signed_N, best_N)
                least_N = torch.fmin(error_N, least_N)
        # With levels l held, |w - s l|^2 is least at s = <w, l> / <l, l> = s0 (1 + <w / s0 - l, l> / <l, l>).
        self.place(best_N)
        torch.gather(self.level.expand(len(best_N), -1), 1, self.cell_NG, out=self.level_NG)
        along_N = self.weighed(self.scaled_NG.sub_(self.level_NG).mul_(self.level_NG))
        length_N = self.weighed(self.level_NG.square_())
        scales_N = (best_N.float() * (1 + along_N / nonzero(length_N))).bfloat16()
        self.place(scales_N)
        return torch.where(self.error(self.level, scales_N, unit_N) < least_N, scales_N, best_N)

    def place(self, scales_N: Tensor) -> None:
        """Divide the weights by their scales and find their cells."""
        torch.div(self.weight_NG, nonzero(scales_N)[:, None], out=self.scaled_NG)
        torch.mul(self.scaled_NG, CELLS, out=self.miss_NG)
        self.cell_NG.copy_(cells(self.miss_NG))

    def error(self, table: Tensor, scales_N: Tensor, unit_N: Tensor) -> Tensor:
        """Squared errors [N] of the levels that ``table`` has for the weights placed by ``scales_N``.

        In units of 1 / unit_N, the largest weight, whose square may not fit float32.
        """
        torch.gather(table.expand(len(scales_N), -1), 1, self.cell_NG, out=self.level_NG)
        torch.sub(self.scaled_NG, self.level_NG, out=self.miss_NG)
        return self.weighed(self.miss_NG.square_()) * (nonzero(scales_N) * unit_N).square_()

    def weighed(self, values_NG: Tensor) -> Tensor:
        """Sums [N] of values, each times its importance; overwrites them."""
        if self.importance_NG is not None:
            values_NG.mul_(self.importance_NG)
        return values_NG.sum(-1)
