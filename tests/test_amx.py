"""The AMX kernels without an AMX processor: a build whose tiles are plain C++, the compiled instructions done
one by one in a signal handler, and what the shipped binary holds.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

native = pytest.importorskip("flex_kernels.cpu.native", reason="the native extension is not built")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EMULATION = HERE / "emulation"
CXX = os.environ.get("CXX") or shutil.which("g++")
TILE_NAMES = ("tdpbf16ps", "tdpbsud", "tileloadd", "tilestored", "tilezero", "tilerelease", "ldtilecfg")
TILE_INSTRUCTIONS = re.compile(rf"\b(?:{'|'.join(TILE_NAMES)})\b.*")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64" or CXX is None,
    reason="the AMX kernels are built by g++ for x86-64 Linux",
)
needs_avx512 = pytest.mark.skipif(
    "avx512" not in native.isas() or importlib.util.find_spec("ninja") is None,
    reason="the AMX kernels need AVX-512 beside tiles, and the build needs ninja",
)


def build(folder: Path) -> None:
    """``emulated.so`` and ``trapped.so``, alike but for the file with the tiles, and the trap's library.

    That file is optimised as it is shipped. The others, which these tests do not look at, are not.
    """
    flags = f"-O0 -DFLEX_TILES_ASSUMED -DFLEX_TILES_EMULATED '-I{EMULATION}'"
    environment = {**os.environ, "CXXFLAGS": flags, "FLEX_KERNELS_CUDA": "0"}
    temporary = folder / "temporary"
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-lib={folder}", f"--build-temp={temporary}"]
    trap = f"{CXX} -std=c++17 -O2 -mfma -Wall -Werror -shared -fPIC -fvisibility=hidden '-I{ROOT / 'csrc'}'"
    trap += f" '-I{EMULATION}' '{EMULATION / 'trapped_tiles.cpp'}' -o '{folder / 'trap.so'}'"
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("flex_kernels/_cpu_ops*.so")
    ninja = [sys.executable, "-m", "ninja", "-C", str(temporary), "-t", "commands", str(built)]
    commands = subprocess.run(ninja, check=True, capture_output=True, text=True).stdout.splitlines()
    (compiling,) = (line for line in commands if "kernels.amx.cpp -o" in line)
    linking = commands[-1]
    assert linking.endswith(f"-o {built}") and " -O0 " in compiling
    compiling = compiling.replace(" -O0 ", " -O3 ")

    def made_with(compile_line: str, name: str) -> str:
        line = compile_line.replace("amx.cpp.o", f"{name}.o")
        link = linking.replace("amx.cpp.o", f"{name}.o").replace(f"-o {built}", f"-o '{folder}/{name}.so'")
        return f"{line} && {link}"

    together = [
        made_with(compiling, "emulated"),
        made_with(compiling.replace("-DFLEX_TILES_EMULATED", ""), "trapped"),
        trap,
    ]
    running = [subprocess.Popen(line, shell=True, cwd=temporary) for line in together]
    assert [process.wait() for process in running] == [0, 0, 0]


@pytest.fixture(name="folder", scope="module")
def folder_fixture(request) -> Path:
    digest = hashlib.sha256(repr((CXX, sys.version)).encode())
    for source in sorted(
        [
            *ROOT.glob("csrc/*.cpp"),
            *ROOT.glob("csrc/cpu/*"),
            *EMULATION.iterdir(),
            ROOT / "setup.py",
            Path(__file__).resolve(),
        ]
    ):
        digest.update(source.read_bytes())
    cache = Path(request.config.cache.mkdir("amx-emulation"))
    folder = cache / digest.hexdigest()[:16]
    if not folder.exists():
        fresh = cache / f"{folder.name}-{os.getpid()}"
        fresh.mkdir()
        build(fresh)
        shutil.rmtree(fresh / "temporary")
        try:
            fresh.rename(folder)
        except OSError:
            # Another process was faster.
            shutil.rmtree(fresh)
    return folder


def run_tests(extension: Path, *arguments: str, **variables: str) -> str:
    """What pytest printed, all passed, with ``extension`` in the place of the installed one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "amx_emulated", "-p", "no:faulthandler"]
    command += ["-p", "no:cacheprovider", *arguments]
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "FLEX_TEST_CPU_OPS": str(extension), **variables}
    found = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    return found.stdout


def processor_has_tiles() -> bool:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and {"amx_tile", "amx_bf16", "amx_int8"} <= set(flags[1].split())


@pytest.fixture(name="runs", scope="module")
def runs_fixture(folder) -> Iterator[dict[str, Future[str]]]:
    """The tests on emulated tiles and those on trapped instructions, at the same time."""
    files = ["test_native_cpu.py", "test_cpu_backend.py", "test_cpu_quantized.py"]
    files += ["test_cpu_int8_products.py", "amx_suite.py"]
    # Other dtypes go to the AVX-512 kernels, which one test makes sure of; gradients of weights are torch's.
    chosen = "amx and (other_dtypes or not torch.float) and not weight_gradients and not float32s_digits"
    trap = {"FLEX_TEST_TRAP": str(folder / "trap.so")}
    with ThreadPoolExecutor() as pool:
        found = {"emulated": pool.submit(run_tests, folder / "emulated.so", *files, "-k", chosen)}
        if not processor_has_tiles():
            # A trap takes far longer than its instruction: every kind of product, at few sizes.
            some = ("amx_suite.py", "-k", "recompute or gradients or 6301 or in_int8")
            found["trapped"] = pool.submit(run_tests, folder / "trapped.so", *some, **trap)
        yield found


@needs_avx512
def test_every_native_kernel_and_the_layer_are_right_on_emulated_tiles(runs):
    said = runs["emulated"].result()
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None and int(passed[1]) >= 120 and "skipped" not in said


@needs_avx512
@pytest.mark.skipif(processor_has_tiles(), reason="this processor does not refuse tile instructions")
def test_the_compiled_tile_instructions_are_right_one_by_one(runs):
    trapped = re.search(r"(\d+) tile instructions trapped", runs["trapped"].result())
    assert trapped is not None and int(trapped[1]) > 100_000


@pytest.mark.skipif("amx" not in native.isas(), reason="this processor has no tiles")
def test_odd_shapes_are_right_on_real_tiles():
    run_tests(Path(native._cpu_ops.__file__), "amx_suite.py")


def tile_instructions(library: Path) -> list[str]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return TILE_INSTRUCTIONS.findall(listing)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_shipped_binary_multiplies_tiles_and_knows_no_emulation():
    library = Path(native._cpu_ops.__file__)
    found = tile_instructions(library)
    products = {line for line in found if line.startswith("tdp")}
    # Two tiles by two: every pair of operands once, four sums.
    operands = [(4, 6, 0), (4, 7, 1), (5, 6, 2), (5, 7, 3)]
    assert products == {
        f"{name} %tmm{b},%tmm{a},%tmm{c}" for a, b, c in operands for name in ("tdpbf16ps", "tdpbsud")
    }
    names = {line.split()[0] for line in found}
    assert names == set(TILE_NAMES)
    assert b"emulated tiles" not in library.read_bytes()


@needs_avx512
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_emulated_build_holds_no_tile_instruction(folder):
    assert tile_instructions(folder / "emulated.so") == []
    assert tile_instructions(folder / "trapped.so") != []
    assert b"emulated tiles" in (folder / "emulated.so").read_bytes()


def test_amx_is_offered_only_where_the_processor_has_it():
    # The other way round need not hold: the system may refuse the state.
    assert "amx" not in native.isas() or processor_has_tiles()
    if "amx" not in native.isas():
        with pytest.raises(ValueError, match="isa='amx'"):
            native.set_isa("amx")
        assert native.isa() == native.isas()[0]
