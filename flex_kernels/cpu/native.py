"""The native kernels on tensors: checks what the extension takes on trust, then hands over addresses and
sizes.

Letters: T tokens, H hidden, I expert width, n rows of one block, S segments.
"""

from __future__ import annotations

import math
from array import array

import torch
from torch import Tensor

from flex_kernels.cpu.binding import DTYPES, _cpu_ops, address, dtype_code

# Buffers from this size on are made of pages that the process keeps: fresh ones took 5% of a step of 8,192
# tokens.
PAGES_FROM = 8 << 20
# Most bytes of freed ones that it keeps.
KEPT_BYTES: int = _cpu_ops.KEPT_BYTES
SEGMENT_WORDS: int = _cpu_ops.SEGMENT_WORDS
BLOCK_WORDS: int = _cpu_ops.BLOCK_WORDS
PIECE_WORDS: int = _cpu_ops.PIECE_WORDS
PARTIAL_COLUMNS: int = _cpu_ops.PARTIAL_COLUMNS
THIN_ROWS: int = _cpu_ops.THIN_ROWS
THIN_CODE_ROWS: int = _cpu_ops.THIN_CODE_ROWS
BLOCK_ROWS: int = _cpu_ops.BLOCK_ROWS
HIDDEN_UNIT: int = _cpu_ops.HIDDEN_UNIT
FEW_ROWS: int = _cpu_ops.FEW_ROWS
INT8_GROUP: int = _cpu_ops.INT8_GROUP
INT8_UNIT: int = _cpu_ops.INT8_UNIT

fused = _cpu_ops.fused
has_weight_gradient = _cpu_ops.has_weight_gradient
multiplies_int8 = _cpu_ops.multiplies_int8
isa = _cpu_ops.isa
isas = _cpu_ops.isas
set_isa = _cpu_ops.set_isa
scratch_bytes = _cpu_ops.scratch_bytes
give_back_pages = _cpu_ops.give_back_pages


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor for values that do not outlive a step: a large one is in memory that an earlier one had.

    Raises:
        MemoryError: the system has not as much.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < PAGES_FROM:
        return torch.empty(shape, dtype=dtype)
    pages = torch.frombuffer(_cpu_ops.Pages(size), dtype=torch.uint8)
    # Not a view of the bytes: autograd treats views apart.
    return torch.empty(0, dtype=dtype).set_(pages.untyped_storage(), 0, shape)  # type: ignore[call-overload]


def empty_like(t: Tensor) -> Tensor:
    """:func:`empty` of the shape and dtype of ``t``, dense."""
    return empty(*t.shape, dtype=t.dtype)


def lay_out_segments(blocks: array[int], pieces: array[int]) -> Tensor:
    """The kernels' table [S, SEGMENT_WORDS] of a batch of S pieces.

    Args:
        blocks: "q", BLOCK_WORDS for each block. pieces: "q", PIECE_WORDS for each segment: its block's
            number, expert, first row, rows, and where its hidden rows start (csrc/cpu/table.h).
    """
    count, rest = divmod(len(pieces), PIECE_WORDS)
    if rest or len(blocks) % BLOCK_WORDS:
        raise ValueError(
            f"pieces and blocks must be of {PIECE_WORDS} and {BLOCK_WORDS} words each, "
            f"got {len(pieces)} and {len(blocks)}"
        )
    table = torch.empty(count, SEGMENT_WORDS, dtype=torch.int64)
    addresses = (words.buffer_info()[0] for words in (blocks, pieces))
    _cpu_ops.lay_out_segments(*addresses, count, table.data_ptr())
    return table


def gather_rows(source_TH: Tensor, tokens_n: Tensor, out_nH: Tensor) -> None:
    """out[n] = source[tokens[n]]"""
    rows, columns = tokens_n.shape[0], source_TH.shape[1]
    _cpu_ops.gather_rows(
        address("source", source_TH, source_TH.dtype, (source_TH.shape[0], columns)),
        address("tokens", tokens_n, torch.int32, (rows,)),
        address("out", out_nH, source_TH.dtype, (rows, columns)),
        rows,
        columns * source_TH.element_size(),
        torch.get_num_threads(),
    )


def swiglu(z_n2I: Tensor, out_nI: Tensor) -> None:
    """out = silu(gate) * up, computed in float32."""
    rows, width = out_nI.shape
    _cpu_ops.swiglu(
        dtype_code("z", z_n2I),
        address("z", z_n2I, z_n2I.dtype, (rows, 2 * width)),
        address("out", out_nI, z_n2I.dtype, (rows, width)),
        rows,
        width,
        torch.get_num_threads(),
    )


def swiglu_backward(
    z_n2I: Tensor, da_nI: Tensor, scale_n: Tensor, dz_n2I: Tensor, dscale_n: Tensor, scaled_nI: Tensor | None
) -> None:
    """With a = silu(gate) * up and y = scale * down(a), given da = dy @ down:

    dscale = <da, a> a row; dz = scale * da * da/dz; scaled = scale * a, when asked for. ``dz_n2I`` may be
    ``z_n2I``.
    """
    rows, width = da_nI.shape
    _cpu_ops.swiglu_backward(
        dtype_code("z", z_n2I),
        address("z", z_n2I, z_n2I.dtype, (rows, 2 * width)),
        address("da", da_nI, z_n2I.dtype, (rows, width)),
        address("scale", scale_n, torch.float32, (rows,)),
        address("dz", dz_n2I, z_n2I.dtype, (rows, 2 * width)),
        address("dscale", dscale_n, torch.float32, (rows,)),
        address("scaled", scaled_nI, z_n2I.dtype, (rows, width)),
        rows,
        width,
        torch.get_num_threads(),
    )


def scatter_add(rows_nH: Tensor, tokens_n: Tensor, scale_n: Tensor | None, out_TH: Tensor) -> None:
    """out[tokens[n]] += scale[n] * rows[n] in float32, in the order of n."""
    rows, columns = rows_nH.shape
    _cpu_ops.scatter_add(
        dtype_code("rows", rows_nH),
        address("rows", rows_nH, rows_nH.dtype, (rows, columns)),
        address("tokens", tokens_n, torch.int32, (rows,)),
        address("scale", scale_n, torch.float32, (rows,)),
        address("out", out_TH, torch.float32, (out_TH.shape[0], columns)),
        rows,
        columns,
        torch.get_num_threads(),
    )


class Scratch:
    """Working memory of the fused kernels: a piece a thread, sized for rows and operands of at most these
    lengths.
    """

    def __init__(self, longest: int, rows: int):
        self.threads = torch.get_num_threads()
        self.bytes = scratch_bytes(longest, rows)
        self.memory = torch.empty(self.bytes * self.threads, dtype=torch.uint8)

    def arguments(self) -> tuple[int, int, int]:
        return self.memory.data_ptr(), self.bytes, self.threads


def up(x_TH: Tensor, segments_SW: Tensor, scratch: Scratch) -> None:
    """a = silu(x gate^T) * (x up^T) for every segment; csrc/cpu/kernels.h describes the table."""
    code = dtype_code("x", x_TH)
    _cpu_ops.up(code, x_TH.data_ptr(), x_TH.shape[1], *table(segments_SW), *scratch.arguments())


def down(segments_SW: Tensor, out_TH: Tensor, dtype: torch.dtype, scratch: Scratch) -> None:
    """out[tokens] += scale * (a down^T) for every segment."""
    out = address("out", out_TH, torch.float32, tuple(out_TH.shape))
    _cpu_ops.down(DTYPES[dtype], *table(segments_SW), out_TH.shape[1], out, *scratch.arguments())


def up_backward(x_TH: Tensor, dy_TH: Tensor, segments_SW: Tensor, partial: Tensor, scratch: Scratch) -> None:
    """dz, dscale and scale * a of every segment; ``partial`` has rows * ceil(I / PARTIAL_COLUMNS) floats a
    segment.
    """
    dy = address("dy", dy_TH, x_TH.dtype, tuple(x_TH.shape))
    _cpu_ops.up_backward(
        dtype_code("x", x_TH),
        x_TH.data_ptr(),
        dy,
        x_TH.shape[1],
        *table(segments_SW),
        partial.data_ptr(),
        *scratch.arguments(),
    )


def down_backward(segments_SW: Tensor, dx_TH: Tensor, dtype: torch.dtype, scratch: Scratch) -> None:
    """dx[tokens] += dz gate_up for every segment."""
    dx = address("dx", dx_TH, torch.float32, tuple(dx_TH.shape))
    _cpu_ops.down_backward(DTYPES[dtype], *table(segments_SW), dx_TH.shape[1], dx, *scratch.arguments())


def weight_gradient(
    left_nA: Tensor, right_nB: Tensor, out_AB: Tensor, accumulate: bool, scratch: Scratch
) -> None:
    """out (+)= left^T right in float32, summed in the order of n; ``scratch`` is one for BLOCK_ROWS rows."""
    (rows, height), width = left_nA.shape, right_nB.shape[1]
    if not rows:
        out_AB.mul_(accumulate)
        return
    _cpu_ops.weight_gradient(
        dtype_code("left", left_nA),
        address("left", left_nA, left_nA.dtype, (rows, height)),
        address("right", right_nB, left_nA.dtype, (rows, width)),
        rows,
        height,
        width,
        address("out", out_AB, torch.float32, (height, width)),
        accumulate,
        *scratch.arguments(),
    )


def table(segments_SW: Tensor) -> tuple[int, int]:
    count = segments_SW.shape[0]
    return address("segments", segments_SW, torch.int64, (count, SEGMENT_WORDS)), count
