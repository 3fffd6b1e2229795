"""Measures a run's clients on their held-out rows as the run stands."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flex.commands.console import add_quiet, positive, print_table

HELP = "measure a run's clients on their held-out rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--client", metavar="NAME", help="only this client")
    parser.add_argument(
        "--rows", type=positive, metavar="N", help="held-out rows of each client (default: the run's)"
    )
    parser.add_argument("--no-generate", action="store_true", help="loss alone, which is much quicker")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from flex.generate import known_client, run_clients
    from flex.report.data import METRICS, shown
    from flex.session import open_run

    if arguments.client is not None and (arguments.run_folder / "data.json").is_file():
        # Before the model is loaded, which takes a while.
        known_client(arguments.client, run_clients(arguments.run_folder))
    session = open_run(arguments.run_folder)
    names = list(session.clients)
    if arguments.client is not None:
        names = [known_client(arguments.client, names)]
    if arguments.rows:
        evaluation = replace(session.config.evaluation, rows=arguments.rows, generate_rows=arguments.rows)
        session.config = replace(session.config, evaluation=evaluation)
    measured: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names, 1):
        if not arguments.quiet:
            print(f"measuring {name} ({i} of {len(names)})", file=sys.stderr, flush=True)
        measured[name] = session.measure(name, generate=not arguments.no_generate)
    if arguments.json:
        print(json.dumps(measured, indent=1))
        return 0
    keys = [key for key in METRICS if any(key in values for values in measured.values())]
    rows = [
        [name, *(shown(key, values.get(key)) for key in keys), str(values["rows"])]
        for name, values in measured.items()
    ]
    committed = session.store.committed
    title = f"{session.strategy.name} after round {committed.round if committed else 0}"
    print_table(title, ["client", *(METRICS[key][0] for key in keys), "rows"], rows)
    return 0
