"""Kills a federation at its writes, resumes it, and prints what became of it: the body of test_resume.

Run as a program, in a process of its own with one thread: it forks before each run, which a process with a
pool of threads must not do. Arguments: folder of a tiny model, file of rows, working folder, strategy, and
the numbers of the writes to die at ("all" for every one). Prints one JSON line a run: {"killed_at": n or
null, "exit": status, "state": ...}.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tiny import tiny_config

import flex.files
from flex.config import Config
from flex.data import load_clients
from flex.federation import run
from flex.history import read_history
from flex.session import load_session
from flex.store import Store

TIMING = ("seconds", "peak_bytes")


def state_of(folder: Path) -> dict[str, object]:
    """Everything a run computed: hashes of its tensors' files, and its history less what the clock says."""
    tensors = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    history = [{k: v for k, v in event.items() if k not in TIMING} for event in read_history(folder)]
    return {"tensors": tensors, "history": history, "left": len(list(folder.rglob("*.tmp")))}


def in_child(function: Callable[[], object]) -> int:
    """Runs ``function`` in a fork; returns how that ended: 0, or minus the signal."""
    child = os.fork()
    if not child:
        try:
            function()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, config: Config) -> None:
    """Runs ``config``; the process dies by SIGKILL just before its ``number``-th file would be renamed into
    place.
    """
    count = 0
    replace = os.replace

    def deadly(source, target):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    flex.files.os.replace = deadly
    run(config)


def main(model: str, rows: str, work: str, strategy: str, *numbers: str) -> None:
    torch.set_num_threads(1)

    def config(name: str) -> Config:
        return tiny_config(
            Path(model),
            Path(rows),
            Path(work) / name,
            federation={"strategy": strategy, "clients_per_round": 2},
            evaluation={"generate": False, "clients": 2, "rows": 2},
            shared={"dropout": 0.1},
        )

    def report(number: int | None, status: int, name: str) -> None:
        print(
            json.dumps({"killed_at": number, "exit": status, "state": state_of(Path(work) / name)}),
            flush=True,
        )

    # Loaded once and dropped: forked children then find every module imported.
    load_session(config("whole"), load_clients(config("whole")), Store(Path(work) / "whole"))
    importlib.import_module("flex.evaluate")
    report(None, in_child(partial(run, config("whole"))), "whole")
    for number in range(1, 100) if numbers == ("all",) else map(int, numbers):
        name = f"killed-{number}"
        status = in_child(partial(killed_at, number, config(name)))
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        folder = Path(work) / name
        started = (folder / "config.toml").exists()
        # Before its settings are on disk there is no run to resume, and the folder is free for a new one.
        resumed = partial(run, resume=folder) if started else partial(run, config(name))
        status = in_child(resumed)
        report(number, status, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
