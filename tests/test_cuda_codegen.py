"""What nvcc makes of the CUDA kernels, read without a GPU: registers, spills, shared memory, instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

# Most registers a thread may use. At 65,536 registers a multiprocessor these allow 24 warps of route, 48 of
# permute and 32 of combine; the fused route has a multiprocessor for each of its 64 blocks at most.
BOUNDS = {
    "route_kernel": 80,
    "route_fused_kernel": 112,
    "split_rows_kernel": 32,
    "count_kernel": 40,
    "place_kernel": 40,
    "combine_kernel": 64,
}
VARIANTS = {
    "route_kernel": 5,
    "route_fused_kernel": 5,
    "split_rows_kernel": 4,
    "count_kernel": 1,
    "place_kernel": 1,
    "combine_kernel": 6,
}

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture, as ptxas reports it."""

    kernel: str
    mangled: str
    architecture: str
    registers: int
    stack: int
    spills: int
    static_shared: int


def kernel_name(mangled: str) -> str:
    return next((name for name in sorted(BOUNDS, key=len, reverse=True) if name in mangled), mangled)


def parse_usage(report: str) -> list[Usage]:
    found = []
    for block in report.split("Compiling entry function ")[1:]:
        mangled, architecture = re.match(r"'(\S+)' for '(\S+)'", block).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        shared = re.search(r"(\d+) bytes smem", block)
        found.append(
            Usage(
                kernel_name(mangled),
                mangled,
                architecture,
                int(re.search(r"Used (\d+) registers", block).group(1)),
                int(stack),
                int(stores) + int(loads),
                int(shared.group(1)) if shared else 0,
            )
        )
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[list[Usage], list[Path]]:
    """ptxas' report on every kernel, and the machine code of every source."""
    folder = tmp_path_factory.mktemp("cuda-codegen")
    codes = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]

    def compile_one(source: Path) -> tuple[str, Path]:
        output = folder / f"{source.stem}.fatbin"
        command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", *codes, "-fatbin", str(source)]
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}: {done.stderr}"
        warnings = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
        assert not warnings, f"{source.name}: {warnings}"
        return done.stderr, output

    sources = sorted(SOURCES.glob("*.cu"), key=lambda p: p.stat().st_size, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compile_one, sources))
    return [usage for report, _ in results for usage in parse_usage(report)], [path for _, path in results]


def test_every_kernel_exists_for_every_architecture(compiled):
    found = {}
    for usage in compiled[0]:
        found.setdefault((usage.kernel, usage.architecture), set()).add(usage.mangled)
    want = {(kernel, a): count for kernel, count in VARIANTS.items() for a in ARCHITECTURES}
    assert {key: len(names) for key, names in found.items()} == want


def test_nothing_spills_and_no_kernel_has_a_stack_frame(compiled):
    assert [u for u in compiled[0] if u.spills or u.stack] == []


def test_registers_stay_under_their_bounds(compiled):
    assert [u for u in compiled[0] if u.registers > BOUNDS[u.kernel]] == []


def test_shared_memory_is_dynamic_alone(compiled):
    # sm_90 and later may report the 1 KiB a block that the system keeps for itself.
    assert [u for u in compiled[0] if u.static_shared > 1024] == []


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: from the toolkit, or the one inside the triton package."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


@pytest.fixture(scope="module")
def machine_code(compiled) -> dict[tuple[str, str], str]:
    """(mangled kernel, architecture) -> its instructions."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit nor triton brings one here")
    found = {}
    for path in compiled[1]:
        text = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
        architecture = ""
        for section in re.split(r"(?=Function : |arch = )", text):
            if section.startswith("arch = "):
                architecture = section.split()[2]
            elif section.startswith("Function : "):
                found[section.split()[2], architecture] = section
    return found


def select(machine_code: dict, pattern: str) -> dict[tuple[str, str], str]:
    found = {key: code for key, code in machine_code.items() if re.search(pattern, key[0])}
    assert {architecture for _, architecture in found} == set(ARCHITECTURES), pattern
    return found


def test_no_kernel_touches_local_memory(machine_code):
    assert [key for key, code in machine_code.items() if re.search(r"\b(LDL|STL)\b", code)] == []


@pytest.mark.parametrize(
    ("kernel", "instruction"),
    (
        (r"combine_kernelI(6__half|13__nv_bfloat16)Li8E", r"LDG\.E\.128"),
        (r"combine_kernelI(6__half|13__nv_bfloat16)Li8E", r"STG\.E\.128"),
        (r"combine_kernelIfLi4E", r"LDG\.E\.128"),
        (r"route_fused_kernel", r"LDG\.E\.128"),
        (r"route_(fused_)?kernel", r"REDUX"),
        (r"(count|place)_kernel", r"MATCH\.ANY"),
    ),
)
def test_the_instructions_that_make_it_fast_are_there(machine_code, kernel, instruction):
    found = select(machine_code, kernel)
    assert [key for key, code in found.items() if not re.search(instruction, code)] == []
