"""Chooses, on a client's own rows, the expert that each MoE layer copies, and saves the personal part to
start from.

Prints each layer's choice. DIR gets personal.safetensors (flex.load_personal reads it) and graft.json (the
report).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flex.commands.console import add_experts, positive, print_table

HELP = "choose a model's personal experts on calibration data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face id or folder, or demo")
    parser.add_argument(
        "--calibration",
        required=True,
        type=Path,
        metavar="FILE",
        help="JSON lines: instruction, output (.gz works)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--rows", type=positive, default=64, metavar="N", help="rows to use (default 64)")
    parser.add_argument("--max-length", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N")
    parser.add_argument("--personal", choices=("full", "lora"), default="full")
    parser.add_argument("--rank", type=positive, default=16, help="of --personal lora")
    parser.add_argument("--mix", choices=("add", "convex"), default="add")
    add_experts(parser, "while the model is loaded")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backend", default="auto", help="of the fused layer (default auto)")


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from flex.config import Config, Model
    from flex.data import read_jsonl

    rows = read_jsonl(arguments.calibration)[: arguments.rows]

    import torch

    import flex
    from flex.batching import padded_batches
    from flex.files import atomic_write
    from flex.session import load_model

    settings = Model(
        path=arguments.model,
        dtype=arguments.dtype,
        experts=arguments.experts or "",
        shared_experts=arguments.shared_experts or "",
    )
    model, tokenizer = load_model(replace(Config(), model=settings))
    device = next(model.parameters()).device
    report = flex.graft(
        model,
        (
            {key: t.to(device) for key, t in batch.items()}
            for batch in padded_batches(rows, tokenizer, arguments.max_length, arguments.batch_size)
        ),
        mix=arguments.mix,
        backend=arguments.backend,
        personal=arguments.personal,
        rank=arguments.rank,
        personal_dtype=torch.float32,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    flex.save_personal(model, arguments.out / "personal.safetensors")
    with atomic_write(arguments.out / "graft.json") as temporary:
        asked = {"model": arguments.model, "calibration": str(arguments.calibration), "rows": len(rows)}
        temporary.write_text(json.dumps(asked | report.to_dict(), indent=1), encoding="utf-8")
    headings, *lines = report.table()
    print_table(f"{arguments.model}: experts chosen on {len(rows)} rows", headings, lines)
    print(f"{report.trainable:,} parameters to train, {report.frozen:,} frozen")
    print(f"routed experts in {report.experts or arguments.dtype}: {report.expert_bytes / 2**20:,.1f} MiB")
    if report.shared_expert_bytes:
        held = report.shared_experts or arguments.dtype
        print(f"shared experts in {held}: {report.shared_expert_bytes / 2**20:,.1f} MiB")
    print(arguments.out / "personal.safetensors")
    return 0
