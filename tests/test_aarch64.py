"""The kernels of any processor, compiled for aarch64 and run under qemu: they compute what they compute here.

What they compute here is held against float64 in test_native_cpu.py.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    "tests/emulation/plain_rows.cpp",
    "csrc/cpu/routing.cpp",
    "csrc/cpu/kernels.generic.cpp",
    "csrc/cpu/pages.cpp",
]
CROSS = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def build(compiler: str, program: Path, *options: str) -> None:
    command = [compiler, "-std=c++17", "-O2", "-fopenmp", *options, f"-I{ROOT / 'csrc'}", "-o", str(program)]
    subprocess.run(command + [str(ROOT / source) for source in SOURCES], check=True, capture_output=True)


def results(*command: str) -> list[tuple[str, str]]:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [tuple(line.split(": ")) for line in done.stdout.splitlines()]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.skipif(
    not (CROSS and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (qemu-user-static)"
)
def test_plain_kernels_compute_the_same_on_aarch64(tmp_path):
    build("g++", tmp_path / "here")
    build(CROSS, tmp_path / "there", "-static")
    here, there = results(str(tmp_path / "here")), results(EMULATOR, str(tmp_path / "there"))
    assert [name for name, _ in here] == [name for name, _ in there] and len(here) > 900
    for (name, mine), (_, other) in zip(here, there):
        if name in ("ids", "offsets", "order", "token") or name.startswith("gathered"):
            assert mine == other, name
            continue
        # Sums may round differently (aarch64 has fused multiply-adds everywhere), bfloat16 by a whole unit.
        tolerance = 2**-7 if name.endswith("dtype 1") else 1e-5
        assert float(other) == pytest.approx(float(mine), rel=tolerance, abs=1e-6), name
