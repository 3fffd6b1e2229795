"""Answers a prompt with a run's model as one client sees it, or with any model (a folder, an id, or demo)."""

from __future__ import annotations

import argparse
import sys

from flex.commands.console import add_experts, positive

HELP = "answer a prompt with a client's model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="a run's folder, or a model")
    parser.add_argument("prompt", help="what to ask; - reads it from the standard input")
    parser.add_argument("--client", metavar="NAME", help="whose personal experts answer (needed for a run)")
    parser.add_argument(
        "--compare", action="store_true", help="also answer with the gates shut, without the personal experts"
    )
    add_experts(parser, "of a model (a run has model.experts)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 (default): always the likeliest token; above: sampled",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def run(arguments: argparse.Namespace) -> int:
    from flex.generate import open_writer

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    experts, shared_experts = arguments.experts or "", arguments.shared_experts or ""
    writer = open_writer(arguments.source, arguments.client, experts, shared_experts)
    if arguments.compare and not writer.personal:
        raise ValueError(f"--compare: {arguments.source} has no personal experts to leave out")
    for shut in (False, True) if arguments.compare else (False,):
        if arguments.compare:
            print("== without the personal experts" if shut else f"== {arguments.client}")
        writer.answer(
            prompt,
            arguments.max_new_tokens,
            arguments.temperature,
            arguments.seed,
            without_personal=shut,
            on_text=lambda text: print(text, end="", flush=True),
        )
        print()
    return 0
