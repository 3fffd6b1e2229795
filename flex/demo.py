"""The demo: ``local``, ``fedavg`` and ``flex`` on the same clients, and the layer against the stock one."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex.config import Config
from flex.progress import plural

STRATEGIES = ("local", "fedavg", "flex")


@dataclass(frozen=True)
class DemoSettings:
    """What a user may change.

    Args:
        out: the folder for three runs and the report; an unfinished demo in it is continued.
        model: "demo", or a Hugging Face id or folder.
        data: a JSON-lines file; None makes reasoning-gym tasks, one skill a client.
        rounds, clients, rows: None takes the default; ``rows`` is the training rows of each client.
        steps: a client's optimiser steps a round.
        quick: as little of everything as still goes through every part; overrides nothing that is given.
        threads: of the CPU; 0 is torch's default.
        experts, shared_experts: "int8" or "nf4" quantises the frozen experts of all three runs; "" does not.
    """

    out: Path
    model: str = "demo"
    data: Path | None = None
    rounds: int | None = None
    clients: int | None = None
    rows: int | None = None
    steps: int | None = None
    quick: bool = False
    seed: int = 0
    threads: int = 0
    experts: str = ""
    shared_experts: str = ""


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    rounds: int
    rows: int
    test_rows: int
    steps: int
    batch_size: int
    selection_rows: int
    evaluated_rows: int
    answered_rows: int
    comparison_repeats: int
    comparison_steps: int


# The usual size is meant to end within ten minutes on two cores with the demo model, conversion apart.
USUAL = Size(
    rounds=3, rows=200, test_rows=40, steps=3, batch_size=4, selection_rows=16,
    evaluated_rows=16, answered_rows=12, comparison_repeats=2, comparison_steps=2,
)  # fmt: skip
QUICK = Size(
    rounds=1, rows=24, test_rows=4, steps=1, batch_size=4, selection_rows=8,
    evaluated_rows=4, answered_rows=2, comparison_repeats=1, comparison_steps=1,
)  # fmt: skip


def size_of(settings: DemoSettings) -> Size:
    return QUICK if settings.quick else USUAL


def demo_config(settings: DemoSettings, strategy: str) -> Config:
    """The settings of one of the demo's runs; they differ in strategy, folder and who measures the start.

    Raises:
        ConfigError: a setting is refused.
        DataError: ``settings.data`` cannot be read.
    """
    size = size_of(settings)
    tables: dict[str, dict[str, Any]] = {
        "model": {
            "path": settings.model,
            "experts": settings.experts,
            "shared_experts": settings.shared_experts,
        },
        "data": {"max_length": 384},
        "federation": {"strategy": strategy, "rounds": settings.rounds or size.rounds},
        "training": {
            "local_steps": settings.steps or size.steps,
            "batch_size": size.batch_size,
            "learning_rate": 1e-3,
            "personal_learning_rate": 3e-4,
            "gate_learning_rate": 1e-2,
        },
        # Small enough to keep pre-activations, which makes a step faster.
        "personal": {"selection_rows": size.selection_rows, "save": "preact"},
        "evaluation": {
            # The pretrained model is the same for all: the first strategy measures it for the others.
            "before": strategy == STRATEGIES[0],
            "rows": size.evaluated_rows,
            "generate_rows": size.answered_rows,
            "batch_size": size.answered_rows,
            "max_new_tokens": 32,
        },
        "run": {"folder": str(settings.out / strategy), "seed": settings.seed, "threads": settings.threads},
    }
    if settings.data is None:
        from flex.config import Data
        from flex.tasks import SKILLS

        skills = list(dict.fromkeys([*Data().skills, *SKILLS]))
        wanted = settings.clients or len(Data().skills)
        if wanted > len(skills):
            raise ValueError(
                f"clients={wanted} exceeds the {len(skills)} skills of the demo: {', '.join(skills)}"
            )
        tables["data"] |= {
            "skills": skills[:wanted],
            "rows_per_skill": settings.rows or size.rows,
            "test_rows_per_skill": size.test_rows,
        }
    else:
        tables["data"] |= {"source": "jsonl", "path": str(settings.data), "max_rows": settings.rows or 0}
        tables["partition"] = partition_for(settings.data, settings.clients)
    return Config.from_dict(tables)


def partition_for(data: Path, clients: int | None) -> dict[str, Any]:
    """How the rows of a user's file become clients: by the fields that they have, else at random."""
    from flex.data import read_jsonl

    rows = read_jsonl(data)
    categories = all(row.category for row in rows)
    if clients is not None:
        return {"scheme": "dirichlet" if categories else "iid", "clients": clients}
    if all(row.client for row in rows):
        return {"scheme": "field", "field": "client"}
    return {"scheme": "field", "field": "category"} if categories else {"scheme": "iid", "clients": 4}


def run_demo(
    settings: DemoSettings,
    observer: Callable[[str], Any],
    say: Callable[[str], object],
    compare_layers: bool = True,
) -> list[Path]:
    """Makes the model if need be, trains the three strategies, compares the layers; returns the runs'
    folders.

    Args:
        observer: strategy -> an observer that is also a context manager.
        say: is told in one line what comes next.

    Raises:
        What :func:`flex.run` and :func:`flex.compare.compare` raise. Finished rounds are kept: a second call
        goes on.
    """
    import flex
    from flex.data import load_clients

    configs = {strategy: demo_config(settings, strategy) for strategy in STRATEGIES}
    clients = load_clients(configs["flex"])
    sizes = ", ".join(
        f"{client.name} ({len(client.train)} + {len(client.test)} rows)" for client in clients[:12]
    )
    say(f"clients, training + held-out rows: {sizes}{', ...' if len(clients) > 12 else ''}")
    if settings.model == "demo":
        from flex.moefication import demo_model

        say(f"model: {demo_model(progress=Stages(say))}")
    for strategy, config in configs.items():
        folder = Path(config.run.folder)
        started = (folder / "config.toml").is_file()
        federation = config.federation
        what = "continuing" if started else "training"
        say(f"{strategy}: {what}, {plural(federation.rounds, 'round')}, in {folder}")
        with observer(strategy) as watching:
            flex.run(config, resume=folder if started else None, observer=watching)
        # The next run's peak memory must not contain this one's model.
        gc.collect()
    if compare_layers:
        from flex.compare import compare
        from flex.report.data import SPEED_FILE

        if (settings.out / SPEED_FILE).is_file():
            say(f"the stock layer was measured before: {settings.out / SPEED_FILE}")
        else:
            size = size_of(settings)
            say("the same client step on the stock transformers layer, each way in a fresh process")
            compare(
                configs["flex"],
                clients,
                settings.out,
                size.comparison_repeats,
                size.comparison_steps,
                lambda text: say(f"  {text}"),
            )
    return [Path(config.run.folder) for config in configs.values()]


class Stages:
    """Says each stage of a long work when it begins: called with a stage's name and the done share of it."""

    def __init__(self, say: Callable[[str], object]):
        self.say, self.stage = say, ""

    def __call__(self, stage: str, share: float) -> None:
        if stage != self.stage:
            if not self.stage:
                self.say("making the demo model, once; this takes minutes")
            self.stage = stage
            self.say(f"  {stage}")


def free_folder(parent: Path) -> Path:
    """``parent``/demo-1, or the first number that is not taken."""
    return next(p for i in itertools.count(1) if not (p := parent / f"demo-{i}").exists())


def what_it_shows(settings: DemoSettings) -> str:
    """What the numbers can and cannot tell, for under the table."""
    size = size_of(settings)
    rounds, steps = settings.rounds or size.rounds, settings.steps or size.steps
    answered = size.answered_rows
    return (
        f"{plural(rounds, 'round')} of {plural(steps, 'step')} of {size.batch_size} rows: the beginning of a "
        "training, not its end. Losses "
        f"are means over {size.evaluated_rows} held-out rows a client at most; exact match, verifier and "
        f"ROUGE-L are of {answered} answers, so one answer moves them by {1 / answered:.0%}. One seed. "
        f"Longer: --rounds {10 * rounds} --steps {4 * steps}."
    )
