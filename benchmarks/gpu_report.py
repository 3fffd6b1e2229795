"""The GPU suite's results on disk: one file, rewritten after every record, to which later runs add.

A run adds to the file that is in its folder when that was made by the same code on the same kind of machine;
what it measures again replaces what was measured before. Beside results of other code or another machine it
starts a file of its own, so no table mixes them and none is lost.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

NAME = "gpu_suite"
# What two runs must agree in, of :func:`benchmarks.gpu_machine.machine`, for their figures to stand side by
# side.
IDENTITY = ("gpu", "multiprocessors", "cpus", "python", "torch", "source")
# The fields that say what a record is about: a record of a later run replaces the one that agrees in them.
ABOUT = ("part", "case", "layer", "tokens", "skewed", "name", "backend", "dtype", "sizes", "what", "mix")


class Earlier(dict[str, Any]):
    """A record of an earlier run."""


class Report:
    """The results so far, on disk after every record; for several threads.

    Until :meth:`take_up` finds results to add to, it writes to a file that was not there.
    """

    def __init__(self, folder: Path, deadline: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.deadline = folder, deadline
        self.path = unused(folder)
        self.sections: dict[str, Any] = {}
        self.lock = threading.RLock()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def take_up(self, machine: dict[str, Any], parts: list[str]) -> None:
        """Begin a run on ``machine``: add to the results of the same code and machine, if there are some."""
        reasons = {}
        for path in existing(self.folder):
            found = read(path)
            reasons[path.name] = difference(found.get("machine") or {}, machine) if found else "unreadable"
            if not reasons[path.name]:
                self.path = path
                self.sections = {name: earlier(value) for name, value in found.items()}
                print(f"adding to {path}, of {len(found.get('runs', ()))} runs before", flush=True)
                break
        else:
            for name, reason in reasons.items():
                print(f"{name} is left as it is ({reason}): this run is {self.path.name}", flush=True)
        run = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "parts": parts, "driver": machine.get("driver")}
        self.sections["runs"] = [*self.sections.get("runs", ()), run]
        self.put("machine", machine)

    def put(self, section: str, value: Any) -> None:
        with self.lock:
            self.sections[section] = value
            self.write()

    def add(self, section: str, record: dict[str, Any]) -> None:
        with self.lock:
            about = subject(record)
            kept = [
                r
                for r in self.sections.get(section, ())
                if not (isinstance(r, Earlier) and subject(r) == about)
            ]
            self.sections[section] = [*kept, record]
            self.write()
            print(f"[{self.left():6.1f} s left] {section}: {json.dumps(record, default=str)}", flush=True)

    def begin(self, part: str) -> None:
        """Forget how an earlier run of ``part`` ended; its results stay until there are new ones."""
        with self.lock:
            ended = self.sections.get("parts")
            if ended:
                self.sections["parts"] = [
                    r for r in ended if not (isinstance(r, Earlier) and part in parts_of(r))
                ]

    def write(self) -> None:
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(finite(self.sections), indent=1, default=str, allow_nan=False))
        os.replace(beside, self.path)

    def keep_plans(self, plans: Path) -> None:
        """Add tuned plans to those beside the results."""
        target = self.path.with_name(self.path.name.replace(NAME, "tuned_plans"))
        target.write_text(json.dumps(read(target) | read(plans), indent=1))


def existing(folder: Path) -> list[Path]:
    """The results in ``folder``, the latest first."""
    return sorted(folder.glob(f"{NAME}*.json"), key=lambda path: path.stat().st_mtime, reverse=True)


def unused(folder: Path) -> Path:
    """gpu_suite.json, or the first of gpu_suite_2.json, gpu_suite_3.json, ... that is not there."""
    path, number = folder / f"{NAME}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{NAME}_{number}.json"
    return path


def read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where it cannot be read as an object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What keeps the figures of two machines from one table; "" when nothing does.

    A package that only one of them has is no difference: a peer may be brought along later.
    """
    found = [f"{f}: {before.get(f)}, now {now.get(f)}" for f in IDENTITY if before.get(f) != now.get(f)]
    had, has = before.get("packages") or {}, now.get("packages") or {}
    for name in sorted(had.keys() & has.keys()):
        if had[name] and has[name] and had[name] != has[name]:
            found.append(f"{name}: {had[name]}, now {has[name]}")
    return "; ".join(found)


def earlier(value: Any) -> Any:
    """A section as an earlier run left it, its records marked as such."""
    if not isinstance(value, list):
        return value
    return [Earlier(record) if isinstance(record, dict) else record for record in value]


def subject(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{f}={json.dumps(record[f], default=str)}" for f in ABOUT if f in record)


def parts_of(record: dict[str, Any]) -> list[str]:
    """The parts that a record of the section "parts" is about; after them may come the number of a shard."""
    label = str(record.get("part", "")).split(maxsplit=1)
    return label[0].split("+") if label else []


def finite(value: Any) -> Any:
    """``value`` with infinities and NaN as text, which JSON has no numbers for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value
