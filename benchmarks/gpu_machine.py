"""What the GPU suite runs on: versions, backends, the GPU, compute-sanitizer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from flex_kernels import backends


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
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
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
        if shutil.which("nvidia-smi"):
            found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    return found


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sanitizer() -> str | None:
    """compute-sanitizer, if it is here."""
    homes = (os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", "/usr/local/cuda/compute-sanitizer")
    return shutil.which("compute-sanitizer") or next(
        (found for home in homes if (found := shutil.which("compute-sanitizer", path=home))), None
    )
