"""The proof of size: a client's training step on all of Qwen1.5-MoE-A2.7B, its frozen experts quantised.

    python -m benchmarks.full_size --out benchmarks/results/full_size.json
    python -m benchmarks.full_size --layers 2 --personal full
    python -m benchmarks.full_size --feedback-tokens 4096

The model has the full configuration (24 layers, 60 experts of width 1408, 14.3 billion weights) and random
weights, drawn tensor by tensor as the loader asks for them, quantised and let go: the loader is the one that
reads checkpoints. With --feedback-tokens its experts are rounded with error feedback on so many random
tokens, layer by layer, as by flex.load(..., gptq=batches). It is grafted (LoRA on attention, a personal
expert and a gate a layer) and trained with the client's own code. Peak: the process's resident high-water
mark (VmHWM), import of torch included.

Where the processor multiplies int8, the same steps follow once more with int8 products allowed
(flex_kernels.allow_int8_products).

Memory by part is counted from the tensors; gradients and AdamW's two moments are those of the trained
parameters, in float32. "the rest" is the peak of training less all of them: the interpreter and its
libraries, activations, scratch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine, median
from flex.client import LocalResult, train_locally
from flex.config import Training
from flex.memory import PeakMemory, give_back_freed
from flex_kernels import allow_int8_products
from flex_kernels.cpu import ops
from flex_kernels.quantize import KINDS, Kind

DTYPE = torch.bfloat16
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """The model's shape (Qwen1.5-MoE-A2.7B) and the client's step.

    Args:
        kind, shared_kind: of the routed and the shared experts.
        feedback_tokens: to round the routed experts on, a multiple of ``tokens``; 0 rounds to the nearest.
        tokens: in a row. rows: of a step, one at a time through the model.
        personal: as for :func:`flex.graft`; "full" trains 3 I H parameters a layer in float32.
    """

    layers: int = 24
    hidden: int = 2048
    heads: int = 16
    experts: int = 60
    chosen: int = 4
    width: int = 1408
    shared_width: int = 5632
    vocabulary: int = 151936
    kind: Kind = "nf4"
    shared_kind: Kind = "int8"
    feedback_tokens: int = 0
    personal: str = "lora"
    rank: int = 16
    tokens: int = 512
    rows: int = 1
    steps: int = 3
    checkpointing: bool = True


class Drawn:
    """A random tensor that exists once it is asked for, as a slice of a file does."""

    def __init__(self, name: str, shape: torch.Size, std: float):
        self.name, self.shape, self.std = name, shape, std

    def __getitem__(self, index: Any) -> Tensor:
        from flex.seeds import derive_seed

        if len(self.shape) == 1:
            return (torch.zeros if self.name.endswith("bias") else torch.ones)(self.shape, dtype=DTYPE)
        generator = torch.Generator().manual_seed(derive_seed(0, self.name))
        return torch.empty(self.shape, dtype=DTYPE).normal_(0.0, self.std, generator=generator)[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "BF16"


def configuration(size: Size) -> Any:
    """transformers' configuration of the model."""
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.shared_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        num_experts=size.experts,
        num_experts_per_tok=size.chosen,
        moe_intermediate_size=size.width,
        shared_expert_intermediate_size=size.shared_width,
        norm_topk_prob=False,
        tie_word_embeddings=False,
    )


def make_model(size: Size) -> Any:
    """The model with quantised random experts, through the loader of checkpoints."""
    from transformers import Qwen2MoeForCausalLM

    from flex.attention import PACKED
    from flex.hf_quantizer import ExpertsConfig
    from flex.loading import load_tensors_into_model

    config = configuration(size)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Qwen2MoeForCausalLM(config).state_dict().items()}
    tensors = {name: Drawn(name, shape, config.initializer_range) for name, shape in shapes.items()}
    wanted = ExpertsConfig(size.kind, shared_experts=size.shared_kind)
    options = {"quantization_config": wanted, "attn_implementation": PACKED}
    model = load_tensors_into_model("random weights", config, tensors, DTYPE, options, feedback_ids(size))
    return model.requires_grad_(False)


def feedback_ids(size: Size) -> Tensor | None:
    """Random ids to round the experts on, or None."""
    if not size.feedback_tokens:
        return None
    generator = torch.Generator().manual_seed(2)
    return torch.randint(size.vocabulary, (size.feedback_tokens,), generator=generator).view(-1, size.tokens)


def graft_model(model: Any, size: Size) -> None:
    """What a session does to a loaded model."""
    import flex
    from flex.block import checkpoint_layers

    flex.graft(
        model,
        start=[0] * size.layers,
        personal=size.personal,  # type: ignore[arg-type]
        rank=size.rank,
        personal_dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )
    flex.add_lora(model)
    if size.checkpointing:
        checkpoint_layers(model)


def batches(size: Size) -> Iterator[Any]:
    """Steps of random tokens; the second half of every row is the answer."""
    from flex.batching import Batch

    generator = torch.Generator().manual_seed(1)
    for _ in range(size.steps):
        ids_BL = torch.randint(size.vocabulary, (size.rows, size.tokens), generator=generator)
        positions_BL = torch.arange(size.tokens).expand(size.rows, -1).contiguous()
        answers = torch.arange(size.tokens // 2, size.tokens - 1)
        where_N = (torch.arange(size.rows)[:, None] * size.tokens + answers).flatten()
        targets_N = ids_BL.flatten()[where_N + 1]
        lengths = ((size.tokens,),) * size.rows
        yield Batch(ids_BL, positions_BL, where_N, targets_N, lengths, ids_BL.numel(), size.rows)


def memory_by_part(model: Any) -> dict[str, int]:
    """Bytes of every tensor that the model keeps, by what it is for, and of what training adds."""
    parts: dict[str, int] = {}
    seen: set[int] = set()
    trained = 0

    def add(part: str, t: Tensor) -> None:
        if t.data_ptr() not in seen or not t.nbytes:
            seen.add(t.data_ptr())
            parts[part] = parts.get(part, 0) + t.nbytes

    for name, t in (*model.named_parameters(), *model.named_buffers()):
        add(part_of(name), t)
        if t.requires_grad:
            trained += t.nbytes
    return parts | {"gradients": trained, "optimiser state": 2 * trained}


def part_of(name: str) -> str:
    """Which part of the account a tensor belongs to, by its name."""
    pieces = name.split(".")
    if "personal" in pieces:
        return "personal experts, decoded" if "frozen" in pieces[-1] else "personal experts and gates"
    if any(piece.startswith("lora_") for piece in pieces):
        return "LoRA on attention"
    for part, label in (
        ("shared_expert", "shared experts"),
        ("codes", "routed experts, codes"),
        ("scales", "routed experts, scales"),
        ("self_attn", "attention"),
        ("embed_tokens", "embeddings and output layer"),
        ("lm_head", "embeddings and output layer"),
    ):
        if part in pieces:
            return label
    return "routers and norms"


def train(model: Any, size: Size) -> tuple[LocalResult, list[float]]:
    """A client's steps, and the seconds of each."""
    ends = [time.perf_counter()]
    training = Training(batch_size=size.rows, local_steps=size.steps, rows_per_pass=1)
    result = train_locally(
        model, batches(size), training, on_step=lambda tokens, loss: ends.append(time.perf_counter())
    )
    return result, [after - start for start, after in pairwise(ends)]


def tokens_per_second(size: Size, steps: list[float]) -> float:
    """By the median step but for the first."""
    return size.rows * size.tokens / median(steps[1:] or steps)


def prove(size: Size, threads: int = 0) -> dict[str, Any]:
    """Makes, grafts and trains in this process; what it took."""
    from flex.quantized import frozen_weights

    if threads:
        torch.set_num_threads(threads)
    seconds: dict[str, float] = {}
    products: list[float] = []
    peaks: dict[str, int] = {}
    peak, began = PeakMemory(), time.perf_counter()
    before = peak.read()
    model = make_model(size)
    give_back_freed()
    seconds["drawing and quantising"] = time.perf_counter() - began
    peaks["drawing and quantising"] = peak.read()

    peak, began = PeakMemory(), time.perf_counter()
    graft_model(model, size)
    give_back_freed()
    seconds["grafting"] = time.perf_counter() - began
    peaks["grafting"] = peak.read()

    result, steps = train(model, size)
    peaks["training"] = result.peak_bytes
    seconds["steps"] = sum(steps)
    parts = memory_by_part(model)
    parts["the rest"] = result.peak_bytes - sum(parts.values())
    allow_int8_products(True)
    if ops.int8_products():
        again, products = train(model, size)
        peaks["training with int8 products"] = again.peak_bytes
    allow_int8_products(False)
    return {
        "machine": machine(),
        "size": asdict(size),
        "weights": frozen_weights(model),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "process_before_bytes": before,
        "peak_bytes": max(peaks.values()),
        "peak_by_phase_bytes": peaks,
        "memory_by_part_bytes": parts,
        "seconds_by_phase": seconds,
        "seconds_a_step": steps,
        "tokens_per_second": tokens_per_second(size, steps),
        "with_int8_products": {
            "seconds_a_step": products,
            "tokens_per_second": tokens_per_second(size, products),
            "loss_before": again.loss_before,
            "loss_after": again.loss_after,
        }
        if products
        else None,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
    }


def shown(result: dict[str, Any]) -> str:
    """The account as text."""
    rows = [
        *((part, held / GIB, "GiB") for part, held in result["memory_by_part_bytes"].items()),
        ("peak of the process", result["peak_bytes"] / GIB, "GiB"),
        *((phase, taken, "s") for phase, taken in result["seconds_by_phase"].items()),
        ("training", result["tokens_per_second"], "tokens/s"),
    ]
    if result["with_int8_products"]:
        rows.append(
            ("training, int8 products", result["with_int8_products"]["tokens_per_second"], "tokens/s")
        )
    lines = [f"{result['weights']:,} pretrained weights, {result['trained']:,} trained"]
    return "\n".join([*lines, *(f"{name:32} {value:10.3f} {unit}" for name, value, unit in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field, default in asdict(Size()).items():
        flag = f"--{field.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            choices = {"kind": KINDS, "shared_kind": KINDS, "personal": ("lora", "full")}.get(field)
            parser.add_argument(flag, type=type(default), default=default, choices=choices)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = vars(parser.parse_args())
    out, threads = given.pop("out"), given.pop("threads")
    result = prove(Size(**given), threads)
    print(shown(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
