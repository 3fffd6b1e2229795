"""Triton's launches on CPU tensors: compiled as for a GPU, and the PTX run by :mod:`block`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flex_kernels.triton import codegen

from . import arithmetic, matrices, transfers
from .block import Block
from .memory import GlobalMemory
from .program import Instruction, PtxError, parse
from .transfers import TensorMap

TABLE = arithmetic.TABLE | transfers.TABLE | matrices.TABLE
# Bytes of shared memory that a block may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# Bytes of a swizzle by Triton's name of it.
SWIZZLE_BYTES = (0, 32, 64, 128)


def execute(block: Block, one: Instruction) -> None:
    run = TABLE.get(one.kinds[0])
    if run is None:
        raise PtxError("this instruction is not known")
    run(block, one)


def tensor_map(descriptor: TensorDescriptor, described: dict[str, Any]) -> TensorMap:
    """As Triton's launcher encodes it."""
    found = TensorMap(
        address=descriptor.base.data_ptr(),
        element=descriptor.base.element_size(),
        sizes=tuple(descriptor.shape),
        strides=tuple(descriptor.strides),
        box=tuple(described["block_size"]),
        swizzle=SWIZZLE_BYTES[described["swizzle"]],
    )
    found.check()
    return found


def parameters_of(launch: codegen.Launch, compiled: Any) -> list[Any]:
    """The kernel's parameters in order, as Triton's launcher has them: a tensor map is followed by its sizes
    and strides; where there are no tensor maps (sm_80) an address, sizes, strides and flags stand for it. Two
    scratch addresses come last."""
    signature, _, _ = codegen.specialisation(launch)
    described, values = iter(compiled.metadata.tensordesc_meta or ()), []
    for name, kind in signature.items():
        value = launch.arguments[name]
        if isinstance(value, TensorDescriptor):
            if compiled.metadata.tensordesc_meta:
                values.append(tensor_map(value, next(described)))
            else:
                flags = [value.padding == "nan", *([False] * hasattr(value, "round_f32_to_tf32"))]
                values += [value.base, *value.shape, *value.strides, *flags]
            values += [*value.shape, *value.strides]
        elif kind != "constexpr":
            values.append(value)
    return [*values, 0, 0]


def raw(value: Any) -> Any:
    """A parameter as the bits that the kernel loads."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return value & (2**64 - 1) if isinstance(value, int) and value < 0 else value


class Gpu:
    """Runs every launch of a process on the CPU.

    Attributes:
        capability: 80 or 90, what kernels are compiled for.
        launched: names of the kernels that ran, in order.
        hazards: {kernel: instructions that touched accumulators of a product in flight}.
    """

    def __init__(self, capability: int):
        self.capability = capability
        self.launched: list[str] = []
        self.hazards: dict[str, set[str]] = {}
        self.compiled: dict[str, Any] = {}

    def launch(self, launch: codegen.Launch, grid: tuple[int, ...]) -> None:
        key = str((launch.kernel.fn.__name__, codegen.specialisation(launch), launch.options))
        if key not in self.compiled:
            self.compiled[key] = codegen.compile_launch(launch, self.capability)
        compiled = self.compiled[key]
        if compiled.metadata.shared > SHARED_LIMIT[self.capability]:
            raise OutOfResources(compiled.metadata.shared, SHARED_LIMIT[self.capability], "shared memory")
        program = parse(compiled.asm["ptx"])
        values = parameters_of(launch, compiled)
        if len(values) != len(program.parameters):
            raise PtxError(f"{program.name} takes {len(program.parameters)} parameters, not {len(values)}")
        tensors = (v.base if isinstance(v, TensorDescriptor) else v for v in launch.arguments.values())
        memory = GlobalMemory(t for t in tensors if isinstance(t, Tensor))
        named = dict(zip(program.parameters, map(raw, values)))
        size = (*grid, 1, 1)[:3]
        for index in itertools.product(*(range(n) for n in reversed(size))):
            block = Block(program, named, memory, compiled.metadata.shared, index[::-1], size)
            with np.errstate(all="ignore"):
                block.run(execute)
            if block.hazards:
                self.hazards.setdefault(program.name, set()).update(block.hazards)
        self.launched.append(program.name)


@contextmanager
def emulated_gpu(capability: int, multiprocessors: int = 4) -> Iterator[Gpu]:
    """Within this block the Triton backend runs CPU tensors on an emulated GPU."""
    from flex_kernels import dispatch
    from flex_kernels.triton import codes, tiles, tune

    gpu = Gpu(capability)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in codegen.OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args)) | kwargs
        gpu.launch(codegen.Launch(self, arguments, options), grid(arguments) if callable(grid) else grid)

    patches = [patch.object(JITFunction, "run", run)]
    patches += [patch.object(m, "capability_of", lambda device: capability) for m in (tiles, tune, codes)]
    patches += [
        patch.object(tiles, "multiprocessors", lambda device: multiprocessors),
        patch.object(tune, "cache_file", lambda device: Path()),
        patch.object(tune, "stored_plans", lambda path: {}),
        patch.object(dispatch, "first_answer", lambda name, device_type: ""),
    ]
    tune.plan_for.cache_clear()
    for one in patches:
        one.start()
    try:
        yield gpu
    finally:
        for one in patches:
            one.stop()
        tune.plan_for.cache_clear()
