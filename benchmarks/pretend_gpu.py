"""A GPU that does nothing: Triton's launches and the CUDA routing kernels' calls, up to a stub of the driver.

For measuring host time where there is no GPU. Triton compiles for sm_90 as it would anywhere, and the C code
of its launcher runs, linked with benchmarks/no_op_driver.c in place of the CUDA driver. Tensors are CPU
tensors, so torch's own operations between the launches really run. No kernel does: results are what was in
memory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

CAPABILITY, MULTIPROCESSORS = 90, 132
# Slots that one launch of the CUDA kernel ``permute`` sorts (csrc/cuda/permute.cu).
ONE_BLOCK_SLOTS = 2048


@lru_cache(maxsize=1)
def no_op_driver() -> ctypes.CDLL:
    """The stub, loaded under the name of the CUDA driver. Raises RuntimeError without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the stub of the CUDA driver needs a C compiler: set CC or install gcc")
    folder = tempfile.mkdtemp(prefix="no-op-driver-")
    library = Path(folder) / "libcuda.so.1"
    source = Path(__file__).with_name("no_op_driver.c")
    flags = ("-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1")
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.no_op_driver_name.restype = ctypes.c_char_p
    loaded.no_op_driver_count.restype = ctypes.c_long
    return loaded


class Native:
    """Stands for ``flex_kernels._cuda_ops``: the same names, kernels counted by name and not run."""

    DEVICE_TYPE, FLOAT32, BFLOAT16, FLOAT16, MAX_EXPERTS, MAX_TOP_K = "cpu", 0, 1, 2, 512, 32

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def Routing(self, *settings: object) -> object:
        return settings

    RoutingOutput = Routing

    def route(self, *arguments: object) -> int:
        self.counts["route"] += 1
        return 0

    def route_fused(self, *arguments: object) -> int:
        self.counts["route_fused"] += 1
        return 0

    def split_rows(self, *arguments: object) -> int:
        self.counts["split_rows"] += 1
        return 0

    def permute(self, device: int, stream: int, ids: int, slots: int, *arguments: object) -> int:
        self.counts["permute"] += 1 if slots <= ONE_BLOCK_SLOTS else 2
        return 0

    def combine(self, *arguments: object) -> int:
        self.counts["combine"] += 1
        return 0

    def permute_chunks(self, slots: int) -> int:
        return 0 if slots <= ONE_BLOCK_SLOTS else 1


class Launches:
    """Kernels launched since it was made, by name: Triton's as the driver counts, others as Native does."""

    def __init__(self, driver: ctypes.CDLL, native: Native):
        self.driver, self.native = driver, native
        self.before = self.total()

    def total(self) -> Counter[str]:
        handles = range(1, self.driver.no_op_driver_known() + 1)
        by_triton: Counter[str] = Counter()
        for handle in handles:
            name = self.driver.no_op_driver_name(handle).decode()
            by_triton[name] += self.driver.no_op_driver_count(handle)
        return by_triton + self.native.counts

    def since(self) -> Counter[str]:
        return self.total() - self.before


def product_float32(x_TH: torch.Tensor, rows_RH: torch.Tensor) -> torch.Tensor:
    """Allocates as the product on a GPU would; torch's on a CPU has no float32 result of 16-bit operands."""
    return x_TH.new_empty(x_TH.shape[0], rows_RH.shape[0], dtype=torch.float32)


@contextmanager
def pretend_gpu() -> Iterator[Any]:
    """Within this block CPU tensors pass for those of an sm_90; yields a function that starts a count.

    Raises:
        RuntimeError: this machine has a GPU, whose driver must not be replaced; or there is no C compiler.
    """
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: measure there with benchmarks.gpu_suite")
    driver, native = no_op_driver(), Native()
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver as active

    from flex_kernels import check, dispatch
    from flex_kernels.cuda import ops
    from flex_kernels.triton import codes, tiles, tune

    with ExitStack() as stack:
        replace = lambda owner, name, value: stack.enter_context(patch.object(owner, name, value))  # noqa: E731
        replace(nvidia, "libcuda_dirs", lambda: [str(Path(driver._name).parent)])
        device = nvidia.CudaDriver()
        device.get_current_device = lambda: 0
        device.get_current_stream = lambda index: 0
        device.get_device_capability = lambda index: divmod(CAPABILITY, 10)
        replace(active, "_active", device)
        for module in (tiles, tune, codes):
            replace(module, "capability_of", lambda device: CAPABILITY)
        replace(tiles, "multiprocessors", lambda device: MULTIPROCESSORS)
        replace(tune, "cache_file", lambda device: Path())
        replace(tune, "stored_plans", lambda path: {})
        replace(dispatch, "first_answer", lambda name, device_type: "")
        # On a GPU nobody looks at ids.
        replace(check, "check_ids", lambda ids_TK, experts: None)
        kernels = ops.RoutingKernels(native)  # type: ignore[arg-type]
        replace(ops, "kernels", lambda: kernels)
        replace(ops, "product_float32", product_float32)
        tune.plan_for.cache_clear()
        yield lambda: Launches(driver, native)
        tune.plan_for.cache_clear()
