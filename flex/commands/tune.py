"""Measures the tiles of the Triton kernels for a model's layer on this machine's GPU and keeps the fastest.

Later calls of the layer with these sizes use them; without tuning they use pinned tiles. A model's
configuration is read, never its weights. Tuned are the routed experts, a personal expert of their width, and
the shared expert.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any

from flex.commands.console import add_quiet, positive, print_table

HELP = "measure the fastest tiles for a model's layer on this GPU"
TOKENS = (128, 1024, 8192)
# What the configurations of Hugging Face's MoE models call the sizes, the most specific name first.
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
WIDTHS = ("moe_intermediate_size", "intermediate_size")
SIZES = ("hidden", "width", "experts", "top_k")


@dataclass(frozen=True)
class Sizes:
    """Of one MoE layer; ``shared`` is the shared expert's width, 0 for none."""

    hidden: int
    width: int
    experts: int
    top_k: int
    shared: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a Hugging Face id or folder, or demo")
    for name, help_text in (
        ("--hidden", "in place of --model: the hidden size"),
        ("--width", "an expert's width"),
        ("--experts", "how many routed experts"),
        ("--top-k", "experts a token"),
    ):
        parser.add_argument(name, type=positive, metavar="N", help=help_text)
    parser.add_argument("--shared", type=positive, metavar="N", help="the shared expert's width, if any")
    parser.add_argument(
        "--tokens", nargs="+", type=positive, default=list(TOKENS), metavar="T",
        help="tokens a call, padding excluded; each is rounded up to a power of two (default 128 1024 8192)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--weights", choices=("plain", "int8", "nf4"), default="plain", help="of the routed experts"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes that compile (default: up to 8)"
    )
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    sizes = sizes_asked_for(arguments)

    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on a GPU, and torch sees no CUDA device")
    from flex_kernels import triton

    if reason := triton.status("cuda"):
        raise RuntimeError(f"the Triton backend does not run here: {reason}")
    from flex_kernels.triton import tune

    device = torch.device("cuda", torch.cuda.current_device())
    workers = arguments.workers or min(8, os.cpu_count() or 1)
    rows = []
    for tokens in sorted({tune.bucket(tokens) for tokens in arguments.tokens}):
        for name, (width, experts, top_k, weights) in layers_of(sizes, arguments.weights).items():
            if not arguments.quiet:
                print(f"{name} experts, {tokens} tokens", file=sys.stderr, flush=True)
            best = tune.tune(
                getattr(torch, arguments.dtype), sizes.hidden, width, experts, top_k, tokens,
                weights=weights, workers=workers,
            )  # fmt: skip
            rows += rows_of(name, tokens, best)
    headings = (
        "experts",
        "T",
        "product",
        "m",
        "n",
        "k",
        "warps",
        "stages",
        "TMA",
        "a SM",
        "ms",
        "tried",
        "failed",
    )
    print_table(f"{sizes}, {arguments.dtype}: fastest tiles", headings, rows, words=3)
    print(f"kept in {tune.cache_file(device)}")
    return 0


def layers_of(sizes: Sizes, weights: str) -> dict[str, tuple[int, int, int, str]]:
    """(width, experts, experts a token, weights) of the sets of experts that a grafted layer calls."""
    found = {
        "routed": (sizes.width, sizes.experts, sizes.top_k, weights),
        "personal": (sizes.width, 1, 1, "plain"),
    }
    if sizes.shared and sizes.shared != sizes.width:
        found["shared"] = (sizes.shared, 1, 1, "plain")
    return found


def rows_of(name: str, tokens: int, best: Any) -> list[tuple[str, ...]]:
    """The table's lines for one plan: a product each."""
    found: list[tuple[str, ...]] = []
    for product, milliseconds in best.milliseconds.items():
        t = getattr(best.plan, product)
        tma = "rows copied" if t.copy_rows else "yes" if t.tma else "no"
        tile = (t.m, t.n, t.k, t.warps, t.stages, tma, t.per_sm or "all")
        counts = (best.tried, best.failed) if not found else ("", "")
        found.append((name, str(tokens), product, *map(str, tile), f"{milliseconds:.3f}", *map(str, counts)))
    return found


def sizes_asked_for(arguments: argparse.Namespace) -> Sizes:
    """From --model, or from the sizes given.

    Raises ValueError: neither or both are given, one size is missing, or the model has no MoE layer.
    """
    given = {name: getattr(arguments, name) for name in SIZES}
    flags = {name: "--" + name.replace("_", "-") for name in SIZES}
    if arguments.model is not None:
        clash = [flags[n] for n, v in given.items() if v is not None] + ["--shared"] * bool(arguments.shared)
        if clash:
            raise ValueError(f"{clash[0]} and --model exclude each other: the model's configuration says it")
        return sizes_of_model(arguments.model)
    missing = [flags[name] for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: give --model, or all of {', '.join(flags.values())}")
    if given["top_k"] > given["experts"]:
        raise ValueError(f"--top-k {given['top_k']} exceeds --experts {given['experts']}")
    return Sizes(**given, shared=arguments.shared or 0)


def sizes_of_model(path: str) -> Sizes:
    """The MoE layer's sizes in a model's configuration; nothing else of the model is read.

    Raises ValueError: the configuration cannot be read, or names no experts.
    """
    from transformers import AutoConfig

    from flex.config import Model

    folder = Model(path=path).local_path()
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {path}: its configuration cannot be read: {first_line(error)}") from error

    def value(*names: str) -> int:
        found = next((getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)), None)
        if found is None:
            raise ValueError(
                f"--model {path} ({type(config).__name__}) has no {' or '.join(names)}: "
                f"it is no MoE model that is known; give the sizes instead"
            )
        return found

    experts, width = value(*EXPERTS), value(*WIDTHS)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared is None:
        counts = (getattr(config, name, None) for name in ("n_shared_experts", "moe_num_shared_experts"))
        shared = next((count for count in counts if count), 0) * width
    return Sizes(value("hidden_size"), width, experts, value("num_experts_per_tok"), shared)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
