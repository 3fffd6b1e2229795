"""``flex-moe``: the command line. Each subcommand is a small module in :mod:`flex.commands`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from flex import __version__
from flex.commands.console import LIBRARY_ERRORS, Interrupted

COMMANDS = ("demo", "train", "evaluate", "generate", "graft", "quantize", "report", "doctor", "bench", "tune")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flex-moe",
        description="Federated fine-tuning of Mixture-of-Experts models, a personal expert a client.",
        epilog="flex-moe COMMAND --help explains a command. Start with: flex-moe doctor, then flex-moe demo.",
    )
    parser.add_argument("--version", action="version", version=f"flex-kernels {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"flex.commands.{name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        # Also after the command's name; SUPPRESS, so that its absence there does not undo the one before it.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 a check failed, 2 bad input (one line names it), 130 stopped."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python must not complain about it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LIBRARY_ERRORS as error:
        if arguments.debug:
            raise
        print(f"flex-moe {arguments.command}: {described(error)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"\nflex-moe {arguments.command}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\nflex-moe {arguments.command}: stopped", file=sys.stderr)
        return 130


def described(error: BaseException) -> str:
    """The error as one message for people."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.split(".")[0]
        extra = "demo" if missing in ("gguf", "reasoning_gym") else "federated"
        return f"the package {missing} is not installed; pip install 'flex-kernels[{extra}]' brings it"
    text = str(error).strip()
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
