"""Feed-forward blocks on torch GEMMs: the engine of machines that the fused kernels do not serve.

Letters: T tokens, H hidden, I expert width, n rows of one block (at most BLOCK_ROWS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flex_kernels.cpu import ops
from flex_kernels.cpu.plan import WEIGHT_ROWS, Group
from flex_kernels.quantize import Quantized

# Rows that pass through an expert at a time: bounds scratch to BLOCK_ROWS * (2 H + 3 I) elements.
BLOCK_ROWS = 512
# Quantised weights that are decoded at a time.
STRIP_ELEMENTS = 1 << 21


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


def strips(weight: Quantized) -> list[slice]:
    """Rows of a quantised weight that are decoded at a time."""
    step = max(1, STRIP_ELEMENTS // weight.columns)
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def times_transposed(rows_nC: Tensor, weight_RC: Tensor | Quantized, out_nR: Tensor) -> None:
    """out = rows weight^T"""
    if not isinstance(weight_RC, Quantized):
        torch.mm(rows_nC, weight_RC.t(), out=out_nR)
        return
    for strip in strips(weight_RC):
        out_nR[:, strip] = rows_nC @ weight_RC[strip].dequantize(rows_nC.dtype).t()


def times(rows_nR: Tensor, weight_RC: Tensor | Quantized, out_nC: Tensor) -> None:
    """out = rows weight"""
    if not isinstance(weight_RC, Quantized):
        torch.mm(rows_nR, weight_RC, out=out_nC)
        return
    total_nC = torch.zeros(out_nC.shape)
    for strip in strips(weight_RC):
        total_nC += rows_nR[:, strip] @ weight_RC[strip].dequantize(rows_nR.dtype)
    out_nC.copy_(total_nC)


def row_blocks(group: Group) -> list[slice]:
    size = WEIGHT_ROWS if group.block.trained else BLOCK_ROWS
    return [slice(start, min(start + size, group.rows)) for start in range(0, group.rows, size)]


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
            times_transposed(rows_nH, group.gate_up_2IH, z_n2I)
            ops.kernels.swiglu(z_n2I, a_nI)
            times_transposed(a_nI, group.down_HI, rows_nH)
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
                times_transposed(rows_nH, group.gate_up_2IH, z_n2I)
            ops.kernels.gather_rows(dy_TH, tokens_n, dy_nH)
            times(dy_nH, group.down_HI, da_nI)
            ops.kernels.swiglu_backward(
                z_n2I, da_nI, group.scale_n[rows], dz_n2I, group.dscale_n[rows], scaled_nI
            )
            if group.ddown_HI is not None and scaled_nI is not None:
                group.add_gradient(group.ddown_HI, dy_nH, scaled_nI)
            if group.dgate_up_2IH is not None:
                group.add_gradient(group.dgate_up_2IH, dz_n2I, rows_nH)
            if dx_TH is not None:
                times(dz_n2I, group.gate_up_2IH, rows_nH)
                ops.kernels.scatter_add(rows_nH, tokens_n, None, dx_TH)
