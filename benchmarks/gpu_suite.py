"""One command that proves and measures the GPU path; without a GPU, the parts that need none.

    python -m benchmarks.gpu_suite --out DIR [--minutes 9] [--quick]

On a GPU: builds the extension, compares the layer with float64, measures it beside its peers, runs the GPU
tests and compute-sanitizer. Without one: compiles every Triton kernel for sm_80 and sm_90, checks registers,
spills and shared memory against the committed baseline, and runs the checks and the measuring code on the CPU
at toy sizes, whose times say nothing. Results go to DIR/gpu_suite.json after every case, written beside it
and renamed: a killed run keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_checks import QUANTISED_SIZES, QUANTISED_TINY, SIZES, TINY, check_layers
from benchmarks.gpu_layers import FAILURES, make_problem
from benchmarks.gpu_measure import measure, rates
from benchmarks.roofline import LAYERS, Chip, Layer
from flex_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "tests" / "triton_codegen_baseline.json"
# Seconds kept from the measurements for the tests that follow them.
RESERVE_S = 130
TOY = Layer("toy", 64, 32, 6, 2, 48)
# The most telling cases first: what the time runs out on is the least of it.
CASES = [(layer, tokens, skewed) for tokens, skewed in ((8192, False), (128, False)) for layer in LAYERS]
CASES += [(layer, tokens, False) for tokens in (1024, 16, 32768) for layer in LAYERS]
CASES += [(layer, 8192, True) for layer in LAYERS]
# Tokens for which 8- and 4-bit experts are measured too: decoded in the main loop, and ahead of it.
QUANTISED_TOKENS = (16, 128, 8192)
# Of the tests of quantised experts, those that few kernels have to be compiled for.
QUANTISED_TESTS = "(every_value and bfloat16) or captured or format"


class Report:
    """The results so far, on disk after every record."""

    def __init__(self, folder: Path, deadline: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.deadline = folder / "gpu_suite.json", deadline
        self.sections: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def put(self, section: str, value: Any) -> None:
        self.sections[section] = value
        self.write()

    def add(self, section: str, record: dict[str, Any]) -> None:
        self.sections.setdefault(section, []).append(record)
        self.write()
        print(f"[{self.left():6.1f} s left] {section}: {json.dumps(record)}", flush=True)

    def write(self) -> None:
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.sections, indent=1, default=str))
        os.replace(beside, self.path)


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {name: asdict(status) for name, status in backends().items()},
    }
    if found["gpu"]:
        properties = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
        if shutil.which("nvidia-smi"):
            found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout
    return found


def command(report: Report, name: str, arguments: list[str], limit: float, **environment: str) -> bool:
    """Run a command within the time that is left; its outcome and the end of its output become a record."""
    started = time.monotonic()
    limit = max(1.0, min(limit, report.left()))
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=limit
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        code, output = -1, f"stopped after {limit:.0f} s\n" + str(expired.stdout or "")
    seconds = round(time.monotonic() - started, 1)
    report.add("commands", {"name": name, "passed": code == 0, "seconds": seconds, "output": output[-3000:]})
    return code == 0


def codegen(report: Report, quick: bool) -> None:
    """Registers, spills and shared memory of every Triton kernel, with no GPU."""
    import triton

    from flex_kernels.triton import codegen as compiler

    chosen = compiler.cases()
    if quick:
        chosen = {name: case for name, case in chosen.items() if " m16 " not in name}
    baseline = json.loads(BASELINE.read_text()).get(triton.__version__, {})
    for name, found in compiler.compile_all(chosen, threads=min(8, os.cpu_count() or 1)).items():
        limit = compiler.SHARED_LIMIT[chosen[name][1]]
        was = baseline.get(name)
        passed = found.stack == 0 and found.shared <= limit
        passed &= was is None or found.registers <= was["registers"] + 8
        report.add(
            "codegen", {"name": name, "passed": passed, "in_baseline": was is not None} | asdict(found)
        )


def checks(report: Report, names: list[str], device: str) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    plain, quantised = (SIZES, QUANTISED_SIZES) if device == "cuda" else (TINY, QUANTISED_TINY)
    seed = int(time.time())
    # 8- and 4-bit experts in one type alone: every type compiles kernels of its own.
    for sizes, types in ((plain, dtypes), (quantised, dtypes[:1])):
        for record in check_layers(names, device, sizes, types, seed):
            report.add("checks", record | {"seed": seed})
            if report.left() < 60:
                return


def offsets_beyond_31_bits(report: Report, names: list[str]) -> None:
    """Expert weights of more than 2^31 elements: the last expert must give what it gives alone."""
    E, H, I = 160, 4096, 2048
    gate_up = torch.empty(E, 2 * I, H, dtype=torch.bfloat16, device="cuda").normal_(0, H**-0.5)
    down = torch.empty(E, H, I, dtype=torch.bfloat16, device="cuda").normal_(0, I**-0.5)
    from flex_kernels import Experts, Routed, flex_moe

    x = torch.randn(64, H, dtype=torch.bfloat16, device="cuda")
    ones = torch.ones(64, 1, device="cuda")
    for name in names:
        last, only = (
            torch.full((64, 1), E - 1, device="cuda"),
            torch.zeros(64, 1, dtype=torch.int, device="cuda"),
        )
        far = flex_moe(x, Routed(last, ones), Experts(gate_up, down), backend=name)
        near = flex_moe(x, Routed(only, ones), Experts(gate_up[-1:], down[-1:]), backend=name)
        error = ((far - near).norm() / near.norm()).item()
        report.add(
            "checks", {"backend": name, "what": "2^31 elements", "error": error, "passed": error < 1e-2}
        )


def measurements(report: Report, names: list[str], device: str) -> None:
    found = rates(device)
    report.put("rates", found)
    chip = Chip("measured in this run", found["matmul_flops_per_s"], found["copy_bytes_per_s"])
    for layer, tokens, skewed in CASES if device == "cuda" else [(TOY, 16, False), (TOY, 16, True)]:
        if report.left() < RESERVE_S:
            report.add("measurements", {"layer": layer.name, "tokens": tokens, "skipped": "out of time"})
            continue
        problem = make_problem(layer, tokens, device, torch.bfloat16, skewed)
        quantised = tokens in QUANTISED_TOKENS and not skewed
        for record in measure(problem, names, device, chip, quantised):
            report.add("measurements", record | {"skewed": skewed})
        del problem


def sanitizer() -> str | None:
    """compute-sanitizer, if it is here."""
    homes = (os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", "/usr/local/cuda/compute-sanitizer")
    return shutil.which("compute-sanitizer") or next(
        (found for home in homes if (found := shutil.which("compute-sanitizer", path=home))), None
    )


def on_gpu(report: Report) -> None:
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    command(report, "build the extension", build, 150, FLEX_KERNELS_CUDA="1")
    names = [name for name in ("cuda", "triton") if backends()[name].available]
    report.put("machine", machine())
    if not names:
        raise SystemExit(f"no GPU backend runs here: {backends()}")
    checks(report, names, "cuda")
    try:
        offsets_beyond_31_bits(report, names)
    except FAILURES as error:
        report.add("checks", {"what": "2^31 elements", "passed": False, "failed": str(error)[:400]})
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    suites = ["tests/triton_suite_kernels.py", "tests/triton_suite_layer.py"]
    cublas = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command(report, "Triton's tests on the GPU", pytest + suites, 150, **cublas)
    some = [*pytest, "tests/triton_suite_codes.py", "-k", QUANTISED_TESTS]
    command(report, "Triton's tests of quantised experts on the GPU", some, 90, **cublas)
    measurements(report, names, "cuda")
    cuda_tests = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_cuda_*.py"))
    command(report, "the CUDA kernels' tests", pytest + cuda_tests, 90)
    tool = sanitizer()
    if tool is None:
        report.add("commands", {"name": "compute-sanitizer", "missing": "not on PATH or in CUDA_HOME"})
    else:
        some = [*pytest, *suites, "-k", "odd_sizes or skipped or permute"]
        command(report, "compute-sanitizer memcheck", [tool, "--error-exitcode", "9", *some], 60, **cublas)


def without_gpu(report: Report, quick: bool) -> None:
    report.put("note", "no GPU: toy sizes on the CPU exercise the code, and their times say nothing")
    names = ["cpu"] if backends()["cpu"].available else []
    checks(report, names or ["reference"], "cpu")
    measurements(report, names, "cpu")
    codegen(report, quick)


def failures(sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("commands", "checks", "codegen"):
        yield from (record for record in sections.get(name, ()) if not record.get("passed", True))
    yield from (record for record in sections.get("measurements", ()) if "failed" in record)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_suite.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="time to stay within (default 9)")
    parser.add_argument(
        "--quick", action="store_true", help="without a GPU: leave the small-tile kernels out"
    )
    options = parser.parse_args(argv)
    report = Report(options.out, time.monotonic() + 60 * options.minutes)
    report.put("machine", machine())
    if torch.cuda.is_available():
        on_gpu(report)
    else:
        without_gpu(report, options.quick)
    bad = list(failures(report.sections))
    report.put("failures", len(bad))
    for record in bad:
        print("FAILED", json.dumps(record, default=str)[:600], flush=True)
    print(f"{report.path}: {len(bad)} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
