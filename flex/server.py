"""The federated loop, in process: one frozen model for all clients, a round at a time, every round committed
to disk.

A client's turn: load the shared state, load what it kept (or choose and copy its experts, the first time),
train, keep the personal part in the store, send the shared part. Nothing of a client stays in memory after
its turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from flex.batching import number_of_steps, padded_batches, training_batches
from flex.client import ClientRefused, LocalResult, learning_rate_factor, train_locally
from flex.config import Config
from flex.files import check_finite
from flex.history import History
from flex.memory import PeakMemory
from flex.models import packs
from flex.observer import Observer
from flex.rows import ClientData
from flex.seeds import generator, torch_seed
from flex.session import Session
from flex.state import shared_state
from flex.store import StoreError
from flex.strategies import Update
from flex.strategies.base import size_in_bytes


class RoundError(RuntimeError):
    """A round that cannot be finished; earlier rounds are intact on disk."""


def sample_clients(names: Sequence[str], config: Config, round_: int) -> list[str]:
    """The clients of a round, in order of name: a seeded sample without replacement, never none.

    Raises ValueError: ``federation.clients_per_round`` exceeds the number of clients.
    """
    federation = config.federation
    count = federation.clients_per_round or max(1, round(federation.sample_fraction * len(names)))
    if count > len(names):
        raise ValueError(f"federation.clients_per_round={count} exceeds the {len(names)} clients of the data")
    chosen = generator(config.run.seed, "sampling", round_).permutation(len(names))[:count]
    return sorted(names[i] for i in chosen)


class Server:
    """Runs rounds.

    Args:
        session: the loaded run, its store open for writing.
        history: gets one line an event. observer: is told of each.
    """

    def __init__(self, session: Session, history: History, observer: Observer | None = None):
        self.session, self.history, self.observer = session, history, observer or Observer()
        self.config, self.strategy, self.store = session.config, session.strategy, session.store
        self.model, self.clients = session.model, session.clients

    def train_round(self, round_: int) -> None:
        """Trains the sampled clients, averages, commits.

        Raises:
            RoundError: every client's update was refused, the average is not finite, or a client's turn
                failed (it is named).
            StoreError: a file cannot be written or read. In both cases the last committed round is intact.
        """
        names = sample_clients(list(self.clients), self.config, round_)
        self.observer.round_started(round_, self.config.federation.rounds, names)
        finished: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        updates = self.updates(round_, names, finished, refused)
        try:
            shared = self.strategy.aggregate(self.session.shared, updates)
            check_finite(shared, f"the average of round {round_}")
        except ValueError as error:
            reasons = "".join(f"\n  {record['reason']}" for record in refused)
            raise RoundError(
                f"round {round_} cannot be finished: {error}{reasons}; {self.store.intact()}"
            ) from error
        self.store.save_shared(round_, shared)
        record = self.history.append(
            "round",
            round=round_,
            clients=[r["client"] for r in finished],
            refused=[r["client"] for r in refused],
            loss_before=weighted(finished, "loss_before"),
            loss_after=weighted(finished, "loss_after"),
            tokens=sum(r["tokens"] for r in finished),
            seconds=sum(r["seconds"] for r in finished),
            bytes_down=sum(r["bytes_down"] for r in finished + refused),
            bytes_up=sum(r["bytes_up"] for r in finished),
            peak_bytes=max(r["peak_bytes"] for r in finished),
        )
        self.store.commit(round_, not self.evaluates(round_), self.history.sync())
        self.session.shared = shared
        self.store.tidy(names)
        self.observer.round_finished(record)

    def updates(
        self, round_: int, names: Sequence[str], finished: list[dict[str, Any]], refused: list[dict[str, Any]]
    ) -> Iterator[Update]:
        """One client's update at a time, as the strategy asks for it."""
        down = size_in_bytes(self.session.shared) if self.strategy.travels else 0
        for name in names:
            try:
                result, sent = self.train_client(round_, name)
            except ClientRefused as error:
                record = self.history.append(
                    "refused", round=round_, client=name, reason=str(error), bytes_down=down
                )
                refused.append(record)
                self.observer.client_refused(record)
                continue
            except StoreError:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                raise RoundError(
                    f"round {round_} cannot be finished: client {name!r}: {error}; {self.store.intact()}"
                ) from error
            record = self.history.append(
                "client",
                round=round_,
                client=name,
                **dataclasses.asdict(result),
                bytes_down=down,
                bytes_up=size_in_bytes(sent),
            )
            finished.append(record)
            self.observer.client_finished(record)
            weighting = self.config.federation.weighting
            weight = {
                "tokens": result.answer_tokens,
                "examples": len(self.clients[name].train),
                "uniform": 1,
            }[weighting]
            yield Update(name, float(weight), sent)

    def train_client(self, round_: int, name: str) -> tuple[LocalResult, dict[str, Tensor]]:
        """(what its steps were, what it sends); what it keeps is in the store, not yet committed."""
        config, training, client = self.config, self.config.training, self.clients[name]
        seed = (config.run.seed, "training", round_, name)
        with torch_seed(*seed):
            if not self.session.load_client(name) and self.strategy.personal:
                self.choose_experts(round_, client)
            steps = number_of_steps(
                len(client.train), training.batch_size, training.local_steps, training.local_epochs
            )
            self.observer.client_started(round_, name, steps)
            batches = training_batches(
                client.train,
                self.session.tokenizer,
                max_length=config.data.max_length,
                batch_size=training.batch_size,
                steps=training.local_steps,
                epochs=training.local_epochs,
                seed=seed,
                apart=not packs(self.model.config),
            )
            result = train_locally(
                self.model,
                batches,
                training,
                name=name,
                factor=learning_rate_factor(training, round_, config.federation.rounds),
                on_step=lambda tokens, loss: self.observer.step(name, tokens, loss),
            )
        home = self.strategy.home(self.model)
        sent = shared_state(self.model) if self.strategy.travels else {}
        try:
            check_finite(home, "kept")
            check_finite(sent, "sent")
        except ValueError as error:
            raise ClientRefused(f"client {name!r}: {error}; its update is refused") from error
        if home:
            self.store.save_client(name, round_, home)
        return result, sent

    def choose_experts(self, round_: int, client: ClientData) -> None:
        """The client's first time: choose the experts to copy on its own rows, and start the personal experts
        from them.
        """
        from flex.grafting import personalize
        from flex.select import NotFiniteError, select_experts

        self.observer.selecting(round_, client.name)
        data, count = self.config.data, self.config.personal.selection_rows
        order = generator(self.config.run.seed, "selection", client.name).permutation(len(client.train))
        rows = [client.train[i] for i in order[:count]]
        device = next(self.model.parameters()).device
        batches = (
            {key: t.to(device) for key, t in batch.items()}
            for batch in padded_batches(
                rows, self.session.tokenizer, data.max_length, self.config.evaluation.batch_size
            )
        )
        try:
            selection = select_experts(self.model, batches)
        except NotFiniteError as error:
            raise ClientRefused(f"client {client.name!r}: {error}; it is left out of the round") from error
        personalize(self.model, selection)
        record = self.history.append(
            "selection", round=round_, client=client.name, layers=selection.to_dict()
        )
        self.observer.selected(record)

    def evaluates(self, round_: int) -> bool:
        """Whether round ``round_`` ends with an evaluation."""
        every, last = self.config.evaluation.every, self.config.federation.rounds
        if round_ == 0:
            return self.config.evaluation.before
        return round_ == last or (every > 0 and round_ % every == 0)

    def evaluate(self, round_: int) -> None:
        """Measures the clients after ``round_``, then commits that."""
        settings, seed = self.config.evaluation, self.config.run.seed
        every, last = settings.generate_every, self.config.federation.rounds
        generate = settings.generate and (round_ in (0, last) or (every > 0 and round_ % every == 0))
        names = list(self.clients)
        if settings.clients and settings.clients < len(names):
            chosen = generator(seed, "evaluated clients").permutation(len(names))[: settings.clients]
            names = sorted(names[i] for i in chosen)
        self.observer.evaluation_started(round_, names)
        for name in names:
            peak = PeakMemory(next(self.model.parameters()).device)
            measured = self.session.measure(name, generate)
            record = self.history.append(
                "evaluation", round=round_, client=name, **measured, peak_bytes=peak.read()
            )
            self.observer.evaluated(record)
        self.store.commit(round_, True, self.history.sync())


def weighted(records: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of ``key`` over the clients' answer tokens."""
    return sum(r[key] * r["answer_tokens"] for r in records) / sum(r["answer_tokens"] for r in records)
