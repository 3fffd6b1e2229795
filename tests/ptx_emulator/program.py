"""PTX text to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple


class PtxError(RuntimeError):
    """What a GPU would not do, or not in a defined way; or what this emulator does not know."""


class Register(NamedTuple):
    name: str


class Number(NamedTuple):
    """An immediate: an int, or the bits of a float."""

    bits: int


class Symbol(NamedTuple):
    """A name of memory: shared memory, or a parameter."""

    name: str


class Vector(NamedTuple):
    parts: tuple


class Address(NamedTuple):
    """[base + offset], or of a tensor copy [base, {coordinates}]."""

    base: Register | Symbol
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``; ``line`` is its number in the text."""

    opcode: str
    operands: tuple
    guard: Register | None
    negated: bool
    line: int
    text: str

    @property
    def kinds(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Program:
    """One kernel: its instructions, where labels point, and the names of its parameters."""

    name: str
    threads: int
    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)


# What can stand where a statement can begin; a statement may hold braces around operands.
TOKEN = re.compile(
    r"\s+|(?P<open>\{)|(?P<close>\})|(?P<label>\$?\w+):(?!:)|\.[^;\n]*[;\n]"
    r"|(?P<statement>[^\s;{}][^;{}]*(?:\{[^{}]*\}[^;{}]*)*);"
)
STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)


def parts_of(text: str) -> list[str]:
    """Operands: what is between commas outside of brackets and braces."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def operand(text: str) -> object:
    if text.startswith("{"):
        return Vector(tuple(operand(p) for p in parts_of(text[1:-1])))
    if text.startswith("["):
        first, *rest = parts_of(text[1:-1])
        base, _, offset = first.partition("+")
        vector = operand(rest[0]) if rest else None
        return Address(operand(base.strip()), int(offset or "0", 0), vector)  # type: ignore[arg-type]
    if "|" in text:
        return Vector(tuple(operand(p) for p in text.split("|")))
    if re.fullmatch(r"0[fFdD][0-9A-Fa-f]+", text):
        return Number(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return Number(int(text.rstrip("U"), 0))
    if text == "global_smem" or "_param_" in text:
        return Symbol(text)
    return Register(text)


@lru_cache(maxsize=64)
def parse(text: str) -> Program:
    """The kernel of a module with a single one."""
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(?:\.reqntid|\.maxntid) (\d+)", text, re.S)
    if entry is None:
        raise PtxError("no kernel with a fixed number of threads in this text")
    program = Program(entry[1], int(entry[3]), re.findall(r"(\w+_param_\d+)", entry[2]))
    # Names of labels hold within their braces: every block of inline assembly has its own.
    jumps: list[tuple[int, tuple[int, ...], str]] = []
    labels: dict[tuple[tuple[int, ...], str], int] = {}
    scope: tuple[int, ...] = ()
    at, line = entry.end(), text[: entry.end()].count("\n") + 1
    while found := TOKEN.match(text, at):
        if found["open"]:
            scope = (*scope, at)
        elif found["close"]:
            scope = scope[:-1]
            if not scope:
                break
        elif found["label"]:
            labels[scope, found["label"]] = len(program.instructions)
        elif found["statement"]:
            add_statement(program, jumps, scope, found["statement"].strip(), line)
        line += found[0].count("\n")
        at = found.end()
    if scope:
        raise PtxError(f"line {line} of {program.name} is not understood")
    for place, where, label in jumps:
        known = [labels[where[:n], label] for n in range(len(where), 0, -1) if (where[:n], label) in labels]
        if not known:
            raise PtxError(f"no label {label} for line {program.instructions[place].line} of {program.name}")
        program.targets[place] = known[0]
    return program


def add_statement(program: Program, jumps: list, scope: tuple[int, ...], statement: str, line: int) -> None:
    found = STATEMENT.fullmatch(statement)
    if found is None:
        raise PtxError(f"line {line}: {statement!r} is not understood")
    negated, guard, opcode, rest = found.groups()
    if opcode.startswith("bra"):
        jumps.append((len(program.instructions), scope, rest.strip()))
        operands: tuple = ()
    else:
        operands = tuple(operand(p) for p in parts_of(rest))
    program.instructions.append(
        Instruction(opcode, operands, Register(guard) if guard else None, negated == "!", line, statement)
    )
