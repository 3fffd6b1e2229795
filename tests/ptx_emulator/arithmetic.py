"""Instructions on registers alone: integers, floats, conversions, choices, exchanges within a warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .block import TYPES, WARP, Block
from .program import Instruction, PtxError, Vector

Execute = Callable[[Block, Instruction], None]


def bfloat_to_float(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def float_to_bfloat(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; NaN as the chip writes it."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; what a GPU leaves open after a division by zero is -1."""
    wide, divisor = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    found = np.sign(wide) * np.sign(divisor) * (np.abs(wide) // np.abs(divisor))
    return np.where(b == 0, -1, found).astype(a.dtype)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.dtype(f"{a.dtype.kind}8")
    return (a.astype(wide) * b.astype(wide) >> 32).astype(a.dtype)


BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "div": lambda a, b: np.divide(a, b) if a.dtype.kind == "f" else quotient(a, b),
    "rem": lambda a, b: a - quotient(a, b) * b,
}
UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
}
COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~unordered(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,
    "equ": lambda a, b: (a == b) | unordered(a, b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~unordered(a, b),
    "nan": lambda a, b: unordered(a, b),
}


def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), bool)


def arithmetic(block: Block, one: Instruction) -> None:
    name, kinds = one.kinds[0], one.kinds
    kind = kinds[-1]
    if kind in ("bf16x2", "f16x2"):
        words = [block.read(o, "u32") for o in one.operands[1:]]
        low, up = ([half(word >> shift, kind) for word in words] for shift in (0, 16))
        halves = [half_bits(BINARY[name](*pair), kind).astype(np.uint32) for pair in (low, up)]
        block.write(one.operands[0], halves[0] | halves[1] << 16)
        return
    if name == "mul" and kinds[1] in ("wide", "hi"):
        a, b = (block.read(o, kind) for o in one.operands[1:])
        block.write(one.operands[0], widened(a) * widened(b) if kinds[1] == "wide" else high(a, b))
        return
    # float32 has more than twice the bits: what it rounds first is rounded to bfloat16 as if at once.
    values = [number(block, o, kind) for o in one.operands[1:]]
    found = BINARY[name](*values) if len(values) == 2 else UNARY[name](*values)
    block.write(one.operands[0], float_to_bfloat(found) if kind == "bf16" else found)


def number(block: Block, operand: object, kind: str) -> np.ndarray:
    """As :meth:`Block.read`, bfloat16 as float32."""
    return bfloat_to_float(block.read(operand, "u16")) if kind == "bf16" else block.read(operand, kind)


def half(word: np.ndarray, kind: str) -> np.ndarray:
    """The lower 16 bits as float32 or float16."""
    bits = word.astype(np.uint16)
    return bfloat_to_float(bits) if kind.startswith("bf16") else bits.view(np.float16)


def half_bits(values: np.ndarray, kind: str) -> np.ndarray:
    return float_to_bfloat(values) if kind.startswith("bf16") else values.view(np.uint16)


def widened(a: np.ndarray) -> np.ndarray:
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def multiply_add(block: Block, one: Instruction) -> None:
    out, a, b, c = one.operands
    kind = one.kinds[-1]
    if one.kinds[0] == "fma":
        x, y, z = (number(block, o, kind).astype(np.float64) for o in (a, b, c))
        found = (x * y + z).astype(np.float32)
        if kind == "bf16":
            if (np.isfinite(found) & (found != x * y + z)).any():
                raise PtxError("a sum of bfloat16 that would be rounded twice here")
            found = float_to_bfloat(found)
        block.write(out, found)
        return
    x, y = block.read(a, kind), block.read(b, kind)
    if one.kinds[1] == "wide":
        x, y = widened(x), widened(y)
        kind = f"{kind[0]}{2 * int(kind[1:])}"
    block.write(out, x * y + block.read(c, kind))


def shift(block: Block, one: Instruction) -> None:
    out, a, b = one.operands
    kind = one.kinds[-1]
    value, by = block.read(a, kind), block.read(b, "u32")
    bits = 8 * value.itemsize
    inside = np.minimum(by, bits - 1).astype(value.dtype)
    if one.kinds[0] == "shl":
        shifted = np.where(by >= bits, 0, value << inside)
    else:
        beyond = value >> (bits - 1) if value.dtype.kind == "i" else np.zeros_like(value)
        shifted = np.where(by >= bits, beyond, value >> inside)
    block.write(out, shifted.astype(value.dtype))


def compare(block: Block, one: Instruction) -> None:
    out, a, b = one.operands
    how, kind = one.kinds[1], one.kinds[-1]
    block.write(out, COMPARE[how](block.read(a, kind), block.read(b, kind)))


def select(block: Block, one: Instruction) -> None:
    out, a, b, p = one.operands
    kind = one.kinds[-1]
    block.write(out, np.where(block.predicate(p), block.read(a, kind), block.read(b, kind)))


def move(block: Block, one: Instruction) -> None:
    out, source = one.operands
    kind = one.kinds[-1]
    if isinstance(out, Vector):
        value, bits = block.read(source, kind), 8 * TYPES[kind].itemsize // len(out.parts)
        for i, part in enumerate(out.parts):
            block.write(part, (value >> (i * bits)).astype(f"u{max(1, bits // 8)}"))
    elif isinstance(source, Vector):
        bits = 8 * TYPES[kind].itemsize // len(source.parts)
        value = np.zeros(block.threads, TYPES[kind])
        for i, part in enumerate(source.parts):
            value |= block.bits(part, bits // 8).astype(value.dtype) << (i * bits)
        block.write(out, value)
    else:
        block.write(out, block.read(source, kind).copy())


def convert(block: Block, one: Instruction) -> None:
    target, source = one.kinds[-2:]
    out, *values = one.operands
    if target == "bf16x2":
        upper, lower = (float_to_bfloat(block.read(v, "f32")).astype(np.uint32) for v in values)
        block.write(out, upper << 16 | lower)
        return
    if target == "f16x2":
        upper, lower = (
            block.read(v, "f32").astype(np.float16).view(np.uint16).astype(np.uint32) for v in values
        )
        block.write(out, upper << 16 | lower)
        return
    value = block.read(values[0], "u16" if source == "bf16" else source)
    if source == "bf16":
        value = bfloat_to_float(value)
    if target == "bf16":
        block.write(out, float_to_bfloat(value))
    elif target[0] != "f" and source[0] in "fb" and source != "b32":
        raise PtxError("this conversion is not known")
    elif target in ("s8", "u8"):
        # A register is wider: the rest of it is filled as the type says.
        block.write(out, value.astype(TYPES[target]).astype(f"{TYPES[target].kind}2"))
    else:
        block.write(out, value.astype(TYPES[target]))


def bit_field(block: Block, one: Instruction) -> None:
    out, a, start, length = one.operands
    kind = one.kinds[-1]
    value, first, count = block.read(a, kind), block.read(start, "u32"), block.read(length, "u32")
    bits = 8 * value.itemsize
    if ((first + count > bits) | (count == 0)).any():
        raise PtxError("a bit field beyond the register")
    # To the left edge and back: of a signed type the copies of its highest bit come with it.
    left = value << (bits - first - count).astype(value.dtype)
    block.write(out, left >> (bits - count).astype(value.dtype))


def permute_bytes(block: Block, one: Instruction) -> None:
    out, a, b, selector = one.operands
    low, up, chosen = block.read(a, "u32"), block.read(b, "u32"), block.read(selector, "u32")
    both = up.astype(np.uint64) << np.uint64(32) | low
    value = np.zeros(block.threads, np.uint32)
    for i in range(4):
        pick = chosen >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (pick & 7)).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(pick & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        value |= byte << np.uint32(8 * i)
    block.write(out, value)


def shuffle(block: Block, one: Instruction) -> None:
    out, a, b, clamp, mask = one.operands
    if one.kinds[-1] != "b32" or clamp.bits != 31 or mask.bits != -1:
        raise PtxError("only exchanges of a whole warp are known")
    if block.guard is not None:
        raise PtxError("an exchange by some threads of a warp")
    lane, by = block.lanes, block.read(b, "u32").astype(np.int64)
    source = {"bfly": lane ^ by, "idx": by, "up": lane - by, "down": lane + by}[one.kinds[2]]
    source = np.where((source < 0) | (source >= WARP), lane, source)
    value = block.read(a, "b32")[block.warps * WARP + source]
    target, *flag = block.vector(out)
    block.write(target, value)
    for f in flag:
        block.write(f, block.everyone)


def elect(block: Block, one: Instruction) -> None:
    target, flag = block.vector(one.operands[0])
    block.write(target, np.zeros(block.threads, np.uint32))
    block.write(flag, block.lanes == 0)


def add_up_warp(block: Block, one: Instruction) -> None:
    out, a, _ = one.operands
    value = block.read(a, one.kinds[-1])
    sums = value.reshape(-1, WARP).sum(axis=1, dtype=value.dtype)
    block.write(out, np.repeat(sums, WARP))


TABLE: dict[str, Execute] = {name: arithmetic for name in (*BINARY, *UNARY)}
TABLE |= {"fma": multiply_add, "mad": multiply_add, "shl": shift, "shr": shift, "setp": compare}
TABLE |= {"selp": select, "mov": move, "cvt": convert, "cvta": move, "bfe": bit_field}
TABLE |= {"prmt": permute_bytes, "shfl": shuffle, "elect": elect, "redux": add_up_warp}
