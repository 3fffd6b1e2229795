"""Draws plots and one HTML page about a run, or about several compared; runs may be unfinished."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "plots and an HTML page about one or several runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="default: RUN/report of the first run"
    )


def run(arguments: argparse.Namespace) -> int:
    from flex.report import make_report

    report = make_report(arguments.runs, arguments.out or arguments.runs[0] / "report")
    for picture in report.pictures:
        print(picture)
    print(report.numbers)
    print(report.page)
    return 0
