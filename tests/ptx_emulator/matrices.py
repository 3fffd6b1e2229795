"""Matrix instructions: mma.sync, and wgmma with its descriptors of shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import bfloat_to_float
from .block import WARP, Block
from .program import Instruction, PtxError, Vector
from .transfers import swizzled

# The swizzle that bits 62 and 63 of a matrix descriptor name, in bytes.
DESCRIBED_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}
GROUP = 4 * WARP


def values_of(words: np.ndarray, kind: str) -> np.ndarray:
    """float32 of 16-bit elements."""
    if kind == "bf16":
        return bfloat_to_float(words)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    raise PtxError(f"products of {kind} are not known")


def pairs(block: Block, operand: Any) -> np.ndarray:
    """[warps, lanes, registers, 2] 16-bit elements."""
    registers = [block.bits(p, 4).reshape(-1, WARP, 1) for p in block.vector(operand)]
    return (
        np.ascontiguousarray(np.concatenate(registers, axis=2))
        .view(np.uint16)
        .reshape(-1, WARP, len(registers), 2)
    )


def rows_of_a(words: np.ndarray) -> np.ndarray:
    """[warps, 16, 16] from the four registers of each lane: quarters (row, column) 00, 10, 01, 11."""
    at = words.reshape(-1, 8, 4, 2, 2, 2)  # warp, row, column pair, column half, row half, element
    return np.ascontiguousarray(at.transpose(0, 4, 1, 3, 2, 5)).reshape(-1, 16, 16)


def multiply_warp(block: Block, one: Instruction) -> None:
    """mma.sync.m16n8k16: A by rows, B by columns."""
    out, a, b, c = one.operands
    if one.kinds[3] != "m16n8k16" or one.kinds[4:6] != ["row", "col"] or one.kinds[6] != "f32":
        raise PtxError("this product is not known")
    a_WMK = values_of(rows_of_a(pairs(block, a)), one.kinds[7])
    # A lane holds column lane / 4 of B, rows in pairs: half of them in each register.
    b_words = pairs(block, b).reshape(-1, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1)
    b_WKN = values_of(np.ascontiguousarray(b_words).reshape(-1, 16, 8), one.kinds[8])
    sums = np.matmul(a_WMK, b_WKN).reshape(-1, 2, 8, 4, 2)  # warp, row half, row, column pair, element
    for i, (register, before) in enumerate(zip(block.vector(out), block.vector(c))):
        part = sums[:, i // 2, :, :, i % 2].reshape(-1)
        block.write(register, (part + block.read(before, "f32")).astype(np.float32))


@dataclass
class Product:
    """A wgmma in flight: the shared memory that it reads, and the registers that it reads or will write."""

    reads: list[np.ndarray]
    registers: list[str]


def described(descriptor: int, rows: int, across: bool) -> np.ndarray:
    """[rows, 16] byte addresses of the 16-bit elements of a matrix with 16 along the reduction.

    ``across``: rows, not the reduction, are contiguous. Source: PTX ISA, "Matrix descriptor" and canonical
    layouts; offsets are in bytes. Elements of one swizzle row (32, 64 or 128 bytes) lie beside each
    other, eight such rows make an atom.
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    width = DESCRIBED_SWIZZLE[descriptor >> 62 & 3]
    if not width or descriptor >> 49 & 7:
        raise PtxError("this matrix descriptor is not known")
    r, k = np.arange(rows)[:, None], np.arange(16)[None]
    if across:
        wide = width // 2
        offset = r // wide * leading + r % wide * 2 + k % 8 * width + k // 8 * stride
    else:
        offset = r // 8 * stride + r % 8 * width + k * 2
    return swizzled(start + offset, width)


def multiply_group(block: Block, one: Instruction) -> None:
    """wgmma.mma_async: 64 rows a group of four warps. B, and A unless in registers, from shared memory."""
    out, a, b, accumulate, *settings = one.operands
    shape = re.fullmatch(r"m64n(\d+)k16", one.kinds[4])
    if shape is None or one.kinds[5] != "f32":
        raise PtxError("this product is not known")
    columns, registers = int(shape[1]), block.vector(out)
    flags = [s.bits for s in settings]
    if flags[:2] != [1, 1]:
        raise PtxError("a negated operand")
    from_registers = isinstance(a, Vector)
    a_across, b_across = (0, flags[2]) if from_registers else flags[2:4]
    keep = block.predicate(accumulate)
    if keep.any() != keep.all():
        raise PtxError("threads that disagree")
    reads = []
    if from_registers:
        rows = values_of(rows_of_a(pairs(block, a)), one.kinds[6]).reshape(-1, 64, 16)
    product = []
    for group in range(block.threads // GROUP):
        first = group * GROUP
        if from_registers:
            a_MK = rows[group]
        else:
            a_MK, at = from_shared(block, a, first, 64, bool(a_across), one.kinds[6])
            reads.append(at)
        b_NK, at = from_shared(block, b, first, columns, bool(b_across), one.kinds[7])
        reads.append(at)
        product.append(a_MK @ b_NK.T)
    # Group, warp, row half, row, column block, column pair, element.
    sums = np.stack(product).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
    flying, block.flying = block.flying, {}
    for i, register in enumerate(registers):
        part = sums[:, :, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
        if keep.all():
            part = part + block.read(register, "f32")
        block.write(register, np.ascontiguousarray(part, np.float32))
    block.flying = flying
    for at in reads:
        block.shared.reading[at] += 1
    names = [r.name for r in (*registers, *(a.parts if from_registers else ()))]
    block.products.append(Product(reads, names))
    for name in names:
        block.flying[name] = block.flying.get(name, 0) + 1


def from_shared(
    block: Block, operand: Any, thread: int, rows: int, across: bool, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """(values [rows, 16], their bytes) of a described matrix."""
    descriptor = int(block.bits(operand, 8)[thread])
    at = described(descriptor, rows, across)[..., None] + np.arange(2)
    words = np.ascontiguousarray(block.shared.read_by_matrix_unit(at)).view(np.uint16)[..., 0]
    return values_of(words, kind), at


def group_of_products(block: Block, one: Instruction) -> None:
    action = one.kinds[1]
    if action == "mma_async":
        multiply_group(block, one)
    elif action == "commit_group":
        block.product_groups.append(block.products)
        block.products = []
    elif action == "wait_group":
        while len(block.product_groups) > one.operands[0].bits:
            for product in block.product_groups.pop(0):
                for at in product.reads:
                    block.shared.reading[at] -= 1
                for name in product.registers:
                    block.flying[name] -= 1
                    if not block.flying[name]:
                        del block.flying[name]
    elif action != "fence":
        raise PtxError("not known")


TABLE = {"mma": multiply_warp, "wgmma": group_of_products}
