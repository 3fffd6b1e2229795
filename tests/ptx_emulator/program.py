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


SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
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
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(?:\.reqntid (\d+)|\.maxntid (\d+))", text, re.S)
    if entry is None:
        raise PtxError("no kernel with a fixed number of threads in this text")
    name, parameters = entry[1], re.findall(r"(\w+_param_\d+)", entry[2])
    program = Program(name, int(entry[3] or entry[4]), parameters)
    jumps: list[tuple[int, tuple[int, ...], str]] = []
    names: dict[tuple[tuple[int, ...], str], int] = {}
    scope: tuple[int, ...] = ()
    opened, pending, begun = 0, "", 0
    for number, line in enumerate(text[entry.end() :].splitlines(), text[: entry.end()].count("\n") + 1):
        line = line.split("//")[0].strip()
        if not pending and line in ("{", "}"):
            opened += line == "{"
            scope = (*scope, opened) if line == "{" else scope[:-1]
            if not scope:
                break
            continue
        # An assembly block of its own names, on the line of its first statement.
        if not pending and line.startswith("{") and not line.endswith(";"):
            opened, scope, line = opened + 1, (*scope, opened + 1), line[1:].strip()
        begun = number if not pending else begun
        pending = f"{pending} {line}".strip()
        while pending:
            label = re.match(r"(\$?\w+):\s*", pending)
            if label:
                names[scope, label[1]] = len(program.instructions)
                pending = pending[label.end() :]
                continue
            if pending.startswith("."):
                if not pending.startswith((".reg", ".pragma")) or ";" in pending:
                    pending = pending.partition(";")[2].strip() if ";" in pending else ""
                    continue
                break
            if pending.startswith("}"):
                scope, pending = scope[:-1], pending[1:].strip()
                continue
            statement, found, rest = pending.partition(";")
            if not found:
                break
            pending = rest.strip()
            add_statement(program, jumps, scope, statement.strip(), begun)
    for at, where, label in jumps:
        known = [names[where[:n], label] for n in range(len(where), -1, -1) if (where[:n], label) in names]
        if not known:
            raise PtxError(f"no label {label} for line {program.instructions[at].line} of {name}")
        program.targets[at] = known[0]
    return program


def add_statement(program: Program, jumps: list, scope: tuple[int, ...], statement: str, line: int) -> None:
    if not statement:
        return
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
