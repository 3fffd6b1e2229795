"""What the launches of the three grouped products have in common.

The kernels are in :mod:`up_swiglu`, :mod:`grouped_gemm` and :mod:`down_backward`; the index arrays that they
take are described in :mod:`flex_kernels.triton.common`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flex_kernels.triton.codes import Weights, kind_of
from flex_kernels.triton.direct import launch
from flex_kernels.triton.groups import Groups, copy_rows
from flex_kernels.triton.tiles import Tile, ceil_div, descriptor, grid_size

# Arguments whose alignment says nothing about the loads: index arrays, read an element a thread, and vectors
# that may be rows of a larger tensor. Were it looked at, every kernel would be compiled again where a number
# of tokens moves the start of one of them.
INDEX_POINTERS = ("order_ptr", "offsets_ptr", "tile_expert_ptr", "tile_row_ptr", "tile_count_ptr")
ROW_FACTORS = ("score_ptr", "damp_ptr")

grouped_jit = triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=[*INDEX_POINTERS, *ROW_FACTORS]
)


def described_rows(x_TR: Tensor, rows: Groups, tile: Tile) -> TensorDescriptor | None:
    """A descriptor of the rows of ``x_TR`` in the order of the tiles, or None where the kernel is to gather
    them itself.

    Of a dense expert they are in order as they lie; others are copied where the tile asks for it.
    """
    if not tile.tma or (rows.grouped and not tile.copy_rows):
        return None
    block = (tile.m, tile.k)
    found = descriptor(x_TR, block)
    return found if found is None or not rows.grouped else descriptor(copy_rows(x_TR, rows), block)


def grouped_launch(
    kernel: Any, columns: int, w: Weights, rows: Groups, tile: Tile, tma: bool, device: torch.device
) -> Callable[..., Any]:
    """``kernel`` over all tiles of ``rows`` and ``columns``, still to be called with its own arguments."""
    grid = (grid_size(rows.tile_bound * ceil_div(columns, tile.n), tile, device), 1)
    return partial(
        launch,
        kernel,
        device,
        grid,
        GROUPED=rows.grouped,
        TMA=tma,
        KIND=kind_of(w),
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        GROUP_M=tile.group,
        FLATTEN=tile.flatten and tile.per_sm > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
