"""Instructions that move data: loads, stores, asynchronous copies, tensor copies, and what waits for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton

from .block import TYPES, WARP, Block
from .memory import NOBODY
from .program import Instruction, Number, PtxError

# Triton before 3.7.1 leaves out the proxy fence between threads' asynchronous copies and the products that
# read them (mended by triton-lang/triton#10537): nothing to find in this package's kernels.
TRITON_FENCES_COPIES = tuple(map(int, triton.__version__.split("+")[0].split(".")[:3])) >= (3, 7, 1)
# Which 16-byte piece of 128 bytes a swizzle of so many bytes exchanges: by the bits three above.
SWIZZLES = {0: 0, 32: 1, 64: 3, 128: 7}


def swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    return addresses ^ ((addresses >> 7 & SWIZZLES[width]) << 4)


def as_bytes(values: list[np.ndarray]) -> np.ndarray:
    """[n, bytes] of several arrays side by side."""
    return np.concatenate(
        [np.ascontiguousarray(v).view(np.uint8).reshape(len(v), v.itemsize) for v in values], axis=1
    )


def load(block: Block, one: Instruction) -> None:
    out, source = one.operands
    space, kind = one.kinds[1], one.kinds[-1]
    if space == "param":
        value = block.values[source.base.name]
        if source.offset:
            raise PtxError("a part of a parameter")
        block.write(out, np.full(block.threads, value, TYPES[kind.replace("f", "b")]))
        return
    parts, size = block.vector(out), TYPES[kind].itemsize
    width, chosen = size * len(parts), np.flatnonzero(block.active)
    if space == "global":
        addresses = block.addresses(source, 8)
        found = block.memory.load(addresses[chosen], width, block.index)
    elif space == "shared":
        addresses = block.addresses(source, 4)
        found = block.shared.load(addresses[chosen], width, block.warps[chosen])
    else:
        raise PtxError(f"{space} memory is not known")
    for i, part in enumerate(parts):
        value = np.zeros(block.threads, f"u{size}")
        value[chosen] = np.ascontiguousarray(found[:, i * size : (i + 1) * size]).view(f"u{size}")[:, 0]
        if kind == "s8":
            value = value.view(np.int8).astype(np.int16)
        block.write(part, value)


def store(block: Block, one: Instruction) -> None:
    target, source = one.operands
    space, size = one.kinds[1], TYPES[one.kinds[-1]].itemsize
    chosen = np.flatnonzero(block.active)
    values = as_bytes([block.bits(p, size)[chosen] for p in block.vector(source)])
    if space == "global":
        block.memory.store(block.addresses(target, 8)[chosen], values, block.index)
    elif space == "shared":
        block.shared.store(block.addresses(target, 4)[chosen], values, block.warps[chosen])
    else:
        raise PtxError(f"{space} memory is not known")


def matrix_rows(block: Block, one: Instruction, address: Any) -> tuple[np.ndarray, np.ndarray]:
    """(warps, [warps, matrices, 8] addresses of rows of 16 bytes), given by the first lanes of each warp."""
    count = int(next(k for k in one.kinds if k in ("x1", "x2", "x4"))[1:])
    given = block.addresses(address, 4).reshape(-1, WARP)[:, : 8 * count]
    return np.arange(len(given), dtype=np.int32), given.reshape(-1, count, 8)


def load_matrices(block: Block, one: Instruction) -> None:
    """ldmatrix: 8 x 8 matrices of 16-bit elements; thread i gets two elements of row i / 4, or of column."""
    warps, rows = matrix_rows(block, one, one.operands[1])
    bytes_ = block.shared.load(rows.reshape(-1), 16, np.repeat(warps, rows[0].size))
    words = bytes_.view(np.uint16).reshape(*rows.shape, 8)
    if "trans" in one.kinds:
        words = words.swapaxes(2, 3)
    pairs = np.ascontiguousarray(words).view(np.uint32).reshape(len(warps), rows.shape[1], WARP)
    for i, part in enumerate(block.vector(one.operands[0])):
        block.write(part, pairs[:, i].reshape(-1).copy())


def store_matrices(block: Block, one: Instruction) -> None:
    """stmatrix: as ldmatrix the other way."""
    warps, rows = matrix_rows(block, one, one.operands[0])
    parts = [block.bits(p, 4).reshape(-1, 1, WARP) for p in block.vector(one.operands[1])]
    words = np.ascontiguousarray(np.concatenate(parts, axis=1)).view(np.uint16).reshape(*rows.shape, 8)
    if "trans" in one.kinds:
        words = words.swapaxes(2, 3)
    values = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 16)
    block.shared.store(rows.reshape(-1), values, np.repeat(warps, rows[0].size))


@dataclass
class Copy:
    """Bytes on their way to shared memory: read at once, there when the program has waited.

    ``warps``: of each row of bytes, the warp whose thread copies it; None for the copy engine. What a thread
    copies others may read after a barrier behind its wait; what the engine copies, after their own wait.
    """

    at: np.ndarray
    values: np.ndarray
    warps: np.ndarray | None

    def land(self, block: Block) -> None:
        shared, by_threads = block.shared, self.warps is not None
        shared.coming[self.at] = False
        shared.bytes[self.at] = self.values
        shared.unfenced[self.at] = by_threads and TRITON_FENCES_COPIES
        shared.accesses.writer[self.at] = self.warps[:, None] if by_threads else NOBODY


def copy_async(block: Block, one: Instruction) -> None:
    """cp.async: 4, 8 or 16 bytes a thread; beyond the size read, zeros."""
    target, source, size, *given = one.operands
    chosen, size = np.flatnonzero(block.active), size.bits
    read = block.read(given[0], "u32")[chosen] if given else np.full(len(chosen), size)
    at = block.shared.at(block.addresses(target, 4)[chosen], size)
    values = np.zeros((len(chosen), size), np.uint8)
    addresses = block.addresses(source, 8)[chosen]
    if not np.isin(read, (0, size)).all():
        raise PtxError("a copy of a part")
    there = np.flatnonzero(read)
    values[there] = block.memory.load(addresses[there], size, block.index)
    block.shared.claim(at, block.warps[chosen][:, None])
    block.shared.coming[at] = True
    block.copies.append(Copy(at, values, block.warps[chosen]))


def commit_copies(block: Block, one: Instruction) -> None:
    block.copy_groups.append(block.copies)
    block.copies = []


def wait_for_copies(block: Block, one: Instruction) -> None:
    most = one.operands[0].bits if one.operands else 0
    while len(block.copy_groups) > most:
        for copy in block.copy_groups.pop(0):
            copy.land(block)


@dataclass(frozen=True)
class TensorMap:
    """What the copy engine knows of a tensor: sizes and strides from the outermost dimension, in elements.

    ``swizzle``: bytes; ``box``: elements that one copy moves.
    """

    address: int
    element: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def check(self) -> None:
        """What cuTensorMapEncodeTiled refuses. Raises PtxError."""
        inner = self.box[-1] * self.element
        wrong = {
            "address": self.address % 16,
            "strides": self.strides[-1] != 1 or any(s * self.element % 16 for s in self.strides[:-1]),
            "box": max(self.box) > 256 or inner % 16 or inner > (self.swizzle or 256 * self.element),
            "rank": not 1 <= len(self.sizes) <= 5,
            "sizes": any(not 0 < s <= 2**32 for s in self.sizes),
        }
        for name, found in wrong.items():
            if found:
                raise PtxError(f"no tensor map with this {name}: {self}")

    def load(self, block: Block, start: list[int]) -> np.ndarray:
        """The box at ``start`` as bytes, in the order of its elements; zeros outside of the tensor."""
        grids = np.meshgrid(*(np.arange(s, s + n) for s, n in zip(start, self.box)), indexing="ij")
        inside = np.ones(self.box, bool)
        offset = np.zeros(self.box, np.int64)
        for grid, size, stride in zip(grids, self.sizes, self.strides):
            inside &= (grid >= 0) & (grid < size)
            offset += grid * stride
        out = np.zeros((inside.size, self.element), np.uint8)
        addresses = (self.address + offset[inside] * self.element).astype(np.uint64)
        out[inside.reshape(-1)] = block.memory.load(addresses, self.element, block.index)
        return out.reshape(-1)


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes are there."""

    count: int
    phase: int = 0
    arrived: int = 0
    bytes: int = 0
    copies: list[Copy] = field(default_factory=list)

    def settle(self, block: Block) -> None:
        for copy in self.copies:
            copy.land(block)
            self.bytes -= copy.at.size
        self.copies = []
        if self.arrived == self.count and not self.bytes:
            self.phase, self.arrived = self.phase + 1, 0


def one_thread(block: Block) -> int | None:
    chosen = np.flatnonzero(block.active)
    if len(chosen) > 1:
        raise PtxError("by more than one thread")
    return int(chosen[0]) if len(chosen) else None


def barrier_at(block: Block, operand: Any, thread: int) -> Barrier:
    address = int(block.addresses(operand, 4)[thread])
    if address not in block.barriers:
        raise PtxError(f"no mbarrier at {address}")
    return block.barriers[address]


def copy_tensor(block: Block, one: Instruction) -> None:
    """cp.async.bulk.tensor: boxes of a tensor, one a thread, to shared memory, reported to an mbarrier."""
    target, source, report = one.operands
    maps, targets = block.bits(source.base, 8), block.addresses(target, 4)
    # Coordinates start with the innermost dimension.
    places = [block.read(c, "s32") for c in reversed(source.coordinates.parts)]
    for thread in np.flatnonzero(block.active):
        tensor = block.parameter_at(int(maps[thread]))
        if len(places) != len(tensor.sizes):
            raise PtxError("as many coordinates as dimensions")
        values, first = tensor.load(block, [int(p[thread]) for p in places]), int(targets[thread])
        if first % 128:
            raise PtxError("a tensor copy to an address that is no multiple of 128 bytes")
        at = swizzled(np.arange(first, first + len(values)), tensor.swizzle)
        if at.max() >= len(block.shared.bytes):
            raise PtxError("a tensor copy beyond the block's shared memory")
        block.shared.claim(at, int(block.warps[thread]))
        block.shared.coming[at] = True
        barrier_at(block, report, thread).copies.append(Copy(at, values, None))


def barrier_of_copies(block: Block, one: Instruction) -> None:
    action = one.kinds[1]
    if action == "try_wait":
        done, place, parity = one.operands
        addresses = block.addresses(place, 4)
        if (addresses != addresses[0]).any():
            raise PtxError("threads that wait for different barriers")
        barrier = barrier_at(block, place, 0)
        barrier.settle(block)
        over = barrier.phase % 2 != block.read(parity, "u32")
        if not over.all():
            raise PtxError("waits for copies that nobody started")
        block.write(done, over)
        return
    if action == "arrive":
        thread = one_thread(block)
        if thread is not None:
            barrier = barrier_at(block, one.operands[1], thread)
            barrier.settle(block)
            barrier.arrived += 1
            barrier.bytes += one.operands[2].bits
            if barrier.arrived > barrier.count:
                raise PtxError("more arrivals than the barrier counts")
        return
    thread = one_thread(block)
    if thread is None:
        return
    address = int(block.addresses(one.operands[0], 4)[thread])
    if action == "init":
        block.barriers[address] = Barrier(one.operands[1].bits)
    elif action == "inval":
        if block.barriers.pop(address).copies:
            raise PtxError("copies are still on their way")
    else:
        raise PtxError("not known")


def synchronize(block: Block, one: Instruction) -> None:
    """bar.sync: what was read and written before it is settled. Between warps alone: a warp has no races with
    itself here."""
    if one.kinds[1] == "warp":
        return
    if block.guard is not None or one.operands != (Number(0),):
        raise PtxError("a barrier of some of the threads")
    block.shared.accesses.forget()


def fence(block: Block, one: Instruction) -> None:
    if one.kinds[1:3] != ["proxy", "async"]:
        raise PtxError("this fence is not known")
    block.shared.unfenced.fill(False)


def copy_instruction(block: Block, one: Instruction) -> None:
    kinds = one.kinds
    if kinds[2] == "commit_group":
        commit_copies(block, one)
    elif kinds[2] == "wait_group":
        wait_for_copies(block, one)
    elif kinds[2] == "bulk":
        copy_tensor(block, one)
    elif kinds[2] in ("ca", "cg"):
        copy_async(block, one)
    else:
        raise PtxError("this copy is not known")


TABLE = {"ld": load, "st": store, "ldmatrix": load_matrices, "stmatrix": store_matrices}
TABLE |= {"cp": copy_instruction, "mbarrier": barrier_of_copies, "bar": synchronize, "fence": fence}
