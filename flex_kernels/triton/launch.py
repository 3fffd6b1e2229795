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

from flex_kernels.triton.codes import Weights, kind_of
from flex_kernels.triton.direct import launch
from flex_kernels.triton.groups import Groups
from flex_kernels.triton.tiles import Tile, ceil_div, grid_size

# Arguments whose alignment says nothing about the loads: index arrays, read an element a thread, and vectors
# that may be rows of a larger tensor. Were it looked at, every kernel would be compiled again where a number
# of tokens moves the start of one of them.
INDEX_POINTERS = ("order_ptr", "offsets_ptr", "tile_expert_ptr", "tile_row_ptr", "tile_count_ptr")
ROW_FACTORS = ("score_ptr", "damp_ptr")

grouped_jit = triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=[*INDEX_POINTERS, *ROW_FACTORS]
)


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
