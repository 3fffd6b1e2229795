"""What 8 and 4 bits cost in quality: the layers' outputs, the demo model's perplexity, and a federation.

    python -m benchmarks.quantized_quality --out benchmarks/results/quantized_quality.json
    python -m benchmarks.quantized_quality --rounds 1 --out x.json

Layers: the relative error of each layer's routed sum on held-out text,
|| MoE_q(x) - MoE(x) ||_F / || MoE(x) ||_F, in float32, for the inputs that the model in bfloat16 gives the
layer and for the same routing: what rounding alone does there. Perplexity: on the held-out texts of the demo
model's conversion, in bfloat16, every model on the same kernels; and the Kullback-Leibler divergence of a
token's distribution from the bfloat16 model's, which differs less from one rounding to the next like it.
"nf4 calibrated" knows the importance of columns (flex.column_importance) from texts that are not held out,
"nf4 gptq" is rounded with error feedback on the same texts (flex.gptq). "int8 products" and "nf4 products"
are experts whose inputs and gradients are rounded to int8 too (flex_kernels.allow_int8_products), on
processors that use it.
Federation: FLEx as the demo runs it, the mean held-out loss of an answer token before and after.

Numbers, not times: they do not depend on what else the machine does. The file is written after every part,
and parts that it holds already are kept; a federation that was stopped goes on from its last finished round.

Letters: T tokens, H hidden.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine
from flex.config import Config
from flex.files import atomic_write
from flex.importance import Importance
from flex.quantized import expert_bytes
from flex_kernels import Experts, allow_int8_products
from flex_kernels.cpu import ops
from flex_kernels.quantize import KINDS, Kind

PRECISIONS: tuple[Kind | None, ...] = (None, *KINDS)
CALIBRATED, FEEDBACK = "nf4 calibrated", "nf4 gptq"
PRODUCTS: dict[str, Kind] = {f"{kind} products": kind for kind in KINDS}
# A layer's name and its experts in float32 -> the experts rounded.
Rounding = Callable[[str, Experts], Experts]
DTYPE = torch.bfloat16


def name_of(experts: Kind | None) -> str:
    return experts or "bfloat16"


@contextmanager
def products_of(kind: str) -> Iterator[None]:
    """int8 products within the block for the kind that is named after them."""
    allow_int8_products(kind in PRODUCTS)
    try:
        yield
    finally:
        allow_int8_products(False)


def multiplies_int8() -> bool:
    with products_of(next(iter(PRODUCTS))):
        return ops.int8_products()


def nearest(kind: Kind, importance: Importance | None = None) -> Rounding:
    """Every weight by itself."""
    return lambda layer, exact: Experts.quantize(
        exact.gate_up, exact.down, kind, importance[layer] if importance else None
    )


def held_by(model: Any) -> Rounding:
    """As the layers of ``model`` hold them."""
    from flex.models import find_blocks

    blocks = find_blocks(model)
    return lambda layer, exact: blocks[layer][1].experts(blocks[layer][0])


PLAIN_ROUNDINGS = {kind: nearest(kind) for kind in KINDS}


@torch.no_grad()
def layer_errors(
    model: Any, ids_BL: Tensor, roundings: Mapping[str, Rounding] = PLAIN_ROUNDINGS
) -> dict[str, dict[str, float]]:
    """kind -> layer -> relative error of the routed sum on ``ids_BL``; ``model`` has plain experts."""
    from flex.models import find_blocks
    from flex.watch import body_of, watch_inputs
    from flex_kernels import flex_moe

    errors: dict[str, dict[str, float]] = {kind: {} for kind in roundings}
    blocks = find_blocks(model)

    def see(layer: str, x_TH: Tensor) -> None:
        block, adapter = blocks[layer]
        plain, router = adapter.experts(block), adapter.route(block, x_TH)
        x_TH = x_TH.float()
        exact = Experts(plain.gate_up.float(), plain.down.float())
        y_TH = flex_moe(x_TH, router, exact)
        for kind, rounding in roundings.items():
            with products_of(kind):
                miss_TH = flex_moe(x_TH, router, rounding(layer, exact)) - y_TH
            errors[kind][layer] = float(miss_TH.norm() / y_TH.norm())

    with watch_inputs(model, {name: block for name, (block, _) in blocks.items()}, see):
        body_of(model)(input_ids=ids_BL, use_cache=False)
    return errors


@torch.no_grad()
def divergence(model: Any, other: Any, ids_BL: Tensor, rows: int = 2) -> float:
    """Mean over tokens of KL(other || model) of the next token, nats."""
    total, count = 0.0, 0
    for part_BL in ids_BL.split(rows):
        log_q_TV, log_p_TV = (
            m(input_ids=part_BL, use_cache=False).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            for m in (model, other)
        )
        total += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
        count += len(log_p_TV)
    return total / count


def calibrated_model(path: str, importance: Importance) -> Any:
    from flex.models import find_blocks
    from flex.quantized import quantize_experts

    model = flex_load(path)
    for name, (block, adapter) in find_blocks(model).items():
        quantize_experts(adapter.part(block, "experts"), "nf4", importance[name])
    return model


def perplexities(
    path: str, make: Callable[[], Any], texts: Mapping[str, Tensor], name: str = ""
) -> dict[str, Any]:
    """``perplexity`` and ``divergence`` of each text, and ``expert_bytes`` that the routed experts hold."""
    from flex.block import moe_blocks
    from flex.moefication.measure import perplexity

    plain, model = flex_load(path), make()
    for m in (plain, model):
        m.set_experts_implementation("flex_kernels")
    with products_of(name):
        # Plain experts take no notice.
        quality = {
            "perplexity": {kind: perplexity(model, ids, skip=1, rows=2) for kind, ids in texts.items()},
            "divergence": {kind: divergence(model, plain, ids) for kind, ids in texts.items()},
        }
    return quality | {
        "expert_bytes": expert_bytes(adapter.experts(block) for block, adapter in moe_blocks(model).values()),
    }


def flex_load(path: str, experts: Kind | None = None) -> Any:
    import flex

    return flex.load(path, experts, DTYPE)


def federation(config: Config) -> dict[str, Any]:
    """client -> mean held-out loss of an answer token, before the first round and after the last.

    A run that its folder holds already is continued.
    """
    import flex
    from flex.report.reader import read_runs

    folder = Path(config.run.folder)
    result = flex.run(config, resume=folder if (folder / "config.toml").is_file() else None)
    (run,) = read_runs([Path(result.folder)])
    losses = {
        client: {int(number): float(loss) for number, loss in by_round.items()}
        for client, by_round in run.loss.items()
    }
    last = config.federation.rounds
    return {
        "rounds": last,
        "before": {client: by_round[0] for client, by_round in losses.items()},
        "after": {client: by_round[last] for client, by_round in losses.items()},
    }


def federation_config(
    path: str, experts: Kind | None, folder: Path, rounds: int, threads: int, int8_products: bool = False
) -> Config:
    """The demo's FLEx run without generated answers."""
    from flex.demo import DemoSettings, demo_config

    settings = DemoSettings(folder, path, rounds=rounds, threads=threads, experts=experts or "")
    config = demo_config(settings, "flex")
    name = f"{experts} products" if int8_products else name_of(experts)
    return replace(
        config,
        model=replace(config.model, int8_products=int8_products),
        evaluation=replace(config.evaluation, before=True, generate=False, every=0),
        run=replace(config.run, folder=str(folder / name)),
    )


def measure(
    path: str,
    out: Path,
    texts: Mapping[str, Tensor],
    configs: Mapping[str, Config],
    threads: int,
    calibration: Sequence[Tensor] = (),
) -> None:
    """Every part that ``out`` does not hold yet, written as soon as it is known.

    Args:
        path: the model's folder.
        texts: kind of text -> ids_BL.
        configs: precision -> the federation to run.
        calibration: ids_BL to round by; none leaves out the kinds that are calibrated.
    """
    import flex

    torch.set_num_threads(threads)
    content: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    content["machine"] = machine()
    content["model"] = Path(path).name
    content["calibration_tokens"] = sum(ids.numel() for ids in calibration)
    content["held_out_tokens"] = {kind: ids.numel() for kind, ids in texts.items()}

    def write(done: str) -> None:
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{done}: written", flush=True)

    def add(section: str, key: str, make: Any) -> None:
        if key not in content.setdefault(section, {}):
            content[section][key] = make()
            write(f"{section}, {key}")

    @cache
    def fed_back() -> Any:
        model = flex_load(path)
        flex.gptq(model, calibration)
        return model

    model = flex_load(path)
    roundings = dict(PLAIN_ROUNDINGS)
    if multiplies_int8():
        roundings |= {name: nearest(kind) for name, kind in PRODUCTS.items()}
    if calibration:
        importance = flex.column_importance(model, calibration)
        roundings |= {
            CALIBRATED: nearest("nf4", importance),
            FEEDBACK: lambda layer, exact: held_by(fed_back())(layer, exact),
        }
    for text, ids_BL in texts.items():
        held = content.setdefault("layer_error", {}).setdefault(text, {})
        missing = {kind: rounding for kind, rounding in roundings.items() if kind not in held}
        if missing:
            held |= layer_errors(model, ids_BL[:1], missing)
            write(f"layer_error, {text}")
    del model
    for experts in PRECISIONS:
        add("models", name_of(experts), partial(perplexities, path, partial(flex_load, path, experts), texts))
    if multiplies_int8():
        for name, kind in PRODUCTS.items():
            add("models", name, partial(perplexities, path, partial(flex_load, path, kind), texts, name))
    if calibration:
        add(
            "models",
            CALIBRATED,
            partial(perplexities, path, partial(calibrated_model, path, importance), texts),
        )
        add("models", FEEDBACK, partial(perplexities, path, fed_back, texts))
    for name, config in configs.items():
        add("federation", name, partial(federation, config))


def calibration_ids(tokenizer: Any) -> list[Tensor]:
    """4,096 tokens of the texts that the demo model's conversion was fitted to: reference, stories, chats."""
    from flex.moefication import texts

    kinds = (
        (texts.reference_texts(held_out=False, seed=0), 4),
        (texts.story_texts(held_out=False), 2),
        (texts.chat_texts(held_out=False), 2),
    )
    return [ids for text, rows in kinds for ids in texts.pack(tokenizer, text, rows, 512).split(2)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantized_quality.json"))
    parser.add_argument("--rounds", type=int, default=3, help="of the federation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/quantized_quality"), help="folder of the federation's runs"
    )
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from flex.moefication import demo_model
    from flex.moefication.report import held_out_ids

    path = str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    configs = {
        name_of(experts): federation_config(
            path, experts, arguments.runs, arguments.rounds, arguments.threads
        )
        for experts in PRECISIONS
    }
    if multiplies_int8():
        for name, kind in PRODUCTS.items():
            configs[name] = federation_config(
                path, kind, arguments.runs, arguments.rounds, arguments.threads, int8_products=True
            )
    texts = held_out_ids(tokenizer, None)
    measure(path, arguments.out, texts, configs, arguments.threads, calibration_ids(tokenizer))


if __name__ == "__main__":
    main()
