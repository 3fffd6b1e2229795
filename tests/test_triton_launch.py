"""Triton's launches up to the driver's door, on a machine without a GPU: triton_suite_launch.py in a process
that finds a driver without a device."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent


@pytest.mark.skipif(not shutil.which("gcc"), reason="Triton's launcher takes a C compiler")
def test_launches_reach_the_driver(tmp_path):
    library = tmp_path / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = HERE / "emulation" / "cuda_driver.c"
    build = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", f"-I{headers}", str(source)]
    subprocess.run([*build, f"-Wl,-soname,{library.name}", "-o", str(library)], check=True)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("LD_LIBRARY_PATH"))))
    environment = os.environ | {"LD_LIBRARY_PATH": path, "TRITON_LIBCUDA_PATH": str(tmp_path)}
    environment |= {"TRITON_INTERPRET": "0", "CUDA_DRIVER_LOG": str(tmp_path / "driver.jsonl")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "driver.jsonl").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command.append(str(HERE / "triton_suite_launch.py"))
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
