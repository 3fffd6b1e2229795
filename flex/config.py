"""The settings of one federation: one frozen dataclass a TOML table, every field checked before anything is
loaded.

    [model]       which pretrained model, in which dtype       [training]    a client's local steps
    [data]        where the rows come from                     [personal]    what stays on the client
    [partition]   how rows become clients                      [shared]      what travels
    [federation]  strategy, rounds, sampling                   [evaluation]  what is measured, and when
    [run]         folder, seed, threads

Errors are :class:`ConfigError` and name the file, the key, what was given and what is accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and what is accepted."""


def setting(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its documentation and its accepted values (``low`` <= value, ``above`` < value,
    ...).
    """
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "low": low,
        "above": above,
        "high": high,
        "below": below,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Table:
    """Base of the tables: checks every field's type and value on construction."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = converted(getattr(self, f.name), hints[f.name], f"{table_name(type(self))}.{f.name}")
            check_value(value, f.metadata, f"{table_name(type(self))}.{f.name}")
            object.__setattr__(self, f.name, value)


@dataclass(frozen=True)
class Model(Table):
    path: str = setting(
        "demo", "Hugging Face id or folder; 'demo' is SmolLM2-135M converted to Mixtral's shape"
    )
    dtype: str = setting(
        "bfloat16",
        "of the frozen base; trained tensors are float32",
        choices=("bfloat16", "float16", "float32"),
    )
    device: str = setting("auto", "'auto' (the GPU if there is one), 'cpu', 'cuda', 'cuda:1', ...")
    backend: str = setting(
        "auto", "of the fused layer", choices=("auto", "reference", "cpu", "triton", "cuda")
    )
    experts: str = setting(
        "",
        "of the frozen routed experts: '' holds them as the checkpoint does, 'int8' and 'nf4' quantise them",
        choices=("", "int8", "nf4"),
    )
    shared_experts: str = setting(
        "",
        "likewise of the frozen shared experts, beside quantised routed ones",
        choices=("", "int8", "nf4"),
    )
    int8_products: bool = setting(
        False,
        "with quantised experts: also round what they meet to int8, where the CPU is faster so",
    )
    experts_implementation: str = setting(
        "flex_kernels",
        "what computes the layers of a strategy without a personal expert",
        choices=("flex_kernels", "eager", "grouped_mm", "batched_mm"),
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, more time")

    def local_path(self) -> str:
        """``path`` as transformers takes it; the demo model is made first where it is not there yet."""
        if self.path != "demo":
            return self.path
        from flex.moefication import demo_model

        return str(demo_model())


@dataclass(frozen=True)
class Data(Table):
    source: str = setting(
        "reasoning_gym", "where rows come from", choices=("reasoning_gym", "jsonl", "huggingface")
    )
    path: str = setting(
        "", "jsonl: the training file (.jsonl or .jsonl.gz); huggingface: data set name or folder"
    )
    test_path: str = setting("", "jsonl: held-out rows; empty: held_out is split off each client's rows")
    subset: str = setting("", "huggingface: configuration name")
    split: str = setting("train", "huggingface: split to train on")
    test_split: str = setting("", "huggingface: split to test on; empty: held_out is split off")
    columns: dict[str, str] = setting(  # noqa: RUF009, for the default_factory inside
        {}, "our name -> column name, e.g. {instruction = 'question'}"
    )
    skills: tuple[str, ...] = setting(
        ("word_sorting", "number_filtering", "family_relationships", "chain_sum"),
        "reasoning_gym: one client a skill",
    )
    rows_per_skill: int = setting(400, "reasoning_gym: training rows of each skill", low=1)
    test_rows_per_skill: int = setting(50, "reasoning_gym: held-out rows of each skill", low=1)
    held_out: float = setting(0.1, "fraction of a client's rows kept for testing", above=0.0, below=1.0)
    max_rows: int = setting(0, "most training rows a client keeps; 0 keeps all", low=0)
    max_length: int = setting(512, "tokens; longer prompts lose their middle", low=8)


@dataclass(frozen=True)
class Partition(Table):
    scheme: str = setting(
        "field",
        "how rows become clients",
        choices=("field", "pathological", "dirichlet", "iid"),
    )
    field: str = setting(
        "client", "field: the field whose values are the clients", choices=("client", "category")
    )
    clients: int = setting(4, "pathological, dirichlet, iid: number of clients", low=1)
    categories_per_client: int = setting(1, "pathological: categories each client sees", low=1)
    alpha: float = setting(0.5, "dirichlet: concentration; small is uneven", above=0.0)


@dataclass(frozen=True)
class Federation(Table):
    strategy: str = setting("flex", "what is trained, what travels", choices=("flex", "fedavg", "local"))
    rounds: int = setting(3, "rounds", low=1)
    clients_per_round: int = setting(0, "clients sampled each round; 0: all, or sample_fraction", low=0)
    sample_fraction: float = setting(1.0, "fraction of the clients sampled each round", above=0.0, high=1.0)
    weighting: str = setting(
        "tokens",
        "a client's weight in the average: its answer tokens trained on, its training rows, or equal",
        choices=("tokens", "examples", "uniform"),
    )


@dataclass(frozen=True)
class Training(Table):
    local_steps: int = setting(10, "optimiser steps a client makes a round; 0: use local_epochs", low=0)
    local_epochs: int = setting(0, "passes over the client's rows a round; 0: use local_steps", low=0)
    batch_size: int = setting(16, "rows of data (examples) a step", low=1)
    rows_per_pass: int = setting(
        0, "packed rows of max_length in one forward pass; less memory when small; 0: all of the batch", low=0
    )
    learning_rate: float = setting(2e-4, "of the shared LoRA", above=0.0)
    personal_learning_rate: float = setting(1e-4, "of the personal experts", above=0.0)
    gate_learning_rate: float = setting(1e-3, "of the adaptive gates", above=0.0)
    schedule: str = setting("cosine", "of the learning rates over the rounds", choices=("constant", "cosine"))
    final_fraction: float = setting(
        0.05, "cosine: last round's learning rate over the first's", low=0.0, high=1.0
    )
    weight_decay: float = setting(0.0, "AdamW's, never on gates", low=0.0)
    beta1: float = setting(0.9, "AdamW's", low=0.0, below=1.0)
    beta2: float = setting(0.999, "AdamW's", low=0.0, below=1.0)
    clip: float = setting(1.0, "largest norm of a step's gradient; 0: no clipping", low=0.0)


@dataclass(frozen=True)
class Personal(Table):
    kind: str = setting("full", "train the personal expert whole, or through LoRA", choices=("full", "lora"))
    rank: int = setting(16, "of the personal LoRA", low=1)
    mix: str = setting("add", "y = r + g E_p(x), or (1-g) r + g E_p(x)", choices=("add", "convex"))
    save: str = setting("auto", "what backward keeps", choices=("auto", "recompute", "preact"))
    selection_rows: int = setting(64, "a client's rows used to choose the expert to copy", low=1)


@dataclass(frozen=True)
class Shared(Table):
    rank: int = setting(8, "of LoRA on attention", low=1)
    alpha: float = setting(16.0, "LoRA's scale is alpha / rank", above=0.0)
    dropout: float = setting(0.0, "on LoRA's input", low=0.0, below=1.0)
    targets: tuple[str, ...] = setting((), "names of the linear layers; empty: the architecture's attention")


@dataclass(frozen=True)
class Evaluation(Table):
    every: int = setting(1, "rounds between evaluations; 0: only after the last", low=0)
    before: bool = setting(True, "also measure the pretrained model, before round 1")
    rows: int = setting(50, "held-out rows of each client; 0: all", low=0)
    clients: int = setting(0, "most clients measured, sampled from the seed; 0: all", low=0)
    batch_size: int = setting(16, "rows of data a forward pass", low=1)
    generate: bool = setting(True, "generate answers: ROUGE-L, exact match, verifier score")
    generate_every: int = setting(
        0, "rounds between evaluations that generate; 0: only before and last", low=0
    )
    generate_rows: int = setting(16, "rows answered by generation; 0: all of rows", low=0)
    max_new_tokens: int = setting(48, "of a generated answer", low=1)


@dataclass(frozen=True)
class Run(Table):
    folder: str = setting("runs/flex", "where everything is written; must not hold another run")
    seed: int = setting(0, "of sampling, data order, initial weights", low=0)
    threads: int = setting(0, "CPU threads; 0: torch's default", low=0)


@dataclass(frozen=True)
class Config:
    """A whole federation. Every table has defaults: ``Config()`` runs the demo model on reasoning-gym."""

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    partition: Partition = dataclasses.field(default_factory=Partition)
    federation: Federation = dataclasses.field(default_factory=Federation)
    training: Training = dataclasses.field(default_factory=Training)
    personal: Personal = dataclasses.field(default_factory=Personal)
    shared: Shared = dataclasses.field(default_factory=Shared)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    run: Run = dataclasses.field(default_factory=Run)

    def __post_init__(self) -> None:
        for name, table in TABLES.items():
            given = getattr(self, name)
            if not isinstance(given, table):
                raise ConfigError(
                    f"{name}={given!r} is not a flex.config.{table.__name__}; "
                    "from plain dicts use Config.from_dict"
                )
        if not self.run.folder.strip():
            raise ConfigError(
                f"run.folder={self.run.folder!r} is empty; name a folder, '.' is the current one"
            )
        data, model, training = self.data, self.model, self.training
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", model.device):
            raise ConfigError(f"model.device={model.device!r} is not one of 'auto', 'cpu', 'cuda', 'cuda:N'")
        if model.int8_products and not model.experts:
            raise ConfigError(
                "model.int8_products=true goes with model.experts='int8' or 'nf4', "
                f"got model.experts={model.experts!r}"
            )
        if model.shared_experts and not model.experts:
            raise ConfigError(
                f"model.shared_experts={model.shared_experts!r} goes with model.experts='int8' or 'nf4', "
                f"got model.experts={model.experts!r}"
            )
        if model.experts and model.experts_implementation != "flex_kernels":
            raise ConfigError(
                f"model.experts={model.experts!r} and model.experts_implementation="
                f"{model.experts_implementation!r}: only 'flex_kernels' computes with quantised experts"
            )
        if data.source in ("jsonl", "huggingface") and not data.path:
            raise ConfigError(f"data.path is empty; data.source={data.source!r} needs it")
        if data.source == "reasoning_gym" and not data.skills:
            raise ConfigError("data.skills is empty; data.source='reasoning_gym' needs at least one skill")
        allowed = {"instruction", "output", "category", "client"}
        for ours in data.columns:
            if ours not in allowed:
                raise ConfigError(f"data.columns.{ours} is unknown{suggestion(ours, allowed)}")
        if bool(training.local_steps) == bool(training.local_epochs):
            raise ConfigError(
                f"training.local_steps={training.local_steps} and "
                f"training.local_epochs={training.local_epochs}: exactly one of them must be above 0"
            )
        if self.federation.clients_per_round and self.federation.sample_fraction != 1.0:
            raise ConfigError(
                f"federation.clients_per_round={self.federation.clients_per_round} and "
                f"federation.sample_fraction={self.federation.sample_fraction}: give one of them"
            )

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> Config:
        """From nested plain dicts, as TOML gives them. Raises ConfigError."""
        made: dict[str, Any] = {}
        for name, values in tables.items():
            if name not in TABLES:
                raise ConfigError(f"[{name}] is not a table of the configuration{suggestion(name, TABLES)}")
            if not isinstance(values, Mapping):
                raise ConfigError(f"{name}={values!r} is not a table; write [{name}] and its keys below")
            known = {f.name for f in dataclasses.fields(TABLES[name])}
            for key in values:
                if key not in known:
                    raise ConfigError(f"{name}.{key} is unknown{suggestion(key, known)}")
            made[name] = TABLES[name](**values)
        return cls(**made)

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """From a TOML file, then ``overrides`` such as ``"data.path=rows.jsonl"`` (right side: TOML, else a
        string).

        Raises:
            ConfigError: the file is missing or not TOML, or a setting is refused.
        """
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a TOML file: {error}") from error
        for text in overrides:
            apply_override(tables, text)
        try:
            return cls.from_dict(tables)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(table).items()}
            for name, table in ((name, getattr(self, name)) for name in TABLES)
        }

    def to_toml(self, comments: bool = False) -> str:
        """TOML text that :meth:`from_toml` reads back to an equal Config; ``comments`` adds each setting's
        meaning.
        """
        lines = []
        for name, values in self.to_dict().items():
            lines.append(f"[{name}]")
            docs = {f.name: f.metadata["doc"] for f in dataclasses.fields(TABLES[name])}
            for key, value in values.items():
                lines.append(f"{key} = {toml_value(value)}" + (f"  # {docs[key]}" if comments else ""))
            lines.append("")
        return "\n".join(lines)


TABLES: dict[str, type[Table]] = {
    "model": Model,
    "data": Data,
    "partition": Partition,
    "federation": Federation,
    "training": Training,
    "personal": Personal,
    "shared": Shared,
    "evaluation": Evaluation,
    "run": Run,
}


def table_name(table: type[Table]) -> str:
    return table.__name__.lower()


def suggestion(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def converted(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``, or ConfigError. An int passes for a float; nothing else is converted."""
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        inner = get_args(kind)[0]
        if not isinstance(items, (list, tuple)) or any(not isinstance(v, inner) for v in items):
            raise ConfigError(f"{key}={value!r} is not a list of {inner.__name__}")
        return tuple(items)
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping) or any(
            not (isinstance(k, str) and isinstance(v, str)) for k, v in value.items()
        ):
            raise ConfigError(f"{key}={value!r} is not a table of strings")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key}={value!r} is a {type(value).__name__}; expected {kind.__name__}")
    return value


def check_value(value: Any, metadata: Mapping[str, Any], key: str) -> None:
    if metadata["choices"] and value not in metadata["choices"]:
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(map(repr, metadata['choices']))}")
    bounds = [
        (metadata["low"], lambda v, b: v >= b, "at least"),
        (metadata["above"], lambda v, b: v > b, "above"),
        (metadata["high"], lambda v, b: v <= b, "at most"),
        (metadata["below"], lambda v, b: v < b, "below"),
    ]
    wanted = [(bound, holds, word) for bound, holds, word in bounds if bound is not None]
    if wanted and not (all(holds(value, bound) for bound, holds, _ in wanted) and abs(value) < float("inf")):
        accepted = " and ".join(f"{word} {bound:g}" for bound, _, word in wanted)
        raise ConfigError(
            f"{key}={value!r} must be {accepted}{'' if abs(value) < float('inf') else ', and finite'}"
        )


def apply_override(tables: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    table, dot, name = key.strip().partition(".")
    if not equals or not dot or not table or not name:
        raise ConfigError(f"override {text!r} is not of the form table.key=value")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    values = tables.setdefault(table, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{table}={values!r} is not a table; write [{table}] and its keys below")
    values[name] = value


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's escapes are TOML's; DEL alone must be escaped in TOML and is not in JSON.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
