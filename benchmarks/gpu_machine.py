"""What the GPU suite runs on: code, versions, backends, the GPU, the tools of CUDA."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flex_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
# Where the code is that a measurement runs, and the names of its files.
SOURCES = ("flex_kernels", "flex", "csrc", "benchmarks")
ENDINGS = (".py", ".cu", ".cuh", ".cpp", ".h")


def machine() -> dict[str, Any]:
    """JSON's types alone, so that what is read back can be compared."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "source": source_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {
            n: version_of(n) for n in ("triton", "transformers", "peft", "liger_kernel", "scattermoe")
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": os.cpu_count(),
        "backends": {name: asdict(status) for name, status in backends().items()},
    }
    if found["gpu"]:
        properties = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
        found |= nvidia_smi()
    return found


def nvidia_smi() -> dict[str, str]:
    """The driver and the clocks, in the tool's words; nothing where it is missing or does not answer."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"nvidia_smi": text, "driver": text.strip().rpartition("\n")[2].partition(",")[0]}


def source_digest() -> str:
    """Twelve hexadecimal digits of the code that measurements run: a copy of the tree may have no history."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in ENDINGS:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """nvcc, where setup.py looks for it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def sanitizer() -> str | None:
    """compute-sanitizer, if it is here."""
    homes = (os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", "/usr/local/cuda/compute-sanitizer")
    return shutil.which("compute-sanitizer") or next(
        (found for home in homes if (found := shutil.which("compute-sanitizer", path=home))), None
    )
