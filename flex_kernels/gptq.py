"""NF4 with error feedback: each column makes up for what the columns before it lost. GPTQ (arXiv 2210.17323).

Rounding a matrix W to Q adds, over the inputs x that it is multiplied with, squared errors ||(W - Q) x||^2
whose mean is tr(E S E^T), with E = W - Q and S the mean of x x^T. With S = A A^T, A upper triangular, that
is ||E A||^2, and column c of E A is

    A[c, c] (E[:, c] + sum_{b < c} E[:, b] A[b, c] / A[c, c]).

No column after c enters it. So once the columns before c are rounded, column c is rounded not from W[:, c]
but from W[:, c] + sum_{b < c} E[:, b] A[b, c] / A[c, c], and what it misses that by counts A[c, c]^2. These
are GPTQ's steps, told without the inverse of S (arXiv 2507.18553 shows them to be Babai's nearest plane).

Letters: M matrices of R rows and C columns each; G = 64 columns of a group, which share a scale in each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flex_kernels.nf4 import CELLS, GROUP_COLUMNS, NF4_LEVELS, Nf4Encoder, cells, nonzero

# Feedback adds multiples of errors to a weight: larger ones might leave float32.
LARGEST = 1e30
CODE_OF_ZERO = NF4_LEVELS.index(0.0)


def round_with_feedback(weight_MRC: Tensor, moments_MCC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [M, R, ceil(C / 2)] uint8, scales [M, R, ceil(C / 64)] bfloat16) of float32 weights.

    A group's scales are chosen when its turn comes, for what its columns have become by then. The steps are
    greedy: a matrix of fewer columns than a group can lose more than by rounding each weight by itself.

    Args:
        moments_MCC: positive definite; float64 keeps their triangular factor exact.

    Raises:
        ValueError: a weight is beyond LARGEST or not finite, or a matrix of moments is not positive definite.
    """
    if not (weight_MRC.abs() <= LARGEST).all():
        raise ValueError(
            f"the weight holds values that are not finite, or beyond {LARGEST:g}: nothing to round to"
        )
    (M, R, C), device = weight_MRC.shape, weight_MRC.device
    feedback_MCC, counts_MC = columns_of_factor(moments_MCC)
    weight_MCR = weight_MRC.mT.contiguous()
    error_MCR = torch.empty_like(weight_MCR)
    code_MCR = torch.full((M, C + C % 2, R), CODE_OF_ZERO, dtype=torch.uint8, device=device)
    scales_MRN = torch.empty(M, R, -(-C // GROUP_COLUMNS), dtype=torch.bfloat16, device=device)
    encoder = Nf4Encoder(M * R, min(C, GROUP_COLUMNS), device)
    for n, first in enumerate(range(0, C, GROUP_COLUMNS)):
        last = min(C, first + GROUP_COLUMNS)
        before_MGC = feedback_MCC[:, :first, first:last].mT
        aim_MGR = torch.baddbmm(weight_MCR[:, first:last], before_MGC, error_MCR[:, :first])
        if encoder.columns != last - first:
            encoder = Nf4Encoder(M * R, last - first, device)
        encoder.take(aim_MGR.mT.flatten(0, 1), counts_MC[:, first:last].repeat_interleave(R, dim=0))
        scale_MR = encoder.best_scales().view(M, R)
        scales_MRN[..., n] = scale_MR
        unit_MR, scale_MR = nonzero(scale_MR), scale_MR.float()
        for c in range(first, last):
            inside_M1G = feedback_MCC[:, first:c, c, None].mT
            aim_MR = torch.baddbmm(aim_MGR[:, c - first, None], inside_M1G, error_MCR[:, first:c])[:, 0]
            cell_MR = cells(aim_MR / unit_MR * CELLS).long()
            code_MCR[:, c] = encoder.low[cell_MR]
            error_MCR[:, c] = weight_MCR[:, c] - encoder.level[cell_MR] * scale_MR
    return (code_MCR[:, ::2] | code_MCR[:, 1::2] << 4).mT, scales_MRN


def columns_of_factor(moments_MCC: Tensor) -> tuple[Tensor, Tensor]:
    """(A[b, c] / A[c, c] [M, C, C], A[c, c]^2 [M, C] in units of its mean), float32, of S = A A^T.

    A is upper triangular: the Cholesky factor of the columns taken from the last to the first.
    """
    lower_MCC, failed_M = torch.linalg.cholesky_ex(moments_MCC.flip(-1, -2))
    if failed_M.any():
        raise ValueError(
            "importance [..., C, C] is not positive semidefinite: give the mean of x x^T over inputs x"
        )
    factor_MCC = lower_MCC.flip(-1, -2)
    diagonal_MC = factor_MCC.diagonal(dim1=-2, dim2=-1)
    counts_MC = diagonal_MC.square()
    counts_MC = counts_MC / counts_MC.mean(-1, keepdim=True)
    return (factor_MCC / diagonal_MC[:, None]).float(), counts_MC.float()
