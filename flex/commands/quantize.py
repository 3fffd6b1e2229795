"""Writes a model with its frozen experts in 8 or 4 bits: a folder that clients load as it is. The original,
several times as large, never has to fit in memory.

With --calibration the experts are rounded to nf4 with error feedback (GPTQ) on that text, which loses much
less: a few thousand tokens of ordinary text that holds nothing private.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from flex.commands.console import positive, some_folder

HELP = "write a model with frozen experts in 8 or 4 bits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face id or folder, or demo")
    parser.add_argument("--out", required=True, type=some_folder, metavar="DIR", help="new or empty")
    parser.add_argument("--experts", choices=("nf4", "int8"), default="nf4", help="default nf4")
    parser.add_argument("--shared-experts", choices=("nf4", "int8"), help="default: as they are")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text to round nf4 by: JSON lines of instruction and output (.jsonl, .jsonl.gz), or plain text",
    )
    parser.add_argument("--rows", type=positive, default=16, metavar="N", help="of it, at most (default 16)")
    parser.add_argument("--max-length", type=positive, default=512, metavar="TOKENS", help="of a row")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of everything else (default: the checkpoint's)",
    )


def run(arguments: argparse.Namespace) -> int:
    from flex.config import Model

    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise FileExistsError(f"--out {arguments.out} exists and is not an empty folder")
    if arguments.calibration is not None and arguments.experts != "nf4":
        raise ValueError(f"--calibration is for --experts nf4, got {arguments.experts}: leave it out")
    text = None if arguments.calibration is None else read_text(arguments.calibration, arguments.rows)
    # Rounding takes long: whether its outcome can be written is found out now.
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=arguments.out.parent).close()

    import torch
    from transformers import AutoTokenizer

    import flex
    from flex.block import moe_blocks
    from flex.loading import check_folder
    from flex.quantized import expert_bytes
    from flex.shared_experts import held_bytes, shared_modules

    path = Model(path=arguments.model).local_path()
    check_folder(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    batches = None if text is None else token_ids(text, tokenizer, arguments.rows, arguments.max_length)
    model = flex.load(
        path,
        arguments.experts,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        shared_experts=arguments.shared_experts,
        gptq=batches,
    )
    flex.save(model, arguments.out, tokenizer)
    blocks = moe_blocks(model)
    routed = expert_bytes(adapter.experts(block) for block, adapter in blocks.values())
    how = ""
    if batches is not None:
        how = f", by {sum(int(batch['attention_mask'].sum()) for batch in batches):,} tokens"
    print(f"routed experts in {arguments.experts}{how}: {routed / 2**20:,.1f} MiB")
    if arguments.shared_experts:
        shared = held_bytes(shared_modules(blocks).values())
        print(f"shared experts in {arguments.shared_experts}: {shared / 2**20:,.1f} MiB")
    print(arguments.out)
    return 0


def read_text(file: Path, rows: int) -> Any:
    """The first rows of a file of JSON lines, or a whole plain text.

    Raises:
        DataError: a malformed line; names it.
        ValueError: no text.
        OSError: the file cannot be read.
    """
    from flex.data import read_jsonl

    if {".jsonl", ".json"} & set(file.suffixes):
        return read_jsonl(file)[:rows]
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is neither JSON lines (.jsonl) nor text in UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{file} holds no text")
    return text


def token_ids(text: Any, tokenizer: Any, rows: int, length: int) -> list[dict[str, Any]]:
    """Batches as :func:`flex.gptq` takes them."""
    import torch

    from flex.batching import padded_batches

    if not isinstance(text, str):
        return list(padded_batches(text, tokenizer, length, rows))
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids[: rows * length])
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.split(length)]
