"""Runs a federation from a configuration file, or continues one that was interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path

from flex.commands.console import add_quiet, print_table, resumable, some_folder

HELP = "run a federation, or --resume one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings (see examples/)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="change a setting, e.g. --set federation.rounds=10; may be repeated",
    )
    parser.add_argument("--out", type=some_folder, metavar="DIR", help="the run's folder (run.folder)")
    parser.add_argument("--resume", type=some_folder, metavar="RUN", help="continue the run in this folder")
    parser.add_argument(
        "--show-config", action="store_true", help="print every setting with its meaning, and stop"
    )
    add_quiet(parser)
    parser.set_defaults(parser=parser)


def run(arguments: argparse.Namespace) -> int:
    from flex.config import Config

    if (arguments.config is None) == (arguments.resume is None) and not arguments.show_config:
        arguments.parser.error("give either CONFIG.toml or --resume RUN")
    if arguments.resume is not None and (arguments.overrides or arguments.out):
        arguments.parser.error("--resume continues with the run's own settings: leave --set and --out away")
    overrides = list(arguments.overrides)
    if arguments.out is not None:
        overrides.append(f"run.folder={toml_string(str(arguments.out))}")
    config = None
    if arguments.config is not None:
        config = Config.from_toml(arguments.config, overrides)
    if arguments.show_config:
        print((config or Config()).to_toml(comments=True), end="")
        return 0

    import flex
    from flex.progress import observer_for
    from flex.report.data import cost_table, final_table
    from flex.report.reader import read_runs

    folder = arguments.resume if config is None else Path(config.run.folder)
    with resumable(folder), observer_for(arguments.quiet) as observer:
        result = flex.run(config, resume=arguments.resume, observer=observer)
    runs = read_runs([Path(result.folder)])
    print_table("Held-out rows", *final_table(runs), words=2)
    print_table("Cost", *cost_table(runs))
    print(f"run: {result.folder}\nreport: flex-moe report {result.folder}")
    return 0


def toml_string(text: str) -> str:
    """A basic TOML string; JSON's escapes are TOML's."""
    import json

    return json.dumps(text)
