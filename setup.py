"""Builds the native extensions with ninja.

``flex_kernels._cpu_ops``   always: csrc/bindings.cpp and csrc/cpu/*.cpp.
``flex_kernels._cuda_ops``  when nvcc is found: csrc/cuda/bindings.cpp and csrc/cuda/*.cu.

Neither includes a torch header: tensors arrive as addresses and sizes, so one binary serves every torch
version and the CUDA part compiles beside a torch without CUDA. A file ``name.avx2.cpp``,
``name.avx512.cpp`` or ``name.amx.cpp`` is compiled with that instruction set (x86-64 only) and chosen at run
time.

Build settings (environment): FLEX_KERNELS_CUDA=auto|0|1, CXX, CXXFLAGS, LDFLAGS, NVCC,
FLEX_KERNELS_SANITIZE=address|undefined|thread.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vbmi",
    "-mavx512vnni",
    "-mavx512bf16",
    *AVX2,
]
ISA_FLAGS = {"avx2": AVX2, "avx512": AVX512, "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"]}
CUDA_TARGETS = ("80", "90a", "100")


def find_nvcc() -> str | None:
    """The CUDA compiler, unless FLEX_KERNELS_CUDA=0; with =1 its absence is an error."""
    setting = os.environ.get("FLEX_KERNELS_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"FLEX_KERNELS_CUDA={setting!r} is not one of 'auto', '0', '1'")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if setting == "1" and not nvcc:
        raise SystemExit("FLEX_KERNELS_CUDA=1, but no nvcc on PATH, in $NVCC or in $CUDA_HOME/bin")
    return None if setting == "0" else nvcc


def escaped(path: Path) -> str:
    """A path as ninja's own syntax wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def isa_of(source: Path) -> str | None:
    """The instruction set in a name like ``rows.avx2.cpp``; None for a plain source."""
    return source.name.split(".")[-2] if source.name.count(".") == 2 else None


class NinjaBuild(build_ext):
    """Writes one build.ninja for both extensions and runs ninja on it."""

    def build_extensions(self) -> None:
        import ninja
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        lines, targets = self.rules(pybind11.get_include()), []
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            lines += self.edges(extension, build, target)
            targets.append(target)
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        program = Path(ninja.BIN_DIR) / "ninja"
        command = [str(program) if program.exists() else "ninja", "-C", str(build), *map(str, targets)]
        if subprocess.run(command).returncode:
            raise SystemExit("the native extension did not compile; the compiler's message is above")

    def rules(self, pybind11_include: str) -> list[str]:
        # torch ships its own libgomp under the usual soname, so both share one pool of threads.
        common = f"-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall '-I{ROOT / 'csrc'}'"
        common += f" {os.environ.get('CXXFLAGS', '')}"
        sanitize = os.environ.get("FLEX_KERNELS_SANITIZE")
        if sanitize:
            common += f" -g -fno-omit-frame-pointer -fsanitize={sanitize}"
        python = f"'-I{sysconfig.get_paths()['include']}' '-I{pybind11_include}'"
        codes = " ".join(f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS)
        link = "-shared -fopenmp" if sys.platform != "darwin" else "-shared -undefined dynamic_lookup"
        openmp = "-fopenmp" if sys.platform != "darwin" else ""
        return [
            f"cxx = {os.environ.get('CXX', 'g++' if shutil.which('g++') else 'c++')}",
            f"nvcc = {find_nvcc() or 'nvcc'}",
            "rule cxx",
            f"  command = $cxx -MMD -MF $out.d {common} {openmp} {python} $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = C++ $in",
            "rule nvcc",
            f"  command = $nvcc -MD -MF $out.d -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden"
            f" '-I{ROOT / 'csrc'}' {codes} -gencode=arch=compute_90,code=compute_90 -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $in",
            "rule link",
            f"  command = $cxx {link} {f'-fsanitize={sanitize}' if sanitize else ''} $in"
            f" {os.environ.get('LDFLAGS', '')} -o $out",
            "  description = link $out",
            "rule linkcuda",
            "  command = $nvcc -shared -cudart static $in -o $out",
            "  description = link $out",
        ]

    def edges(self, extension: Extension, build: Path, target: Path) -> list[str]:
        lines, objects = [], []
        cuda = any(s.endswith(".cu") for s in extension.sources)
        for source in map(Path, extension.sources):
            output = build / f"{'_'.join(source.relative_to('csrc').parts)}.o"
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            lines.append(f"build {escaped(output)}: {rule} {escaped(ROOT / source)}")
            isa = isa_of(source)
            if isa in ISA_FLAGS:
                lines.append(f"  isa = {' '.join(ISA_FLAGS[isa])}")
            objects.append(escaped(output))
        lines.append(f"build {escaped(target)}: {'linkcuda' if cuda else 'link'} {' '.join(objects)}")
        return lines


def sources(*patterns: str) -> list[str]:
    found = [p.relative_to(ROOT) for pattern in patterns for p in sorted(ROOT.glob(pattern))]
    return [str(p) for p in found if X86 or isa_of(p) not in ISA_FLAGS]


extensions = [Extension("flex_kernels._cpu_ops", sources("csrc/bindings.cpp", "csrc/cpu/*.cpp"))]
if find_nvcc():
    extensions.append(
        Extension("flex_kernels._cuda_ops", sources("csrc/cuda/bindings.cpp", "csrc/cuda/*.cu"))
    )

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
