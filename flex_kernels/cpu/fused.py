"""Feed-forward blocks on the native fused kernels: lays out segments and buffers, and calls the kernels in
turn.

Letters: T tokens, H hidden, I expert width, n rows of one segment, S segments.
"""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_kernels.cpu import ops
from flex_kernels.cpu.plan import WEIGHT_ROWS, Block, Group
from flex_kernels.quantize import KINDS, Quantized

# A batch holds a part of the hidden rows: threads wait for each other at its end, and experts that are cut in
# two are read twice. Small calls hold little even so, large ones gain nothing beyond so many rows.
PARTS = 8
FEWEST_ELEMENTS = 5 << 16
FEWEST_ROWS = 64
MOST_ROWS = 2048
# Tokens of which a batch may hold the hidden rows, where experts of few rows stand beside others of many.
MIXED_TOKENS = 128
# Last-level cache where the system does not tell.
USUAL_CACHE = 16 << 20


@dataclass(slots=True)
class Segment:
    """Rows [start, end) of a group; ``at`` is where its hidden rows start in the buffer of its batch, in
    elements of the forward pass.
    """

    group: Group
    start: int
    end: int
    at: int

    @property
    def rows(self) -> int:
        return self.end - self.start

    @property
    def width(self) -> int:
        return self.group.width

    @property
    def elements(self) -> int:
        """Room for its hidden rows, in whichever order the kernels keep them."""
        return self.rows * room(self.width)


def room(width: int) -> int:
    """Elements that one hidden row may take: I in whole units."""
    unit = ops.kernels.HIDDEN_UNIT
    return -(-width // unit) * unit


def serves(groups: list[Group]) -> bool:
    """Whether the kernels run here and can read these weights as stored: unit stride along a row."""
    blocks = {id(g.block): g.block for g in groups}.values()
    weights = [w for b in blocks for w in (b.gate_up_E2IH, b.down_EHI)]
    read = [matrix_of(w) for w in weights] + [w.scales for w in weights if isinstance(w, Quantized)]
    return ops.fused() and all(t.stride(2) == 1 for t in read if t.ndim == 3 and t.shape[2] > 1)


def matrix_of(weight: Tensor | Quantized) -> Tensor:
    """What the weight is read from: itself, or its codes."""
    return weight.codes if isinstance(weight, Quantized) else weight


@functools.cache
def cache_bytes() -> int:
    """The last-level cache that the first processor shares."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return USUAL_CACHE


def bytes_read_twice(group: Group) -> int:
    """Weights of a group that backward reads twice and that should stay in the cache in between.

    Zero where it does not (``gate_up`` is read for z and again for dx), where arithmetic outweighs reading
    (many rows), and where the cache cannot hold them anyway.
    """
    block = group.block
    if block.preact_N2I is not None or group.rows > ops.kernels.FEW_ROWS:
        return 0
    size = (block.gate_up_E2IH.nbytes + block.down_EHI.nbytes) // block.down_EHI.shape[0]
    return size if size < cache_bytes() else 0


def batches(groups: list[Group], most_bytes: int | None = None, itemsize: int = 2) -> list[list[Segment]]:
    """Cut the groups into batches of segments whose hidden rows fit in a bounded buffer, and whose weights
    that are read twice take no more than ``most_bytes``, where given.

    Few rows and many share batches where elements are ``itemsize`` = 2 bytes: wider ones would take more
    memory than that is worth.

    A group whose weights need gradients stays in one piece up to WEIGHT_ROWS: its gradient is one product.
    """
    blocks = {id(g.block): g.block for g in groups}
    widths = {name: room(block.width) for name, block in blocks.items()}
    total, widest = sum(g.rows * widths[id(g.block)] for g in groups), max(widths.values(), default=0)
    budget = min(max(total // PARTS, FEWEST_ELEMENTS, FEWEST_ROWS * widest), MOST_ROWS * widest)
    if itemsize == 2 and (most_bytes is None or not any(map(bytes_read_twice, groups))):
        tokens = tokens_to_mix(groups)
        if tokens:
            return mixed_batches(groups, min(-(-total // budget), -(-tokens // MIXED_TOKENS)))
    rows_of_piece = {
        name: WEIGHT_ROWS if block.trained else max(1, budget // max(1, widths[name]))
        for name, block in blocks.items()
    }
    done: list[list[Segment]] = []
    batch: list[Segment] = []
    used = held = 0
    for group in groups:
        again = 0 if most_bytes is None else bytes_read_twice(group)
        name, rows = id(group.block), group.rows
        for start in range(0, rows, rows_of_piece[name]):
            end = min(start + rows_of_piece[name], rows)
            elements = (end - start) * widths[name]
            crowded = most_bytes is not None and again and held + again > most_bytes
            if batch and (used + elements > budget or crowded):
                done.append(batch)
                batch, used, held = [], 0, 0
            batch.append(Segment(group, start, end, used))
            used += elements
            held += again
    return [*done, batch] if batch else done


def tokens_to_mix(groups: list[Group]) -> int:
    """The tokens of a call most of whose routed experts are bound by the reading of weights while an expert
    that all tokens pass through is bound by multiplying; 0 for others.
    """
    few = ops.kernels.FEW_ROWS
    routed = [g.rows for g in groups if not g.block.everyone]
    tokens = max((g.rows for g in groups if g.block.everyone), default=0)
    reading = sum(rows <= few for rows in routed)
    if tokens <= few or tokens > WEIGHT_ROWS or max(routed, default=0) > MIXED_TOKENS:
        return 0
    return tokens if 2 * reading > len(routed) else 0


def mixed_batches(groups: list[Group], count: int) -> list[list[Segment]]:
    """``count`` batches, each with its share of routed experts and behind them of every other one's rows:
    the kernels read weights for the former while they multiply the latter.
    """
    routed = [g for g in groups if not g.block.everyone]
    rows = sum(g.rows for g in routed)
    parts: list[list[tuple[Group, int, int]]] = [[] for _ in range(count)]
    before = 0
    for group in routed:
        parts[(2 * before + group.rows) * count // (2 * rows)].append((group, 0, group.rows))
        before += group.rows
    for group in groups:
        if group.block.everyone:
            pieces = 1 if group.block.trained else count
            for i in range(pieces):
                start, end = group.rows * i // pieces, group.rows * (i + 1) // pieces
                parts[i].append((group, start, end))
    done = []
    for part in parts:
        at, batch = 0, []
        for group, start, end in part:
            batch.append(Segment(group, start, end, at))
            at += batch[-1].elements
        done.append(batch)
    return done


def widest_batch(work: list[list[Segment]]) -> int:
    return max((batch[-1].at + batch[-1].elements for batch in work), default=0)


def make_scratch(groups: list[Group], hidden: int, factor: int) -> Any:
    blocks = {id(g.block): g.block for g in groups}.values()
    longest = max([hidden, *(factor * block.width for block in blocks)])
    # The gradient of a weight takes as much as that many rows.
    least = ops.kernels.BLOCK_ROWS if any(block.trained for block in blocks) else 0
    return ops.kernels.Scratch(longest, max([least, *(g.rows for g in groups)]))


class Int8Room:
    """Where the kernels leave rows of up to ``columns`` elements rounded to int8, and their scales."""

    def __init__(self, rows: int, columns: int):
        unit, group = ops.kernels.INT8_UNIT, ops.kernels.INT8_GROUP
        self.codes = torch.empty(rows, -(-columns // unit) * unit, dtype=torch.int8)
        self.scales = torch.empty(rows, -(-columns // group))


def in_int8(block: Block) -> bool:
    """Whether the kernels multiply this block's codes with rows rounded to int8."""
    weights = (block.gate_up_E2IH, block.down_EHI)
    return ops.int8_products() and all(isinstance(w, Quantized) and w.scales.stride(-1) == 1 for w in weights)


def rows_of(t: Tensor | None) -> tuple[int, int]:
    """Address of the first row of ``t`` and bytes between rows, as ``Rows`` in csrc/cpu/table.h; 0 for None
    or nothing.
    """
    if t is None or not t.numel():
        return 0, 0
    return t.data_ptr(), t.stride(0) * t.element_size()


def stack_of(weight: Tensor | Quantized) -> tuple[int, ...]:
    """A stack of weights in the order of ``Stack`` in csrc/cpu/table.h."""
    matrix = matrix_of(weight)
    if not isinstance(weight, Quantized):
        return *rows_of(matrix), matrix.stride(1), 0, 0, 0, 0
    scales, kind = weight.scales, KINDS.index(weight.kind) + 1
    return *rows_of(matrix), matrix.stride(1), *rows_of(scales), scales.stride(1), kind


def inverses_of(block: Block) -> int:
    """Rows of the larger of the weights in NF4, which the backward pass takes for rows with a scale each."""
    weights = (block.gate_up_E2IH, block.down_EHI)
    return max((w.shape[1] for w in weights if isinstance(w, Quantized) and w.kind == "nf4"), default=0)


class Table:
    """Lays out the kernels' tables of a call: a row a segment.

    Args:
        columns: elements of a row of x. factor: 1 for the forward pass, 2 for the backward pass.
    """

    def __init__(
        self, work: list[list[Segment]], columns: int, hidden: Tensor, factor: int, scaled: Tensor | None
    ):
        blocks = list({id(s.group.block): s.group.block for batch in work for s in batch}.values())
        self.index = {id(block): i for i, block in enumerate(blocks)}
        multiplied = {id(block): block for block in blocks if in_int8(block)}
        self.rooms: list[Int8Room] = []
        self.inverses = torch.empty(0)
        if multiplied:
            rows = max(sum(s.rows for s in batch) for batch in work)
            widest = max(block.width for block in multiplied.values())
            rooms = Int8Room(rows, max(columns, factor * widest)), Int8Room(rows, columns)
            self.rooms = list(rooms[:factor])
        if multiplied and factor == 2:
            counts = {name: inverses_of(block) for name, block in multiplied.items()}
            self.inverses = torch.empty(
                max(sum(counts.get(id(s.group.block), 0) for s in batch) for batch in work)
            )
        # Alive as long as the table: only addresses are kept below.
        self.buffers = hidden, scaled
        self.words = array("q")
        step = hidden.element_size()
        for block in blocks:
            rooms_of_block = self.rooms if id(block) in multiplied else []
            buffers = [room.codes for room in rooms_of_block], [room.scales for room in rooms_of_block]
            self.words.extend((*stack_of(block.gate_up_E2IH), *stack_of(block.down_EHI), block.width))
            for t in (block.tokens_N, block.scale_N, block.preact_N2I, block.dscale_N):
                self.words.extend(rows_of(t))
            self.words.extend((hidden.data_ptr(), factor * step))
            self.words.extend(rows_of(None if block.ddown_EHI is None else scaled))
            for kept in buffers:
                for i in range(2):
                    self.words.extend(rows_of(kept[i] if i < len(kept) else None))
            count = inverses_of(block) if rooms_of_block and factor == 2 else 0
            self.words.extend((self.inverses.data_ptr(), count))

    def of(self, batch: list[Segment]) -> Tensor:
        pieces = array("q")
        for s in batch:
            g = s.group
            pieces.extend((self.index[id(g.block)], g.expert, g.first + s.start, s.end - s.start, s.at))
        return ops.kernels.lay_out_segments(self.words, pieces)


def forward(x_TH: Tensor, groups: list[Group], out_TH: Tensor) -> None:
    """out += scale * E(x) for every group; ``out_TH`` is float32."""
    work = batches(groups, None, x_TH.element_size())
    scratch = make_scratch(groups, x_TH.shape[1], 1)
    # Kernels may read on behind the last row.
    hidden = ops.kernels.empty(widest_batch(work) + ops.kernels.HIDDEN_UNIT, dtype=x_TH.dtype)
    table = Table(work, x_TH.shape[1], hidden, 1, None)
    for batch in work:
        segments = table.of(batch)
        ops.kernels.up(x_TH, segments, scratch)
        ops.kernels.down(segments, out_TH, x_TH.dtype, scratch)


def backward(dy_TH: Tensor, x_TH: Tensor, groups: list[Group], dx_TH: Tensor | None) -> None:
    """Fill dscale and the weight gradients of every group; dx += their part (float32), if asked for."""
    work = batches(groups, None if dx_TH is None else cache_bytes() // 2, x_TH.element_size())
    scratch = make_scratch(groups, x_TH.shape[1], 2)
    widest = widest_batch(work)
    dz = ops.kernels.empty(2 * widest, dtype=x_TH.dtype)
    trains_down = any(g.block.ddown_EHI is not None for g in groups)
    scaled = torch.empty(widest, dtype=x_TH.dtype) if trains_down else None
    columns = ops.kernels.PARTIAL_COLUMNS
    partial = torch.empty(max((sum(s.rows * -(-s.width // columns) for s in b) for b in work), default=0))
    table = Table(work, x_TH.shape[1], dz, 2, scaled)
    for batch in work:
        segments = table.of(batch)
        ops.kernels.up_backward(x_TH, dy_TH, segments, partial, scratch)
        if dx_TH is not None:
            ops.kernels.down_backward(segments, dx_TH, x_TH.dtype, scratch)
        for s in batch:
            if s.group.block.trained:
                weight_gradients(s, dy_TH, x_TH, dz, scaled, scratch)


def weight_gradients(
    s: Segment, dy_TH: Tensor, x_TH: Tensor, dz: Tensor, scaled: Tensor | None, scratch: Any
) -> None:
    """dgate_up += dz^T x and ddown += dy^T (scale * a) over the segment's rows, where asked for."""
    g, rows = s.group, slice(s.start, s.end)
    dgate_up_2IH, ddown_HI = g.dgate_up_2IH, g.ddown_HI
    if dgate_up_2IH is not None:
        dz_n2I = dz[2 * s.at :][: 2 * s.rows * s.width].view(s.rows, 2 * s.width)
        add_gradient(g, dgate_up_2IH, dz_n2I, g.rows_of(x_TH, rows), scratch)
    if ddown_HI is not None and scaled is not None:
        scaled_nI = scaled[s.at :][: s.rows * s.width].view(s.rows, s.width)
        add_gradient(g, ddown_HI, g.rows_of(dy_TH, rows), scaled_nI, scratch)


def add_gradient(group: Group, gradient: Tensor, left_nA: Tensor, right_nB: Tensor, scratch: Any) -> None:
    """As ``Group.add_gradient``; a float32 gradient of 16-bit rows without torch's 16-bit product between."""
    wider = gradient.dtype == torch.float32 != left_nA.dtype
    if wider and gradient.is_contiguous() and ops.kernels.has_weight_gradient():
        again = group.rows > left_nA.shape[0]
        ops.kernels.weight_gradient(left_nA, right_nB, gradient, again, scratch)
    else:
        group.add_gradient(gradient, left_nA, right_nB)
