"""Weighted ridge regression from sums that can be gathered batch by batch.

Letters: T tokens, F features, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RidgeSums:
    """Collects the two sums that a least-squares fit needs: X' diag(w) X and X' diag(w) Y, in float32."""

    def __init__(self, features: int, outputs: int):
        self.gram_FF = torch.zeros(features, features)
        self.cross_FO = torch.zeros(features, outputs)

    def add(self, x_TF: Tensor, y_TO: Tensor, weight_T: Tensor | None = None) -> None:
        """Adds one batch of rows, each with an optional non-negative weight."""
        x_TF, y_TO = x_TF.float(), y_TO.float()
        if weight_T is not None:
            root_T1 = weight_T.float().sqrt()[:, None]
            x_TF, y_TO = x_TF * root_T1, y_TO * root_T1
        self.gram_FF.addmm_(x_TF.T, x_TF)
        self.cross_FO.addmm_(x_TF.T, y_TO)

    def solve(self, strength: float) -> Tensor:
        """argmin_B sum_t w_t ||x_t B - y_t||^2 + strength * mean(diag(gram)) * ||B||^2.

        Returns: B [F, O], float32.

        Raises:
            ValueError: ``strength`` is not positive, or the sums hold a non-finite number.
        """
        if not strength > 0:
            raise ValueError(f"strength={strength} must be positive")
        if not (self.gram_FF.isfinite().all() and self.cross_FO.isfinite().all()):
            raise ValueError("the calibration data produced non-finite activations")
        diagonal_F = self.gram_FF.diagonal()
        mean = diagonal_F.mean().clamp_min(torch.finfo(torch.float32).tiny)
        damped_FF = self.gram_FF.double()
        damped_FF.diagonal().add_(strength * float(mean))
        return torch.cholesky_solve(self.cross_FO.double(), torch.linalg.cholesky(damped_FF)).float()
