"""What a run looks like while it runs: bars on a terminal, plain lines elsewhere, nothing when quiet.

The library tells an :class:`flex.observer.Observer`; these observers write. Time comes from the monotonic
clock, memory is that of this process (on a GPU: what torch holds there).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from flex.observer import Observer
from flex.report.data import human_bytes


class Lines(Observer, AbstractContextManager["Lines"]):
    """One line for each client that finished, each round and each evaluation; no bars.

    Args:
        stream: where to write; None is the standard error stream, so that results can be piped.
        title: put before every line, for example the strategy.
    """

    def __init__(self, stream: Any = None, title: str = ""):
        self.stream = stream or sys.stderr
        self.prefix = f"{title}: " if title else ""
        self.pace = Pace()
        self.losses: dict[str, float] = {}
        self.awaited: list[str] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str) -> None:
        print(f"{self.prefix}{text}", file=self.stream, flush=True)

    def round_started(self, round_: int, rounds: int, clients: Sequence[str]) -> None:
        self.pace.round_started(round_, rounds, len(clients))

    def selecting(self, round_: int, client: str) -> None:
        self.say(f"round {round_}, {client}: choosing the experts to copy")

    def client_started(self, round_: int, client: str, steps: int) -> None:
        self.pace.client_started(steps)

    def step(self, client: str, tokens: int, loss: float) -> None:
        self.pace.step(tokens)

    def client_finished(self, record: Mapping[str, Any]) -> None:
        speed = record["tokens"] / record["seconds"] if record["seconds"] else 0.0
        self.pace.client_finished()
        self.say(
            f"round {record['round']}, {record['client']}: training loss {record['loss_before']:.3f} -> "
            f"{record['loss_after']:.3f}, {plural(record['steps'], 'step')}, {speed:,.0f} tokens/s, "
            f"peak {human_bytes(record['peak_bytes'])}{self.remaining()}"
        )

    def remaining(self) -> str:
        left = self.pace.left()
        return f", about {duration(left)} left" if left else ""

    def client_refused(self, record: Mapping[str, Any]) -> None:
        self.pace.client_finished()
        self.say(f"round {record['round']}: REFUSED {record['reason']}")

    def round_finished(self, record: Mapping[str, Any]) -> None:
        self.say(
            f"round {record['round']} of {self.pace.rounds} done: {human_bytes(record['bytes_up'])} up, "
            f"{human_bytes(record['bytes_down'])} down"
        )

    def evaluation_started(self, round_: int, clients: Sequence[str]) -> None:
        self.losses = {}
        self.awaited = list(clients)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.losses[record["client"]] = record["loss"]
        if len(self.losses) == len(self.awaited):
            mean = sum(self.losses.values()) / len(self.losses)
            each = ", ".join(f"{name} {loss:.3f}" for name, loss in list(self.losses.items())[:8])
            more = ", ..." if len(self.losses) > 8 else ""
            when = "before training" if record["round"] == 0 else f"after round {record['round']}"
            self.say(f"held-out loss {when}: mean {mean:.3f} ({each}{more})")


class Pace:
    """How fast it goes and how long it will take."""

    def __init__(self) -> None:
        self.round = self.rounds = self.clients = self.steps = 0
        self.clients_done = self.steps_done = 0
        self.round_began = self.last_round_seconds = 0.0
        self.recent: list[tuple[float, int]] = []

    def round_started(self, round_: int, rounds: int, clients: int) -> None:
        now = time.monotonic()
        if self.round_began:
            self.last_round_seconds = now - self.round_began
        self.round, self.rounds, self.clients, self.round_began = round_, rounds, clients, now
        self.clients_done = self.steps = self.steps_done = 0

    def client_started(self, steps: int) -> None:
        self.steps, self.steps_done = steps, 0
        # The clock of the first step starts here; what came before was no training.
        self.recent = [(time.monotonic(), 0)]

    def step(self, tokens: int) -> None:
        self.steps_done += 1
        self.recent = [*self.recent[-8:], (time.monotonic(), tokens)]

    def client_finished(self) -> None:
        self.clients_done += 1
        self.steps = self.steps_done = 0

    def tokens_per_second(self) -> float:
        """Over the last few steps; 0 before the first."""
        if len(self.recent) < 2:
            return 0.0
        seconds = self.recent[-1][0] - self.recent[0][0]
        return sum(tokens for _, tokens in self.recent[1:]) / seconds if seconds else 0.0

    def fraction(self) -> float:
        """Of the round's training that is done."""
        inside = self.steps_done / self.steps if self.steps else 0.0
        return min((self.clients_done + inside) / self.clients, 1.0) if self.clients else 0.0

    def left(self) -> float:
        """Seconds until the last round's end, from the last whole round (its evaluation included), else from
        this one so far; 0 when nothing is known yet."""
        fraction = self.fraction()
        if not fraction:
            return 0.0
        whole = self.last_round_seconds or (time.monotonic() - self.round_began) / fraction
        return whole * (1 - fraction) + whole * (self.rounds - self.round)


class Bars(Lines):
    """The same lines above two bars: the rounds, and the steps of the client at work."""

    def __init__(self, stream: Any = None, title: str = ""):
        super().__init__(stream, title)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", style="dim"),
            console=Console(file=self.stream),
            transient=True,
        )
        self.all_rounds = self.progress.add_task(self.prefix + "starting", total=None, status="")
        self.one_client = self.progress.add_task("", total=None, status="", visible=False)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.progress.console.print(f"{self.prefix}{text}", markup=False, highlight=False)

    def show_rounds(self) -> None:
        left = self.pace.left()
        memory = memory_in_use()
        status = [f"about {duration(left)} left" if left else "", human_bytes(memory) if memory else ""]
        self.progress.update(
            self.all_rounds,
            description=f"{self.prefix}round {self.pace.round} of {self.pace.rounds}",
            total=self.pace.rounds,
            completed=self.pace.round - 1 + self.pace.fraction(),
            status=", ".join(filter(None, status)),
        )

    def show_client(self, description: str, total: int, completed: int, status: str = "") -> None:
        self.progress.update(
            self.one_client,
            description=f"  {description}",
            total=total,
            completed=completed,
            status=status,
            visible=True,
        )

    def round_started(self, round_: int, rounds: int, clients: Sequence[str]) -> None:
        super().round_started(round_, rounds, clients)
        self.show_rounds()

    def selecting(self, round_: int, client: str) -> None:
        self.show_client(f"{client}: choosing the experts to copy", 1, 0)

    def client_started(self, round_: int, client: str, steps: int) -> None:
        super().client_started(round_, client, steps)
        self.show_client(client, steps, 0)

    def step(self, client: str, tokens: int, loss: float) -> None:
        super().step(client, tokens, loss)
        status = f"loss {loss:.3f}, {self.pace.tokens_per_second():,.0f} tokens/s"
        self.show_client(client, self.pace.steps, self.pace.steps_done, status)
        self.show_rounds()

    def evaluation_started(self, round_: int, clients: Sequence[str]) -> None:
        super().evaluation_started(round_, clients)
        self.show_client("measuring", len(clients), 0)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        super().evaluated(record)
        self.show_client("measuring", len(self.awaited), len(self.losses), f"{record['client']} done")


class Quiet(Lines):
    """Writes only what must not be missed: refused updates."""

    def say(self, text: str) -> None:
        if "REFUSED" in text:
            super().say(text)


def observer_for(quiet: bool = False, stream: Any = None, title: str = "") -> Lines:
    """The observer that suits where its lines go; a context manager, to be entered around the run."""
    stream = stream or sys.stderr
    if quiet:
        return Quiet(stream, title)
    return Bars(stream, title) if stream.isatty() else Lines(stream, title)


def memory_in_use() -> int:
    """Bytes that torch holds on the GPU, else the process's resident memory; 0 where it cannot be told."""
    import torch

    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.memory_allocated()
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss


def duration(seconds: float) -> str:
    """For people: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
