"""What a run tells whoever watches it: the library is silent, a command line draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Observer:
    """Does nothing; override what you want to see. An exception raised in a method stops the run, which can
    be resumed.

    Rounds count from 1; round 0 is the pretrained model before any training. A ``record`` is the line that
    was written to the history (see docs/federation.md for its keys).
    """

    def run_started(self, record: Mapping[str, Any]) -> None:
        """Data and model are loaded; ``record["round"]`` is the last finished round (0 on a fresh run)."""

    def round_started(self, round_: int, rounds: int, clients: Sequence[str]) -> None:
        """``clients`` were sampled for this round."""

    def selecting(self, round_: int, client: str) -> None:
        """The client, here for the first time, is choosing the experts to copy."""

    def selected(self, record: Mapping[str, Any]) -> None: ...

    def client_started(self, round_: int, client: str, steps: int) -> None: ...

    def step(self, client: str, tokens: int, loss: float) -> None:
        """One optimiser step: ``tokens`` went through the model, ``loss`` is the mean over the answer's."""

    def client_finished(self, record: Mapping[str, Any]) -> None: ...

    def client_refused(self, record: Mapping[str, Any]) -> None:
        """The client's update was not finite and is left out of the round."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """The round is on disk: a run killed from here on continues after it."""

    def evaluation_started(self, round_: int, clients: Sequence[str]) -> None: ...

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """One client was measured."""

    def run_finished(self, record: Mapping[str, Any]) -> None: ...
