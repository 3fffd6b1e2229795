"""Feed-forward blocks on torch GEMMs: the engine of machines that the fused kernels do not serve.

Letters: T tokens, H hidden, I expert width, n rows of one block (at most BLOCK_ROWS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flex_kernels.cpu import ops
from flex_kernels.cpu.plan import WEIGHT_ROWS, Group

# Rows that pass through an expert at a time: bounds scratch to BLOCK_ROWS * (2 H + 3 I) elements.
BLOCK_ROWS = 512


class Scratch:
    """Buffers reused from block to block and expert to expert; they grow to the largest asked for."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int) -> Tensor:
        held = self.buffers.get(name)
        if held is None or held.numel() < rows * columns:
            held = self.buffers[name] = torch.empty(rows * columns, dtype=self.dtype)
        return held[: rows * columns].view(rows, columns)


def row_blocks(group: Group) -> list[slice]:
    rows = group.tokens_n.shape[0]
    whole = group.dgate_up_2IH is not None or group.ddown_HI is not None
    size = WEIGHT_ROWS if whole else BLOCK_ROWS
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def forward(x_TH: Tensor, groups: list[Group], out_TH: Tensor) -> None:
    """out += scale * E(x) for every group; ``out_TH`` is float32."""
    scratch = Scratch(x_TH.dtype)
    hidden = x_TH.shape[1]
    for group in groups:
        two_i = group.gate_up_2IH.shape[0]
        for rows in row_blocks(group):
            tokens_n = group.tokens_n[rows]
            n = tokens_n.shape[0]
            z_n2I = scratch.get("z", n, two_i) if group.preact_n2I is None else group.preact_n2I[rows]
            a_nI, rows_nH = scratch.get("a", n, two_i // 2), scratch.get("rows", n, hidden)
            ops.kernels.gather_rows(x_TH, tokens_n, rows_nH)
            torch.mm(rows_nH, group.gate_up_2IH.t(), out=z_n2I)
            ops.kernels.swiglu(z_n2I, a_nI)
            torch.mm(a_nI, group.down_HI.t(), out=rows_nH)
            ops.kernels.scatter_add(rows_nH, tokens_n, group.scale_n[rows], out_TH)


def backward(dy_TH: Tensor, x_TH: Tensor, groups: list[Group], dx_TH: Tensor | None) -> None:
    """Fill dscale and the weight gradients of every group; dx += their part (float32), if asked for."""
    scratch = Scratch(x_TH.dtype)
    hidden = x_TH.shape[1]
    for group in groups:
        two_i = group.gate_up_2IH.shape[0]
        for rows in row_blocks(group):
            tokens_n = group.tokens_n[rows]
            n = tokens_n.shape[0]
            dz_n2I, da_nI = scratch.get("z", n, two_i), scratch.get("da", n, two_i // 2)
            rows_nH, dy_nH = scratch.get("rows", n, hidden), scratch.get("dy", n, hidden)
            scaled_nI = None if group.ddown_HI is None else scratch.get("a", n, two_i // 2)
            z_n2I = dz_n2I
            if group.preact_n2I is not None:
                z_n2I = group.preact_n2I[rows]
            if group.preact_n2I is None or group.dgate_up_2IH is not None:
                ops.kernels.gather_rows(x_TH, tokens_n, rows_nH)
            if group.preact_n2I is None:
                torch.mm(rows_nH, group.gate_up_2IH.t(), out=z_n2I)
            ops.kernels.gather_rows(dy_TH, tokens_n, dy_nH)
            torch.mm(dy_nH, group.down_HI, out=da_nI)
            ops.kernels.swiglu_backward(
                z_n2I, da_nI, group.scale_n[rows], dz_n2I, group.dscale_n[rows], scaled_nI
            )
            if group.ddown_HI is not None and scaled_nI is not None:
                group.add_gradient(group.ddown_HI, dy_nH, scaled_nI)
            if group.dgate_up_2IH is not None:
                group.add_gradient(group.dgate_up_2IH, dz_n2I, rows_nH)
            if dx_TH is not None:
                torch.mm(dz_n2I, group.gate_up_2IH, out=rows_nH)
                ops.kernels.scatter_add(rows_nH, tokens_n, None, dx_TH)
