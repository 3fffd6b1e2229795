"""The same federation step on the stock transformers layer and on ours: tokens per second and memory.

A FLEx client's local steps (personal expert and gate in every layer, LoRA on attention, the same batches, the
same AdamW) run with the layer computed in one of four ways: by flex_kernels, with pre-activations kept or
not, or by transformers' own block (``grouped_mm`` or ``eager``) with the personal expert and its gate beside
it in plain torch. Each measurement is a fresh process, the ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flex.batching import Batch, example_lengths, training_batches
from flex.config import Config
from flex.memory import PeakMemory
from flex.models import packs
from flex.progress import plural
from flex.report.data import SPEED_FILE, median
from flex.rows import ClientData
from flex_kernels.check import check_option

# How flex_kernels' layer is called here, and what it keeps.
OURS = {"flex-preact": "preact", "flex-recompute": "recompute"}
LAYERS = {
    "flex_kernels, preact": "flex-preact",
    "flex_kernels, recompute": "flex-recompute",
    "transformers, grouped_mm": "grouped_mm",
    "transformers, eager": "eager",
}
WARM_UP = 1
# With OMP_PROC_BIND, OpenMP binds the thread that loads it to one core, and children inherit that.
UNBOUND = "import os; os.sched_setaffinity(0, range(os.cpu_count()));"
TENSORS = ("ids_BL", "positions_BL", "where_N", "targets_N")


class ComparisonError(RuntimeError):
    """A process that measured a layer ended without a result; the message names the layer and says why."""


class StockWithPersonal(nn.Module):
    """transformers' block as it is, and y = block(x) + g E_p(x) in plain torch."""

    def __init__(self, block: nn.Module, personal: nn.Module):
        super().__init__()
        self.block, self.personal = block, personal

    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self.personal
        gate = torch.sigmoid(hidden_states.float() @ own.gate_weight + own.gate_bias)[..., None]
        both = nn.functional.linear(hidden_states, own.gate_up.to(hidden_states.dtype))
        first, second = both.chunk(2, dim=-1)
        expert = nn.functional.linear(nn.functional.silu(first) * second, own.down.to(hidden_states.dtype))
        return self.block(hidden_states) + (gate * expert).to(hidden_states.dtype)


def compare(
    config: Config,
    clients: Sequence[ClientData],
    folder: Path,
    repeats: int = 2,
    steps: int = 2,
    progress: Callable[[str], object] = lambda text: None,
) -> Path:
    """Measures every layer ``repeats`` times and writes the comparison into ``folder``; returns the file.

    Args:
        config: model, batch size, lengths, threads and learning rates are taken from it.
        clients: the one with the longest rows is trained on, for the fullest batches.
        steps: timed steps in each process, after one that is not timed.

    Raises:
        ComparisonError: our own layer could not be measured. A stock layer that fails is reported in the
            file.
    """
    client = max(clients, key=lambda c: sum(len(row.instruction) for row in c.train) / len(c.train))
    samples: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        batches = Path(place) / "batches.safetensors"
        tokens = save_batches(config, client, WARM_UP + steps, batches)
        settings = Path(place) / "config.toml"
        settings.write_text(config.to_toml(), encoding="utf-8")
        for repeat in range(repeats):
            for name, layer in LAYERS.items():
                if name in failed:
                    continue
                progress(f"{name} ({repeat + 1} of {repeats})")
                try:
                    sample = measure_in_process(layer, settings, batches)
                except ComparisonError as error:
                    if layer in OURS:
                        raise
                    failed[name] = str(error)
                    continue
                samples.setdefault(name, []).append(sample)
    content = {
        "what": description(config, client.name, tokens, repeats, steps, failed),
        "layers": [
            {
                "name": name,
                "tokens_per_second": [sample["tokens_per_second"] for sample in taken],
                "extra_memory": [sample["peak_bytes"] - sample["loaded_bytes"] for sample in taken],
                "peak_memory": [sample["peak_bytes"] for sample in taken],
            }
            for name, taken in samples.items()
        ],
        "samples": samples,
        "failed": failed,
    }
    from flex.files import atomic_write

    with atomic_write(folder / SPEED_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder / SPEED_FILE


def description(
    config: Config, client: str, tokens: list[int], repeats: int, steps: int, failed: dict[str, str]
) -> str:
    text = (
        f"A FLEx client's optimiser step ({client}, {config.training.batch_size} rows, about "
        f"{median(tokens):,.0f} tokens, {config.model.dtype}). Each way ran in "
        f"{plural(repeats, 'fresh process')}, taking turns, {plural(steps, 'timed step')} after {WARM_UP} "
        "to warm up; medians. The stock layer computes the personal expert and its gate in plain torch "
        "beside transformers' block; ours keeps pre-activations for the backward pass (preact) or computes "
        "them again (recompute). Memory above the loaded model includes the gradients and optimiser "
        "state of what is trained, the same for all."
    )
    if config.model.experts:
        shared = config.model.shared_experts
        text += (
            f" Frozen experts of flex_kernels' layer in {config.model.experts}"
            f"{f', shared ones in {shared}' if shared else ''}; the stock layer knows only "
            f"{config.model.dtype}."
        )
    return text + "".join(f" Not measured: {reason}." for reason in failed.values())


def save_batches(config: Config, client: ClientData, count: int, path: Path) -> list[int]:
    """Writes ``count`` training batches of the client, the same for every process; returns their tokens."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    folder = config.model.local_path()
    made = training_batches(
        client.train,
        AutoTokenizer.from_pretrained(folder),
        max_length=config.data.max_length,
        batch_size=config.training.batch_size,
        steps=count,
        epochs=0,
        seed=(config.run.seed, "comparison"),
        apart=not packs(AutoConfig.from_pretrained(folder)),
    )
    tensors: dict[str, Tensor] = {}
    tokens = []
    for i, batch in enumerate(islice(made, count)):
        tensors |= {f"{i}.{name}": getattr(batch, name).contiguous() for name in TENSORS}
        tensors[f"{i}.counts"] = torch.tensor([batch.tokens, batch.examples])
        tokens.append(batch.tokens)
    save_file(tensors, path)
    return tokens


def load_batches(path: Path) -> list[Batch]:
    from safetensors.torch import load_file

    tensors = load_file(path)
    count = sum(name.endswith(".counts") for name in tensors)
    batches = []
    for i in range(count):
        ids_BL, positions_BL, where_N, targets_N = (tensors[f"{i}.{name}"] for name in TENSORS)
        counts = tensors[f"{i}.counts"]
        lengths = example_lengths(positions_BL)
        batches.append(Batch(ids_BL, positions_BL, where_N, targets_N, lengths, *map(int, counts)))
    return batches


def measure_in_process(layer: str, settings: Path, batches: Path) -> dict[str, Any]:
    command = [sys.executable, *start(), layer, str(settings), str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ComparisonError(f"the process measuring {layer!r} failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def start() -> list[str]:
    """Python's arguments for this module in a process that may use all cores."""
    if os.environ.get("OMP_PROC_BIND", "false").lower() == "false" or not hasattr(os, "sched_setaffinity"):
        return ["-m", "flex.compare"]
    return ["-c", f"{UNBOUND} from flex.compare import main; main()"]


def measure(layer: str, config: Config, batches: Sequence[Batch]) -> dict[str, Any]:
    """The federation step in this process, on the configured model; see :func:`measure_model`."""
    from flex.session import load_model

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if layer not in OURS:
        # transformers' layers know no quantised experts: they run on the model as it is.
        plain = replace(config.model, experts="", shared_experts="", int8_products=False)
        config = replace(config, model=plain)
    model, _ = load_model(config)
    return measure_model(model, layer, config, batches)


def measure_model(model: Any, layer: str, config: Config, batches: Sequence[Batch]) -> dict[str, Any]:
    """The federation step on a frozen model: timed seconds, tokens per second, bytes, every step's loss.

    Args:
        model: prepared in place, with a personal expert and LoRA, around the layer to measure.
        layer: one of OURS, or of transformers' own ("grouped_mm", "eager").
        batches: a step each; the first is not timed.

    Raises:
        ValueError: ``layer`` is none of these.
    """
    from flex.client import train_locally
    from flex.session import prepare_model
    from flex.strategies import STRATEGIES

    check_option("layer", layer, tuple(LAYERS.values()))
    if layer in OURS:
        config = replace(config, personal=replace(config.personal, save=OURS[layer]))
        prepare_model(model, config, STRATEGIES["flex"]())
    else:
        prepare_stock(model, config, layer)
    device = next(model.parameters()).device
    # Weights may be mapped from the file and not yet read: they count as loaded for every layer alike.
    for parameter in model.parameters():
        parameter.detach().sum()
    loaded = PeakMemory(device).read()
    ends = [time.perf_counter()]
    losses: list[float] = []

    def on_step(tokens: int, loss: float) -> None:
        ends.append(time.perf_counter())
        losses.append(loss)

    result = train_locally(model, iter(batches), config.training, name=layer, on_step=on_step)
    seconds = [after - before for before, after in pairwise(ends)][WARM_UP:]
    speeds = [batch.tokens / s for batch, s in zip(batches[WARM_UP:], seconds)]
    return {
        "tokens_per_second": median(speeds),
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": result.peak_bytes,
        "losses": losses,
    }


def prepare_stock(model: nn.Module, config: Config, implementation: str) -> None:
    """What ``prepare_model`` does for the flex strategy, around transformers' own block; the same start."""
    from flex.lora import add_lora
    from flex.models import find_blocks
    from flex.personal import PersonalCopy
    from flex.seeds import torch_seed

    model.set_experts_implementation(implementation)  # type: ignore[operator]
    for name, (block, adapter) in find_blocks(model).items():
        own = PersonalCopy(adapter.experts(block), 0, adapter.router(block).weight[0], torch.float32)
        model.set_submodule(name, StockWithPersonal(block, own))
    shared = config.shared
    with torch_seed(config.run.seed, "shared"):
        add_lora(model, shared.rank, shared.alpha, shared.dropout, list(shared.targets) or None)


def comparable(config: Config) -> Config:
    """``config`` with what the comparison fixes: a full personal expert, added; no checkpointing."""
    return replace(
        config,
        personal=replace(config.personal, kind="full", mix="add"),
        model=replace(config.model, gradient_checkpointing=False),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures one layer in this process; prints JSON.")
    parser.add_argument("layer", choices=sorted(LAYERS.values()))
    parser.add_argument("config", type=Path)
    parser.add_argument("batches", type=Path)
    arguments = parser.parse_args(argv)
    config = comparable(Config.from_toml(arguments.config))
    print(json.dumps(measure(arguments.layer, config, load_batches(arguments.batches))))


if __name__ == "__main__":
    main()
