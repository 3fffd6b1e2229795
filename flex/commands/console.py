"""What the commands share: tables, and how an interrupted run is taken up again."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LIBRARY_ERRORS = (ValueError, OSError, RuntimeError, ImportError)
"""What the library raises on purpose, with a message for people; anything else is a fault of ours."""


class Interrupted(Exception):
    """The user stopped the command; the message says how to go on."""


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Around a run in ``folder``: whatever ends it early, the user learns how to continue."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; {how_to_resume(folder)}") from stop
    except LIBRARY_ERRORS as error:
        if (folder / "latest").exists() and "--resume" not in str(error):
            print(how_to_resume(folder), file=sys.stderr)
        raise


def how_to_resume(folder: Path) -> str:
    if (folder / "config.toml").exists():
        return f"finished rounds are kept; continue with: flex-moe train --resume {shlex.quote(str(folder))}"
    return "nothing was written yet; give the same command again"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> None:
    """A table on the standard output; the first ``words`` columns hold words, the others numbers.

    A line separates the groups that the first column makes; a repeated first cell is shown once.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False
    )
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < words else "right", no_wrap=True)
    for i, row in enumerate(rows):
        again = i > 0 and rows[i - 1][0] == row[0]
        last = i + 1 < len(rows) and rows[i + 1][0] != row[0] and words > 1
        table.add_row(*(("" if again else row[0]), *row[1:]), end_section=last)
    # Where nobody looks at it (a pipe, a file) no line is cut at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress, only the result")


def add_experts(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--experts", choices=("int8", "nf4"), help=f"quantise the frozen routed experts {what} to 8 or 4 bits"
    )
    parser.add_argument(
        "--shared-experts", choices=("int8", "nf4"), help="likewise the shared experts, with --experts"
    )


def some_folder(text: str) -> Path:
    """A folder's path; an empty one, which pathlib takes for the current folder, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder, '.' is the current one")
    return Path(text)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
