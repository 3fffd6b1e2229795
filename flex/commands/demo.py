"""Trains local, fedavg and flex on the same clients with a real pretrained model, and shows what each reaches
and costs.

The default model is SmolLM2-135M-Instruct converted to a Mixture-of-Experts (made on the first call, in
minutes); the default data are reasoning-gym tasks, one skill a client. Ends with a table, plots and an HTML
page.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from flex.commands.console import Interrupted, add_experts, add_quiet, positive, print_table, some_folder

HELP = "train local, fedavg and flex on a real model and compare them (start here)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="demo", help="a Hugging Face id or folder (default: the demo model)"
    )
    add_experts(parser, "of all runs")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="your JSON lines: instruction, output[, client, category]"
    )
    parser.add_argument("--rounds", type=positive, metavar="N")
    parser.add_argument("--steps", type=positive, metavar="N", help="optimiser steps of a client in a round")
    parser.add_argument("--clients", type=positive, metavar="N")
    parser.add_argument("--rows", type=positive, metavar="N", help="training rows of each client")
    parser.add_argument(
        "--out",
        type=some_folder,
        metavar="DIR",
        help="default: runs/demo-1, -2, ...; a demo in DIR is continued",
    )
    parser.add_argument("--quick", action="store_true", help="as little as still goes through every part")
    parser.add_argument(
        "--no-compare", action="store_true", help="leave out the comparison with the stock layer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    from flex.demo import DemoSettings, free_folder, run_demo, what_it_shows
    from flex.progress import observer_for
    from flex.report import make_report
    from flex.report.data import cost_table, final_table, load_speed, speed_table
    from flex.report.reader import read_runs

    out = arguments.out or free_folder(Path("runs"))
    settings = DemoSettings(
        out,
        arguments.model,
        arguments.data,
        arguments.rounds,
        arguments.clients,
        arguments.rows,
        arguments.steps,
        arguments.quick,
        arguments.seed,
        arguments.threads,
        arguments.experts or "",
        arguments.shared_experts or "",
    )

    def say(text: str) -> None:
        if not arguments.quiet:
            print(f"== {text}", flush=True)

    try:
        folders = run_demo(
            settings,
            lambda strategy: observer_for(arguments.quiet, title=strategy),
            say,
            compare_layers=not arguments.no_compare,
        )
    except KeyboardInterrupt as stop:
        given = "the same command with " if arguments.out is None else "the same command: "
        again = f"--out {shlex.quote(str(out))}"
        raise Interrupted(
            f"stopped; finished rounds are kept, and {given}{again} goes on from them"
        ) from stop
    runs = read_runs(folders)
    speeds, text = load_speed(folders)
    print()
    print_table("Held-out rows of each client", *final_table(runs), words=2)
    print_table("What it cost", *cost_table(runs))
    if speeds:
        print_table("A client's step with the layer computed by", *speed_table(speeds))
        print(f"{text}\n")
    print(f"{what_it_shows(settings)}\n")
    report = make_report(folders, out / "report")
    print(f"plots:  {report.page.parent}/*.png\nreport: {report.page}")
    name = runs[-1].clients[0]
    asked = f"{shlex.quote(str(folders[-1]))} --client {shlex.quote(name)}"
    print(f'ask it: flex-moe generate {asked} "..." --compare')
    return 0
