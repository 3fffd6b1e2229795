"""Runs the suite's cases in processes of their own: a crash, a hang or a broken device costs one case.

A part is a list of cases, the same list in every process that asks for it. The worker announces each case on
its standard output, then the case's records, one JSON object a line. The parent passes records on as they
come, ends a worker whose case takes too long, and starts the next one behind the case that ended badly.

    python -m benchmarks.gpu_worker PART[,PART] --device cuda --backends cuda,triton
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "@suite "
# A case that breaks the device ends its process with this code, so that the next case starts on a fresh one.
DEVICE_BROKEN = 70
# Seconds a worker may take before its first case: imports, and a machine busy with other workers.
STARTUP_S = 90
# How often a part starts again behind a case that ended badly.
RESTARTS = 12
# Becomes the leader of a group of its own, so that a process and all that it starts can be ended together;
# not of a session, so that it does not outlive the shell that runs the suite.
GROUP = "import os, sys; os.setpgrp(); os.execvp(sys.argv[1], sys.argv[1:])"

Receive = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """What one worker is asked for.

    Attributes:
        parts: names in :data:`benchmarks.gpu_parts.PARTS`, one list of cases after another.
        device: "cuda" or "cpu". backends: of ours, the one to report first. seed: of random data.
        shard, shards: every ``shards``-th case from ``shard`` on. alone: a new process for every case.
        workers: processes that a case may start to compile.
    """

    parts: tuple[str, ...]
    device: str
    backends: tuple[str, ...]
    seed: int = 0
    shard: int = 0
    shards: int = 1
    alone: bool = False
    workers: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Ended:
    """How one worker process ended: ``case`` is the number of the case that it left unfinished, -1 if none
    was begun."""

    reason: str
    case: int
    name: str
    finished: bool
    output: str


def start(arguments: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen:
    """A process that leads its own group, from the root of the source tree."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", GROUP, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def end(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # Before it became the leader of its group there is no group of its number.
    process.kill()
    process.wait()


def run_part(work: Work, limit_s: float, case_limit_s: float, receive: Receive) -> None:
    """Run the cases of ``work`` within ``limit_s``, each within ``case_limit_s``.

    ``receive`` gets (section, record); also what went wrong, as records with ``failed`` in section "parts".
    """
    deadline = time.monotonic() + limit_s
    label = "+".join(work.parts) + (f" {work.shard + 1}/{work.shards}" if work.shards > 1 else "")
    first = restarts = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            receive("parts", {"part": label, "stopped": f"its {limit_s:.0f} s are over", "next_case": first})
            return
        ended = run_worker(work, first, left, case_limit_s, receive)
        if ended.finished:
            return
        first = max(first, ended.case + 1)
        if ended.reason == "next":
            continue
        if ended.reason == "time":
            receive(
                "parts", {"part": label, "stopped": f"its {limit_s:.0f} s are over", "during": ended.name}
            )
            return
        restarts += 1
        record = {"part": label, "case": ended.name, "failed": ended.reason, "output": ended.output}
        receive("parts", record)
        if restarts > RESTARTS or ended.case < 0:
            receive("parts", {"part": label, "failed": f"given up after {restarts} failures"})
            return


def run_worker(work: Work, first: int, left_s: float, case_limit_s: float, receive: Receive) -> Ended:
    """One worker process, from case ``first`` of its shard on."""
    command = [sys.executable, "-m", "benchmarks.gpu_worker", ",".join(work.parts)]
    command += ["--device", work.device, "--backends", ",".join(work.backends), "--seed", str(work.seed)]
    command += ["--shard", str(work.shard), "--shards", str(work.shards), "--first", str(first)]
    command += ["--workers", str(work.workers)]
    process = start(command + ["--alone"] * work.alone, work.environment, stdin=subprocess.PIPE)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=pump, args=(process, lines), daemon=True).start()
    ended = Ended("", -1, "", False, "")
    output: deque[str] = deque(maxlen=30)
    deadline = time.monotonic() + left_s
    case_end = time.monotonic() + max(STARTUP_S, case_limit_s)
    running = False
    try:
        while True:
            wait = min(deadline, case_end) - time.monotonic()
            try:
                line = lines.get(timeout=max(wait, 0.0)) if wait > 0 else None
            except queue.Empty:
                continue
            if wait <= 0:
                ended.reason = "time" if time.monotonic() >= deadline else f"over {case_limit_s:.0f} s"
                break
            if line is None:
                code = process.wait()
                ended.reason = "the device is unusable" if code == DEVICE_BROKEN else f"exit code {code}"
                break
            message = parsed(line)
            if message is None:
                output.extend([line] if line.strip() else [])
            elif "case" in message:
                ended.case, ended.name, running = message["case"], message["name"], True
                case_end = time.monotonic() + case_limit_s
            elif "end" in message:
                running = False
                case_end = time.monotonic() + STARTUP_S
            elif "next" in message:
                ended.reason = "next"
                break
            elif "done" in message:
                ended.finished = True
                break
            else:
                receive(message["section"], message["record"])
    finally:
        end(process)
    if not running and not ended.finished and ended.reason != "next" and ended.case >= 0:
        ended.name = f"after {ended.name}"
    ended.output = "".join(output)[-2000:]
    return ended


def pump(process: subprocess.Popen, lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def parsed(line: str) -> dict[str, Any] | None:
    """A message of the worker's; None for anything else that it prints."""
    if not line.startswith(MARK):
        return None
    try:
        message = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def tell(message: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(message, default=str)}", flush=True)


def chosen(options: argparse.Namespace) -> Iterator[tuple[int, str, Any]]:
    """(number, part, case) of the cases to run."""
    from benchmarks.gpu_parts import PARTS

    cases = [(name, case) for name in options.parts.split(",") for case in PARTS[name].cases(options)]
    for number, (name, case) in enumerate(cases[options.shard :: options.shards]):
        if number >= options.first:
            yield number, name, case


def leave_with_parent() -> None:
    """End this process when the pipe to its parent closes: the parent was killed."""
    sys.stdin.read()
    os._exit(1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_worker")
    parser.add_argument("parts")
    parser.add_argument("--device", required=True)
    parser.add_argument("--backends", required=True, type=lambda text: [n for n in text.split(",") if n])
    for name in ("seed", "shard", "first"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("shards", "workers"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args(argv)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    from benchmarks import gpu_parts

    cases = list(chosen(options))
    for number, part, case in cases:
        tell({"case": number, "name": f"{part}: {case}"})
        for section, record in gpu_parts.run_case(gpu_parts.PARTS[part], options, case):
            tell({"section": section, "record": {"part": part} | record if section == "parts" else record})
        if not gpu_parts.device_works(options.device):
            sys.stdout.flush()
            os._exit(DEVICE_BROKEN)
        tell({"end": number})
        if options.alone and number != cases[-1][0]:
            tell({"next": number + 1})
            return
    tell({"done": True})


if __name__ == "__main__":
    main()
