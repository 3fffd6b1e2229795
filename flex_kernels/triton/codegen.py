"""Compile the backend's kernels for a GPU that is not there, and read what the compiler made of them.

A launch is recorded on meta tensors of the real shapes, specialised as Triton would specialise it on the GPU,
compiled to a cubin, and read back: registers, stack (spills), shared memory, and which matrix and copy
instructions it holds. Nothing here runs when the layer runs.

Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flex_kernels.quantize import GROUP_COLUMNS, KINDS, Quantized
from flex_kernels.triton.tiles import Tile

TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPE_NAMES |= {torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8"}
# Shared memory a program may have: the least of sm_80, sm_86, sm_89 and sm_120 for 80, that of sm_90 for 90.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
# Shared memory of a multiprocessor; each resident program takes 1 KiB of it for the system.
SHARED_TOTAL = {80: 164 * 1024, 90: 228 * 1024}
# Names of launch options; every other keyword is an argument of the kernel.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
PTX_PATTERNS = {
    "wgmma": r"wgmma\.mma_async",
    "register_wgmma": r"wgmma\.mma_async[^;]*\},\s*\{",
    "mma": r"mma\.sync",
    "tma_load": r"cp\.async\.bulk\.tensor\.\dd\.shared",
    "cp_async": r"cp\.async\.c[ag]\.shared\.global[^,]*\s\[[^,]*,\s*\[[^,]*,\s*0x10",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and its options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes on a chip, read from the cubin, and how often PTX holds each
    instruction.

    Attributes:
        registers: a thread; stack: bytes a thread in local memory, 0 when nothing spills.
        shared: bytes a program.
        wgmma, mma, tma_load, cp_async: instructions in the PTX; cp_async counts the 16-byte ones.
        register_wgmma: those wgmma whose first operand comes from registers.
        warps: of one program; occupancy: programs that fit a multiprocessor of the chip at a time.
    """

    registers: int
    stack: int
    shared: int
    wgmma: int
    register_wgmma: int
    mma: int
    tma_load: int
    cp_async: int

    warps: int
    occupancy: int


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within this block kernels are not run: their launches are appended to the list instead."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args)) | kwargs
        launches.append(Launch(self, arguments, options))

    with patch.object(JITFunction, "run", record):
        yield launches


def argument_type(value: Any, specialise: bool, look_at_alignment: bool) -> tuple[str, bool]:
    """(type in a Triton signature, whether it is known to be divisible by 16), as Triton decides at a
    launch; of a pointer, only where its parameter lets Triton look."""
    if value is None or (specialise and isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype], look_at_alignment
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", specialise and value % 16 == 0


def specialisation(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """(signature, constants, attributes) of ``launch``: launches that agree in these share one compiled
    kernel."""
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        kind, divisible = ("constexpr", False)
        if not param.is_constexpr:
            kind, divisible = argument_type(
                value, not param.do_not_specialize, not param.do_not_specialize_on_alignment
            )
        signature[param.name] = kind
        if kind == "constexpr":
            constants[param.name] = value
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, capability: int) -> Any:
    """The compiled kernel of ``launch`` for sm_``capability`` (80, 90, ...); needs no GPU."""
    source = ASTSource(launch.kernel, *specialisation(launch))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def cuobjdump() -> Path:
    """The disassembler that comes with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def occupancy(registers: int, shared: int, warps: int, capability: int) -> int:
    """Programs a multiprocessor holds at a time: bounded by 64 K registers, by its shared memory and by 64
    warps.

    Registers are handed out to a warp in units of 256.
    """
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, SHARED_TOTAL[capability] // (shared + 1024), 64 // warps, 32)


def resources(compiled: Any, capability: int) -> Resources:
    """Read the cubin and the PTX of a kernel compiled for ``capability``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in PTX_PATTERNS.items()}
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Resources(
        registers=numbers["REG"],
        stack=numbers["STACK"] + numbers["LOCAL"],
        shared=shared,
        warps=warps,
        occupancy=occupancy(numbers["REG"], shared, warps, capability),
        **counts,
    )


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Shape:
    """A model's layer: hidden size, expert width, experts, experts a token."""

    H: int
    I: int
    E: int
    K: int


def launches_of(
    shape: Shape, tokens: int, plan: Any, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Launch]:
    """Every kernel's launch for a layer of this shape, recorded on meta tensors, by name."""
    from flex_kernels.triton.combine import combine
    from flex_kernels.triton.down_backward import down_backward
    from flex_kernels.triton.grouped_gemm import grouped_gemm
    from flex_kernels.triton.groups import dense, grouped
    from flex_kernels.triton.route import route
    from flex_kernels.triton.route_backward import route_backward
    from flex_kernels.triton.score_grads import score_grads
    from flex_kernels.triton.up_swiglu import up_swiglu
    from flex_kernels.triton.weight_grad import weight_grad

    H, I, E, K, T = shape.H, shape.I, shape.E, shape.K, tokens
    N = T * K
    x, rows, act, preact = (meta(*s, dtype=dtype) for s in ((T, H), (N, H), (N, I), (N, 2 * I)))
    gate_up, down = meta(E, 2 * I, H, dtype=dtype), meta(E, H, I, dtype=dtype)
    weights, gate = meta(T, K, dtype=torch.float32), meta(T, dtype=torch.float32)
    order, inverse, offsets = (meta(*s, dtype=torch.int32) for s in ((N,), (T, K), (E + 1,)))
    parts = meta(triton.cdiv(I, plan.down_backward.n), N, dtype=torch.float32)
    dense_parts = meta(triton.cdiv(I, plan.down_backward.n), T, dtype=torch.float32)

    found: dict[str, Launch] = {}

    def add(name: str, call: Callable[[], Any]) -> Any:
        with recorded_launches() as launches:
            result = call()
        (found[name],) = launches
        return result

    groups = add("tile_table", lambda: grouped(offsets, order, K, plan.m))
    own = dense(T, plan.m)
    add("up_swiglu", lambda: up_swiglu(x, gate_up, groups, plan.up, True, False))
    add("up_swiglu_preact", lambda: up_swiglu(x, gate_up, groups, plan.up, True, True))
    add("up_swiglu_recompute", lambda: up_swiglu(x, gate_up, groups, plan.up, False, True))
    add("up_swiglu_dense", lambda: up_swiglu(x, gate_up[:1], own, plan.up, True, False))
    add("down", lambda: grouped_gemm(act, down, True, groups, plan.down))
    add("up_backward", lambda: grouped_gemm(preact, gate_up, False, groups, plan.up_backward))
    tile = plan.down_backward
    add(
        "down_backward",
        lambda: down_backward(x, down, preact, groups, tile, weights, gate, True, False, True),
    )
    add(
        "down_backward_personal",
        lambda: down_backward(x, down[:1], preact[:T], own, tile, gate, None, True, True, True),
    )
    if tile.tma:
        up, back = (replace(t, copy_rows=True) for t in (plan.up, tile))
        with recorded_launches() as launches:
            up_swiglu(x, gate_up, groups, up, True, False)
            down_backward(x, down, preact, groups, back, weights, gate, True, False, True)
        found["copy_rows"], found["up_swiglu_copied"], _, found["down_backward_copied"] = launches
    add("weight_grad", lambda: weight_grad(preact, False, x, True, groups))
    add("combine", lambda: combine(rows, inverse, weights, x, gate, x, gate, "convex"))
    add(
        "score_grads",
        lambda: score_grads(
            parts, inverse, weights, dense_parts, gate, dense_parts, gate, "convex", True, True, True
        ),
    )
    rows_EH, gates_GH = meta(E, H, dtype=dtype), meta(2, H, dtype=torch.float32)
    gate_bias = meta(2, dtype=torch.float32)
    add("route", lambda: route(x, rows_EH, None, gates_GH, gate_bias, K, True, "softmax", 1.0, False))
    grads = weights, meta(2, T, dtype=torch.float32), meta(0, E, dtype=torch.float32)
    saved = x, rows_EH, gates_GH, inverse, weights, grads[1]
    needs = [True, False, True, True]
    add("route_backward", lambda: route_backward(*grads, *saved, True, "softmax", 1.0, needs, x))
    return found


def quantised(kind: str, *shape: int) -> Quantized:
    """Codes and scales of weights [E, R, C], on the meta device."""
    *rows, columns = shape
    if kind == "int8":
        return Quantized(meta(*shape, dtype=torch.int8), meta(*rows), columns)
    packed, groups = -(-columns // 2), -(-columns // GROUP_COLUMNS)
    return Quantized(meta(*rows, packed, dtype=torch.uint8), meta(*rows, groups), columns)


def decoding_launches(shape: Shape, tokens: int, tile: Tile, kind: str) -> dict[str, Launch]:
    """The kernels that read codes, by name: the four products that decode in their loop, and ``decode``
    itself."""
    from flex_kernels.triton.codes import decode
    from flex_kernels.triton.down_backward import down_backward
    from flex_kernels.triton.grouped_gemm import grouped_gemm
    from flex_kernels.triton.groups import Groups
    from flex_kernels.triton.up_swiglu import up_swiglu

    H, I, E, K, T = shape.H, shape.I, shape.E, shape.K, tokens
    N = T * K
    x, act, preact = (meta(*s) for s in ((T, H), (N, I), (N, 2 * I)))
    weights, order = meta(T, K, dtype=torch.float32), meta(N, dtype=torch.int32)
    gate_up, down = quantised(kind, E, 2 * I, H), quantised(kind, E, H, I)
    groups = Groups(N, K, tile.m, N // tile.m + E, *(order for _ in range(5)))
    calls = {
        "up_swiglu": lambda: up_swiglu(x, gate_up, groups, tile, True, True),
        "down": lambda: grouped_gemm(act, down, True, groups, tile),
        "down_backward": lambda: down_backward(
            x, down, preact, groups, tile, weights, None, True, False, True
        ),
        "up_backward": lambda: grouped_gemm(preact, gate_up, False, groups, tile),
        "decode": lambda: decode(gate_up, meta(E, 2 * I, H)),
    }
    found = {}
    for name, call in calls.items():
        with recorded_launches() as launches:
            call()
        (found[f"{name}_{kind}"],) = launches
    return found


QWEN15_MOE = Shape(H=2048, I=1408, E=60, K=4)
# Kernels whose code does not depend on the plan: looked at with one plan of each chip.
PLAN_FREE = ("tile_table", "copy_rows", "weight_grad", "combine", "score_grads", "route", "route_backward")


def cases() -> dict[str, tuple[Launch, int]]:
    """(launch, capability) of every kernel that the pinned plans use at the shape of Qwen1.5-MoE, by name."""
    from flex_kernels.triton import tiles

    found = {}
    for capability, plans, sizes in ((80, tiles.AMPERE, (16, 128)), (90, tiles.HOPPER, (16, 64, 128))):
        for m in sizes:
            for name, launch in launches_of(QWEN15_MOE, 8192, plans[m]).items():
                if name not in PLAN_FREE:
                    found[f"sm_{capability} bf16 m{m} {name}"] = (launch, capability)
                elif m == 128:
                    found[f"sm_{capability} bf16 {name}"] = (launch, capability)
    for name, launch in launches_of(QWEN15_MOE, 8192, tiles.FLOAT32[64], torch.float32).items():
        if name in (
            "up_swiglu_preact",
            "down",
            "down_backward_personal",
            "route",
            "route_backward",
            "weight_grad",
        ):
            found[f"sm_90 fp32 {name}"] = (launch, 90)
    return found | decoding_cases()


def decoding_cases() -> dict[str, tuple[Launch, int]]:
    """As :func:`cases`, of the kernels that read 8- or 4-bit codes."""
    from flex_kernels.triton import tiles

    found = {}
    for capability, tile in ((80, tiles.AMPERE[64].up), (90, tiles.HOPPER[16].up), (90, tiles.HOPPER[64].up)):
        for kind in KINDS:
            for name, launch in decoding_launches(QWEN15_MOE, 8192, tile, kind).items():
                size = "" if name.startswith("decode") else f" m{tile.m}"
                found[f"sm_{capability} bf16{size} {name}"] = (launch, capability)
    return found


def compile_all(chosen: dict[str, tuple[Launch, int]], threads: int = 2) -> dict[str, Resources]:
    """The resources of every case, compiled ``threads`` at a time."""

    def one(case: tuple[Launch, int]) -> Resources:
        launch, capability = case
        return resources(compile_launch(launch, capability), capability)

    parse = patch.object(JITFunction, "parse", in_turns(JITFunction.parse))
    with parse, ThreadPoolExecutor(threads) as pool:
        return dict(zip(chosen, pool.map(one, chosen.values())))


def in_turns(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``parse`` for several threads: Python 3.11 counts the depth of ``ast.parse`` once for all of them, and
    raises SystemError where two calls overlap.
    """
    turn = Lock()

    def one_at_a_time(function: Any) -> Any:
        with turn:
            return parse(function)

    return one_at_a_time


def write_baseline(path: Path) -> None:
    """Add this Triton version's resources to the JSON file of baselines, by version and case."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[triton.__version__] = {name: asdict(r) for name, r in compile_all(cases()).items()}
    lines = [
        f" {json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(r)}" for name, r in table.items())
        + "\n }"
        for version, table in stored.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_baseline(Path(sys.argv[1]))
