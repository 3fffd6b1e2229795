"""The CUDA routing kernels for tests on CPU tensors: built for the host, and on the GPU where there is one.

Built for the host means the same sources and bindings under g++, over tests/emulation's fibers. The module
is kept in pytest's cache folder under a hash of every source, so it is compiled once, not once a run.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flex_kernels.cuda import missing_extension, ops
from flex_kernels.cuda.ops import RoutingKernels

HERE = Path(__file__).resolve().parent
EMULATION = HERE / "emulation"
SOURCES = HERE.parent / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Werror")
# The host compiler has no opinion on unrolling; everything else it warns of is an error.
FLAGS += ("-Wno-unknown-pragmas", '-DFLEX_DEVICE_TYPE="cpu"')

CXX = os.environ.get("CXX") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    CXX is None or not sys.platform.startswith("linux"),
    reason="the host emulation of the CUDA kernels needs g++ on Linux",
)


@dataclass(frozen=True)
class Emulation:
    """The emulated kernels and the two knobs of their scheduler."""

    kernels: RoutingKernels
    library: ctypes.CDLL
    emulated: bool = True

    def seed(self, seed: int) -> None:
        """Choose the order in which later launches run their threads."""
        self.library.emulation_seed(ctypes.c_uint64(seed))

    def drop_barrier(self, index: int | None) -> None:
        """Make the ``index``-th barrier of every thread do nothing; None restores them all."""
        self.library.emulation_drop_barrier(ctypes.c_int64(-1 if index is None else index))


class OnGpu:
    """The built extension with the face of :class:`Emulation`: tensors go to the GPU and come back."""

    emulated = False

    def __init__(self) -> None:
        self.kernels = self
        self.built = ops.kernels()
        self.native, self.codes = self.built.native, self.built.codes

    def seed(self, seed: int) -> None:
        """The GPU orders its threads itself."""

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        moved = [to_gpu(a) for a in args], {k: to_gpu(v) for k, v in kwargs.items()}
        found = getattr(self.built, name)(*moved[0], **moved[1])
        histogram_E = kwargs.get("histogram_E")
        if histogram_E is not None:
            histogram_E.copy_(moved[1]["histogram_E"])
        if isinstance(found, Tensor):
            return found.cpu()
        return type(found)(*map(to_cpu, found)) if hasattr(found, "_fields") else tuple(map(to_cpu, found))

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, name)


def to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def to_gpu(value: Any) -> Any:
    """A tensor on the GPU at the same distance from a 16-byte boundary; anything else as it is."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return value
    if not value.is_contiguous():
        return value.cuda()
    gap = value.data_ptr() % 16 // value.element_size()
    return value.new_empty(value.numel() + gap, device="cuda")[gap:].view(value.shape).copy_(value)


def compile_module(target: Path, extra: tuple[str, ...] = ()) -> None:
    import pybind11

    includes = [f"-I{EMULATION}", f"-I{SOURCES}", f"-I{pybind11.get_include()}"]
    includes.append(f"-I{sysconfig.get_paths()['include']}")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compile_one(source: Path) -> str:
            output = f"{folder}/{source.name}.o"
            command = [CXX, *FLAGS, *extra, *includes, "-x", "c++", "-c", str(source), "-o", output]
            subprocess.run(command, check=True)
            return output

        sources = [SOURCES / "bindings.cpp", EMULATION / "emulation.cpp", *sorted(SOURCES.glob("*.cu"))]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = f"{folder}/{target.name}"
        subprocess.run([CXX, "-shared", *extra, *objects, "-o", linked], check=True)
        os.replace(linked, target)


@lru_cache(maxsize=1)
def load(cache: Path) -> Emulation:
    digest = hashlib.sha256(repr((FLAGS, CXX, sys.version)).encode())
    for source in sorted([*SOURCES.iterdir(), *EMULATION.iterdir()]):
        digest.update(source.read_bytes())
    target = cache / f"_cuda_ops-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        compile_module(target)
    spec = importlib.util.spec_from_file_location("_cuda_ops", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Emulation(RoutingKernels(module), ctypes.CDLL(str(target)))


def survives(check: Callable[[], bool]) -> bool:
    """Whether ``check`` returns True in a child process: a broken kernel may write anywhere."""
    threads = torch.get_num_threads()
    # A fork has no worker threads: a parallel region in the child would wait for them for ever.
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        passed = False
        try:
            passed = check()
        finally:
            os._exit(0 if passed else 1)
    torch.set_num_threads(threads)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError("the check neither passed nor failed in 60 s")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN or the largest integer, so that nothing unwritten goes unseen."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    settings.fill_uninitialized_memory = before[1]


ON_GPU = torch.cuda.is_available() and not missing_extension()


def kept(config: Any) -> Path:
    """Where the module built for the host stays: in pytest's cache, or beside it where that is turned off."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        return Path(cache.mkdir("cuda-emulation"))
    folder = Path(tempfile.gettempdir()) / f"flex-kernels-cuda-emulation-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(name="emulation", params=["emulated", "gpu"] if ON_GPU else ["emulated"])
def emulation_fixture(request: pytest.FixtureRequest) -> Iterator[Emulation | OnGpu]:
    """The kernels, poisoned fresh memory; emulated ones with every barrier in place and a known schedule."""
    with poisoned_memory():
        if request.param == "gpu":
            yield OnGpu()
            return
        found = load(kept(request.config))
        found.seed(0)
        yield found
        found.drop_barrier(None)


@pytest.fixture(name="host_only")
def host_only_fixture(emulation: Emulation | OnGpu) -> None:
    if not emulation.emulated:
        pytest.skip("looks inside the emulation")
