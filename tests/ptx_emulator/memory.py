"""Memory of the emulated GPU: tensors by address, and a block's shared memory with what is in flight."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from .program import PtxError

NOBODY, SEVERAL = -1, -2


class Accesses:
    """Who read and who wrote each byte since the last ``forget``: two that do not wait for each other may
    not meet at a byte that one of them writes."""

    def __init__(self, size: int):
        self.reader = np.full(size, NOBODY, np.int32)
        self.writer = np.full(size, NOBODY, np.int32)

    def read(self, at: np.ndarray, who: np.ndarray | int) -> bool:
        """Notes a read of the bytes; whether another one wrote one of them."""
        wrote, read = self.writer[at], self.reader[at]
        self.reader[at] = np.where((read == NOBODY) | (read == who), who, SEVERAL)
        return bool(((wrote != NOBODY) & (wrote != who)).any())

    def write(self, at: np.ndarray, who: np.ndarray | int) -> bool:
        """Notes a write; whether another one read or wrote one of the bytes."""
        wrote, read = self.writer[at], self.reader[at]
        self.writer[at] = who
        return bool((((wrote != NOBODY) & (wrote != who)) | ((read != NOBODY) & (read != who))).any())

    def forget(self) -> None:
        self.reader.fill(NOBODY)
        self.writer.fill(NOBODY)


class GlobalMemory:
    """The storages of tensors, found by address. An address outside of them is an error, and so is a byte
    that two blocks exchange within a launch."""

    def __init__(self, tensors: Iterator[Tensor]):
        sizes: dict[int, int] = {}
        for t in tensors:
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), storage.nbytes())
        self.starts = sorted(start for start, size in sizes.items() if size)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * sizes[start]).from_address(start))
            for start in self.starts
        ]
        self.accesses = [Accesses(len(b)) for b in self.bytes]

    def places(self, addresses: np.ndarray, width: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(storage, which of the addresses, their bytes [n, width]) for each storage that is met."""
        if (addresses % np.uint64(width)).any():
            raise PtxError(f"an address that is no multiple of {width} bytes")
        index = np.searchsorted(np.array(self.starts, np.uint64), addresses, side="right") - 1
        for i in np.unique(index):
            chosen = np.flatnonzero(index == i)
            offsets = (addresses[chosen] - np.uint64(self.starts[i] if i >= 0 else 0)).astype(np.int64)
            if i < 0 or (offsets + width > len(self.bytes[i])).any():
                raise PtxError("an address outside of every tensor")
            yield int(i), chosen, offsets[:, None] + np.arange(width)

    def load(self, addresses: np.ndarray, width: int, block: int) -> np.ndarray:
        """[n, width] bytes."""
        out = np.empty((len(addresses), width), np.uint8)
        for i, chosen, at in self.places(addresses, width):
            if self.accesses[i].read(at, block):
                raise PtxError("reads what another block of the same launch writes")
            out[chosen] = self.bytes[i][at]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, block: int) -> None:
        for i, chosen, at in self.places(addresses, values.shape[1]):
            if self.accesses[i].write(at, block):
                raise PtxError("writes what another block of the same launch reads or writes")
            self.bytes[i][at] = values[chosen]

    def storage_of(self, address: int, size: int) -> tuple[int, int]:
        """(storage, offset) of ``size`` bytes."""
        i = bisect.bisect_right(self.starts, address) - 1
        if i < 0 or address + size > self.starts[i] + len(self.bytes[i]):
            raise PtxError("a tensor copy outside of every tensor")
        return i, address - self.starts[i]


class SharedMemory:
    """A block's shared memory, NaN until written.

    Attributes:
        coming: bytes of an asynchronous copy that nobody has waited for.
        reading: how many matrix products in flight read a byte.
        unfenced: bytes written by threads that the tensor cores' own path to memory may not see yet.
        accesses: by warp, since the last barrier.
    """

    def __init__(self, size: int):
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.coming = np.zeros(size, bool)
        self.reading = np.zeros(size, np.int16)
        self.unfenced = np.zeros(size, bool)
        self.accesses = Accesses(size)

    def at(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """[n, width] places; addresses are those of the program's shared window, which starts at 0."""
        if (addresses % width).any():
            raise PtxError(f"a shared address that is no multiple of {width} bytes")
        at = addresses.astype(np.int64)[:, None] + np.arange(width)
        if at.size and at.max() >= len(self.bytes):
            raise PtxError("a shared address beyond the block's shared memory")
        return at

    def load(self, addresses: np.ndarray, width: int, warps: np.ndarray) -> np.ndarray:
        at = self.at(addresses, width)
        if self.coming[at].any():
            raise PtxError("reads what an asynchronous copy is still writing")
        if self.accesses.read(at, warps[:, None]):
            raise PtxError("reads what another warp wrote, without a barrier between")
        return self.bytes[at]

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        at = self.at(addresses, values.shape[1])
        self.claim(at, warps[:, None])
        self.bytes[at] = values
        self.unfenced[at] = True

    def claim(self, at: np.ndarray, who: np.ndarray | int) -> None:
        """Before bytes are written, at once or later."""
        if self.reading[at].any():
            raise PtxError("overwrites what a matrix product in flight still reads")
        if self.coming[at].any():
            raise PtxError("overwrites what an asynchronous copy is still writing")
        if self.accesses.write(at, who):
            raise PtxError("overwrites what another warp reads or writes, without a barrier between")

    def read_by_matrix_unit(self, at: np.ndarray) -> np.ndarray:
        if at.max() >= len(self.bytes):
            raise PtxError("a matrix descriptor beyond the block's shared memory")
        if self.coming[at].any():
            raise PtxError("multiplies what an asynchronous copy is still writing")
        # Four warps read together: what one of them wrote is another's to the others.
        if (self.accesses.writer[at] != NOBODY).any():
            raise PtxError("multiplies what a warp wrote, without a barrier between")
        if self.unfenced[at].any():
            raise PtxError("multiplies what threads wrote without fence.proxy.async")
        return self.bytes[at]
