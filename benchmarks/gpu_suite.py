"""One command that proves and measures the GPU path; without a GPU, the parts that need none.

    python -m benchmarks.gpu_suite --out DIR [--minutes 9] [--parts NAME ...] [--quick]

On a GPU: builds the extension, compares every kernel and the layer with float64, measures the layer beside
its peers and a client's whole step, runs the GPU tests and compute-sanitizer, tunes. Every part has its own
time limit and processes of its own (gpu_worker.py), the most important part first: what breaks or hangs costs
one case, and what the time runs out on is the least of it. Without a GPU: compiles every Triton kernel for
sm_80 and sm_90, checks registers, spills and shared memory against the committed baseline, and runs the same
parts on the CPU at toy sizes, whose times say nothing. Results go to DIR/gpu_suite.json after every case,
written beside it and renamed: a killed run keeps what it had. A later run into the same folder adds to it, or
starts a file of its own where code or machine are others (gpu_report.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_layers import DENSE
from benchmarks.gpu_machine import compiler, machine, sanitizer
from benchmarks.gpu_report import Report
from benchmarks.gpu_summary import PEERS, shown, summarise
from benchmarks.gpu_worker import ROOT, Work, end, run_part, start
from flex_kernels import backends

BASELINE = ROOT / "tests" / "triton_codegen_baseline.json"
# Compiled kernels outlive the run, so that a second command on the same machine finds them.
CACHE = Path(tempfile.gettempdir()) / f"flex-kernels-gpu-suite-{os.getuid()}"
# What --parts accepts, in the order in which they run.
PARTS = ("build", "checks", "warm", "kernels", "targets", "client", "tests", "sanitizer")
PARTS += ("launches", "compiled", "liger", "tune", "others", "codegen")
# Seconds that the first parts, which run side by side, may take; and the limits of the others.
TOGETHER_S = 125
CUDA_CHECKS_S, TARGETS_S, CLIENT_S, TESTS_S = 45, 160, 80, 75
LAUNCHES_S, COMPILED_S, LIGER_S, TUNE_S, OTHERS_S = 30, 40, 240, 90, 300
# Seconds a case may take: a hang costs no more.
CHECK_CASE_S, WARM_CASE_S, CASE_S, CLIENT_CASE_S, COMPILED_CASE_S = 100, 100, 45, 45, 30
LIGER_CASE_S, TUNE_CASE_S = 100, 85
# Seconds kept for the summary, and the least that is worth starting a part for.
LAST_S, LEAST_S = 5, 10
# Processes side by side for each of the first parts.
SHARDS, WARM_SHARDS = (max(1, min(most, (os.cpu_count() or 1) * most // 16)) for most in (5, 8))
# Of the tests of quantised experts, those that few kernels have to be compiled for.
QUANTISED_TESTS = "(every_value and bfloat16) or captured or format"
KERNEL_TESTS = ("tests/triton_suite_kernels.py",)
SANITIZED = "odd_sizes or skipped or permute"
# Of the CUDA kernels' tests, those that run on the GPU: their twins on the CPU need none.
ON_GPU_TESTS = "not emulated"
FAILED_LINES = 15


def command(report: Report, name: str, arguments: list[str], limit: float, **environment: str) -> bool:
    """Run a command within the time that is left; its outcome and the end of its output become a record."""
    began = time.monotonic()
    limit = max(1.0, min(limit, report.left() - LAST_S))
    try:
        process = start(arguments, environment, stdin=subprocess.DEVNULL)
    except OSError as error:
        report.add("commands", {"name": name, "passed": False, "output": str(error)})
        return False
    try:
        output, _ = process.communicate(timeout=limit)
        code = process.returncode
    except subprocess.TimeoutExpired:
        end(process)
        output, _ = process.communicate()
        code, output = -1, f"{output}\nstopped after {limit:.0f} s"
    finally:
        end(process)
    seconds = round(time.monotonic() - began, 1)
    report.add("commands", {"name": name, "passed": code == 0, "seconds": seconds, "output": output[-3000:]})
    return code == 0


class Suite:
    """One run: which parts are asked for, and how they are started."""

    def __init__(self, report: Report, parts: list[str], device: str, seed: int):
        self.report, self.parts, self.device, self.seed = report, parts, device, seed
        self.environment = {
            "TRITON_CACHE_DIR": str(CACHE / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
            # Plans that were tuned before must not meet what is called pinned here.
            "XDG_CACHE_HOME": str(CACHE / "pinned"),
        }
        # What torch wants for deterministic products, which checks and tests ask for and no measurement does.
        self.deterministic = self.environment | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        shutil.rmtree(CACHE / "pinned", ignore_errors=True)

    def wants(self, part: str) -> bool:
        """Whether the part is asked for and there is time to start it."""
        if part not in self.parts:
            return False
        if self.report.left() < LEAST_S + LAST_S:
            self.report.add("parts", {"part": part, "skipped": "out of time"})
            return False
        self.report.begin(part)
        return True

    def work(
        self,
        part: str,
        names: tuple[str, ...],
        limit: float,
        case_limit: float,
        shards: int = 1,
        **options: Any,
    ) -> None:
        """One part in workers, ``shards`` of them side by side."""
        if not self.wants(part):
            return
        environment = self.deterministic if part == "checks" else self.environment
        environment = environment | options.pop("environment", {})
        if shards > 1:
            threads = str(max(1, (os.cpu_count() or 1) // (2 * shards)))
            environment["OMP_NUM_THREADS"] = threads
        limit = min(limit, self.report.left() - LAST_S)
        works = [
            Work((part,), self.device, names, self.seed, i, shards, environment=environment, **options)
            for i in range(shards)
        ]
        self.together(
            *(lambda w=w: run_part(w, limit, case_limit, self.report.add) for w in works),
        )

    def together(self, *jobs: Callable[[], object]) -> None:
        """Run jobs side by side; one that raises is a failed record, and the others go on."""
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            for job in [pool.submit(job) for job in jobs]:
                error = job.exception()
                if error is not None:
                    text = "".join(traceback.format_exception(error))
                    self.report.add("parts", {"part": "the suite itself", "failed": text[-2000:]})

    def tests(self, part: str, name: str, files: list[str], limit: float, workers: int = 4) -> None:
        if not self.wants(part):
            return
        spread = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
        command(self.report, name, [*PYTEST, *spread, *files], limit, **self.deterministic)


PYTEST = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-rfE", "--maxfail=60"]
PYTEST += ["-p", "no:cacheprovider"]


def unbuilt() -> bool:
    """Whether the CUDA extension is not there."""
    return importlib.util.find_spec("flex_kernels._cuda_ops") is None


def usable_backends(report: Report) -> tuple[str, ...]:
    """Our backends that run here, seen by a process that finds what was just built."""
    code = (
        "import json; from benchmarks.gpu_machine import machine; print(json.dumps(machine(), default=str))"
    )
    report.begin("machine")
    process = start([sys.executable, "-c", code], {}, stdin=subprocess.DEVNULL)
    try:
        found = json.loads(process.communicate(timeout=60)[0].strip().splitlines()[-1])
        report.put("machine", found)
        return tuple(n for n in ("cuda", "triton") if found["backends"][n]["available"])
    except (subprocess.TimeoutExpired, ValueError, LookupError) as error:
        report.add("parts", {"part": "machine", "failed": f"{type(error).__name__}: {error}"})
        return ("triton",)
    finally:
        end(process)


def by_health(names: tuple[str, ...], sections: dict[str, Any]) -> tuple[str, ...]:
    """``names``, those behind whose checks mostly failed or never ended: the first is the one measured."""

    def broken(name: str) -> bool:
        passed = [r["passed"] for r in sections.get("checks", ()) if r.get("backend") == name]
        return sum(passed) * 2 <= len(passed)

    return tuple(sorted(names, key=broken))


def on_gpu(suite: Suite) -> None:
    report, cpus, triton = suite.report, os.cpu_count() or 1, ("triton",)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]

    def built() -> None:
        # What a later run measures on a fresh machine is to be what the first one measured.
        if suite.wants("build") or (unbuilt() and compiler()):
            command(report, "build the extension", build, TOGETHER_S, FLEX_KERNELS_CUDA="1")

    # Nothing here is timed, and all of it is compiling: side by side.
    suite.together(
        built,
        lambda: suite.work("checks", triton, TOGETHER_S, CHECK_CASE_S, SHARDS),
        lambda: suite.work("warm", triton, TOGETHER_S, WARM_CASE_S, WARM_SHARDS),
        lambda: suite.tests("kernels", "Triton's kernels alone", list(KERNEL_TESTS), TOGETHER_S),
    )
    names = usable_backends(report)
    if not names:
        report.add(
            "parts", {"part": "machine", "failed": "no GPU backend runs here", "backends": str(backends())}
        )
        return
    if "cuda" in names:
        suite.work("checks", ("cuda",), CUDA_CHECKS_S, CHECK_CASE_S, SHARDS)
        names = by_health(names, report.sections)
    suite.work("targets", names, TARGETS_S, CASE_S)
    suite.work("client", names, CLIENT_S, CLIENT_CASE_S, alone=True)
    suite.together(
        # Nearly all of their time is compiling.
        lambda: suite.tests(
            "tests", "the GPU tests", [*gpu_tests(), "-k", ON_GPU_TESTS], TESTS_S, max(4, cpus // 2)
        ),
        lambda: suite.tests("tests", "tests of quantised experts", [*CODES, "-k", QUANTISED_TESTS], TESTS_S),
        lambda: sanitize(suite),
    )
    suite.work("launches", names, LAUNCHES_S, CASE_S)
    suite.work("compiled", names, COMPILED_S, COMPILED_CASE_S)
    workers = min(12, cpus)
    # A worker that starts again finds what liger's autotuner has measured.
    remembered = {"TRITON_CACHE_AUTOTUNING": "1"}
    suite.work("liger", names, LIGER_S, LIGER_CASE_S, workers=workers, environment=remembered)
    tuned = CACHE / "tuned"
    shutil.rmtree(tuned, ignore_errors=True)
    place = {"XDG_CACHE_HOME": str(tuned)}
    suite.work("tune", names, TUNE_S, TUNE_CASE_S, workers=workers, environment=place)
    for plans in (tuned / "flex-kernels").glob("*.json"):
        report.keep_plans(plans)
    suite.work("others", names, OTHERS_S, CASE_S)
    if "codegen" in suite.parts and report.left() > 60:
        codegen(report, quick=True)


CODES = ["tests/triton_suite_codes.py"]


def gpu_tests() -> list[str]:
    """The tests of the layer on Triton and of the CUDA kernels, less those of the compiler's output."""
    cuda = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_cuda_*.py"))
    return ["tests/triton_suite_layer.py", *(name for name in cuda if "codegen" not in name)]


def sanitize(suite: Suite) -> None:
    if not suite.wants("sanitizer"):
        return
    tool = sanitizer()
    if tool is None:
        record = {"name": "compute-sanitizer", "missing": "not on PATH or in CUDA_HOME"}
        suite.report.add("commands", record)
        return
    arguments = [tool, "--error-exitcode", "9", *PYTEST, *KERNEL_TESTS, "-k", SANITIZED]
    command(suite.report, "compute-sanitizer memcheck", arguments, TESTS_S, **suite.deterministic)


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


def without_gpu(suite: Suite, quick: bool) -> None:
    suite.report.put("note", "no GPU: toy sizes on the CPU exercise the code, and their times say nothing")
    names = ("cpu",) if backends()["cpu"].available else ("reference",)
    parts = tuple(
        p
        for p in ("checks", "warm", "targets", "client", "launches", "compiled", "others")
        if p in suite.parts
    )
    if parts:
        work = Work(parts, "cpu", names, suite.seed, environment=suite.environment)
        run_part(work, suite.report.left() - LAST_S, 120, suite.report.add)
    if "codegen" in suite.parts:
        codegen(suite.report, quick)


# What the names of cases hold in which nothing of ours runs.
PEER_CASES = (*PEERS, DENSE, "('grouped_mm',)", "('eager',)")


def failures(sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is wrong with us: a peer that does not run here is recorded, and is no failure."""
    for name in ("commands", "checks", "codegen"):
        yield from (record for record in sections.get(name, ()) if not record.get("passed", True))
    for record in sections.get("parts", ()):
        if "failed" in record and not any(peer in str(record.get("case", "")) for peer in PEER_CASES):
            yield record
    for name in ("measurements", "tuned"):
        yield from (
            r
            for r in sections.get(name, ())
            if r["name"].startswith("flex") and any("failed" in k for k in r)
        )


def finish(report: Report) -> int:
    """Put the summary beside the records and print it last; 1 with failures, else 0."""
    bad = list(failures(report.sections))
    report.put("failures", len(bad))
    for record in bad[:FAILED_LINES]:
        print("FAILED", json.dumps(record, default=str)[:400], flush=True)
    if len(bad) > FAILED_LINES:
        print(f"and {len(bad) - FAILED_LINES} more failures in {report.path}")
    try:
        summary = summarise(report.sections)
        report.put("summary", summary)
        print(f"\n{shown(summary)}\n")
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        report.put("summary", {"failed": traceback.format_exc()[-2000:]})
        print(traceback.format_exc())
        bad.append({"part": "summary"})
    print(f"{report.path}: {len(bad)} failures")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_suite.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="time to stay within (default 9)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--quick", action="store_true", help="without a GPU: leave the small-tile kernels out"
    )
    options = parser.parse_args(argv)
    report = Report(options.out, time.monotonic() + 60 * options.minutes)
    try:
        report.take_up(machine(), options.parts)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        suite = Suite(report, options.parts, device, seed=int(time.time()))
        if device == "cuda":
            on_gpu(suite)
        else:
            without_gpu(suite, options.quick)
    except Exception:
        # Whatever it is, what was found so far is summed up and printed.
        report.add("parts", {"part": "the suite itself", "failed": traceback.format_exc()[-2000:]})
    return finish(report)


if __name__ == "__main__":
    raise SystemExit(main())
