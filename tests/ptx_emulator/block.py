"""A block of threads that takes one instruction at a time, all threads together.

Registers hold raw bits, one array element a thread. Branches must be taken by all threads or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import GlobalMemory, SharedMemory
from .program import Address, Instruction, Number, Program, PtxError, Register, Symbol, Vector

TYPES = {
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64) for kind in "ub"},
    "f32": np.dtype("f4"),
    "f16": np.dtype("f2"),
    "f64": np.dtype("f8"),
    "pred": np.dtype("bool"),
}
# What parameters' addresses start at: no address of anything else.
PARAMETER_WINDOW = 0xF000_0000
# What a register holds before it is written: NaN. A compiler may read one whose value does not matter.
UNDEFINED = 2**64 - 1
WARP = 32


class Block:
    """The state of one block (CTA).

    Attributes:
        values: of the kernel's parameters, by name: numbers and addresses, or a TensorMap.
        flying: registers that matrix products in flight read or will write, and how many do.
        hazards: texts of instructions that touched such a register before it was there.
    """

    def __init__(
        self,
        program: Program,
        values: dict[str, Any],
        memory: GlobalMemory,
        shared_bytes: int,
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
    ):
        n = program.threads
        self.program, self.values, self.memory = program, values, memory
        self.threads, self.shared = n, SharedMemory(shared_bytes)
        self.lanes, self.warps = np.arange(n) % WARP, (np.arange(n) // WARP).astype(np.int32)
        self.index = index[0] + grid[0] * (index[1] + grid[1] * index[2])
        self.registers: dict[str, np.ndarray] = {"%tid.x": np.arange(n, dtype=np.uint32)}
        for name, place in (("%ctaid", index), ("%nctaid", grid)):
            for axis, value in zip("xyz", place):
                self.registers[f"{name}.{axis}"] = np.full(n, value, np.uint32)
        self.pc = 0
        self.guard: np.ndarray | None = None
        self.everyone = np.ones(n, bool)
        self.copies: list[Any] = []
        self.copy_groups: list[list[Any]] = []
        self.barriers: dict[int, Any] = {}
        self.products: list[Any] = []
        self.product_groups: list[list[Any]] = []
        self.flying: dict[str, int] = {}
        self.hazards: list[str] = []
        self.instruction: Instruction | None = None

    @property
    def active(self) -> np.ndarray:
        return self.everyone if self.guard is None else self.guard

    def bits(self, operand: object, size: int) -> np.ndarray:
        """The operand's raw bits, ``size`` bytes an element."""
        kind = np.dtype(f"u{size}")
        if isinstance(operand, Register):
            if self.flying and operand.name in self.flying:
                self.hazards.append(self.instruction.text if self.instruction else "")
            found = self.registers.get(operand.name)
            if found is None:
                found = np.full(self.threads, UNDEFINED & (2 ** (8 * size) - 1), kind)
            if found.dtype == bool:
                raise PtxError(f"{operand.name} is a predicate")
            return found if found.dtype == kind else found.astype(kind)
        if isinstance(operand, Number):
            return np.full(self.threads, operand.bits & ((1 << 8 * size) - 1), kind)
        if isinstance(operand, Symbol):
            return np.full(self.threads, self.address_of(operand), kind)
        raise PtxError(f"{operand} is no value")

    def read(self, operand: object, kind: str) -> np.ndarray:
        if kind == "pred":
            return self.predicate(operand)
        dtype = TYPES[kind]
        return self.bits(operand, dtype.itemsize).view(dtype)

    def predicate(self, operand: object) -> np.ndarray:
        if isinstance(operand, Number):
            return np.full(self.threads, bool(operand.bits))
        found = self.registers[operand.name]  # type: ignore[union-attr]
        if found.dtype != bool:
            raise PtxError(f"{operand} is no predicate")
        return found

    def write(self, operand: object, value: np.ndarray) -> None:
        """Floats as their bits; where the instruction has a guard, for its threads alone."""
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is no register")
        if operand.name == "_":
            return
        if self.flying and operand.name in self.flying:
            self.hazards.append(self.instruction.text if self.instruction else "")
        if value.dtype.kind == "f" or value.dtype.kind == "i":
            value = value.view(f"u{value.dtype.itemsize}")
        if self.guard is not None:
            before = self.registers.get(operand.name)
            if before is None:
                before = np.zeros(self.threads, value.dtype)
            if before.dtype != value.dtype:
                before = before.astype(value.dtype)
            value = np.where(self.guard, value, before)
        self.registers[operand.name] = value

    def address_of(self, symbol: Symbol) -> int:
        """Shared memory starts at 0; a parameter has an address of its own."""
        if symbol.name in self.values:
            return PARAMETER_WINDOW + 256 * self.program.parameters.index(symbol.name)
        return 0

    def parameter_at(self, address: int) -> Any:
        place, beyond = divmod(int(address) - PARAMETER_WINDOW, 256)
        if beyond or not 0 <= place < len(self.program.parameters):
            raise PtxError("a tensor map that is no parameter")
        return self.values[self.program.parameters[place]]

    def addresses(self, operand: Address, size: int) -> np.ndarray:
        return self.bits(operand.base, size) + np.array(operand.offset, f"u{size}")

    def vector(self, operand: object) -> tuple:
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def jump(self, target: int) -> None:
        chosen = self.active
        if chosen.all():
            self.pc = target
        elif chosen.any():
            raise PtxError("a branch that only some threads take")

    def run(self, execute: Callable[[Block, Instruction], None], limit: int = 10_000_000) -> None:
        """Until the kernel returns.

        Raises:
            PtxError: with the line of the instruction.
        """
        instructions, targets = self.program.instructions, self.program.targets
        for _ in range(limit):
            at = self.pc
            if at >= len(instructions):
                return
            self.pc = at + 1
            one = self.instruction = instructions[at]
            try:
                self.guard = None
                if one.guard is not None:
                    chosen = self.predicate(one.guard)
                    self.guard = ~chosen if one.negated else chosen
                if one.opcode.startswith("bra"):
                    self.jump(targets[at])
                elif one.opcode == "ret":
                    self.jump(len(instructions))
                else:
                    execute(self, one)
            except PtxError as error:
                place = f"{self.program.name}, block {self.index}, line {one.line}"
                raise PtxError(f"{place}: {error}\n  {one.text}") from None
        raise PtxError(f"{self.program.name} does not come to an end")
