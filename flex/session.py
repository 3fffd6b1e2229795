"""What a run needs in memory: the data, one prepared model for all clients, the shared state, the store on
disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex.config import Config, ConfigError
from flex.data import load_clients
from flex.rows import ClientData
from flex.seeds import derive_seed, torch_seed
from flex.store import Store, StoreError
from flex.strategies import STRATEGIES, Strategy


@dataclass
class Session:
    """One loaded run. The model's trained tensors belong to whoever was loaded last.

    Args:
        shared: what the server holds. store: open for reading at least.
        parameters: number of "shared", "personal" (trained a client) and "frozen" parameters.
    """

    config: Config
    strategy: Strategy
    model: Any
    tokenizer: Any
    clients: dict[str, ClientData]
    shared: dict[str, Tensor]
    store: Store
    parameters: dict[str, int] = field(default_factory=dict)

    def load_client(self, name: str) -> bool:
        """Puts the shared state and what the client kept into the model; False if the client has kept nothing
        yet.

        Raises StoreError naming client and file: truncated, foreign, or made with other settings.
        """
        from flex.state import load_shared

        load_shared(self.model, self.shared)
        kept = self.store.load_client(name)
        if kept is None:
            return False
        try:
            self.strategy.restore(self.model, kept)
        except ValueError as error:
            path = self.store.client_path(name)
            raise StoreError(f"client {name!r}: {path} does not fit this run: {error}") from error
        return True

    def measure(self, name: str, generate: bool) -> dict[str, Any]:
        """The client's held-out metrics as the run stands (see :func:`flex.evaluate.evaluate_rows`) and
        ``personal``.

        A client that has never trained has no personal expert and is measured with the gates shut.
        """
        from flex.block import gates_shut
        from flex.evaluate import evaluate_rows, evaluation_rows

        settings = self.config.evaluation
        trained = self.load_client(name)
        rows = evaluation_rows(self.clients[name].test, settings.rows, self.config.run.seed, name)
        with gates_shut(self.model) if self.strategy.personal and not trained else nullcontext():
            measured = evaluate_rows(
                self.model, self.tokenizer, rows, settings, self.config.data.max_length, generate
            )
        return {"personal": trained, **measured}


def open_run(folder: str | Path) -> Session:
    """A run's folder as it stands after its last finished round, to evaluate or generate with; nothing is
    written.

    Raises:
        StoreError: no run, or nothing finished in it, or a file that cannot be read.
        ConfigError, DataError: the model or the data cannot be loaded any more.
    """
    store = Store(folder)
    if not store.exists():
        raise StoreError(f"{folder} holds no run: there is no config.toml in it")
    store.committed = store.read_latest()
    if store.committed is None:
        raise StoreError(f"{folder} has no finished round yet")
    config = Config.from_toml(store.folder / "config.toml")
    return load_session(config, load_clients(config), store)


def load_session(config: Config, clients: Sequence[ClientData], store: Store) -> Session:
    """Loads and prepares the model; the shared state is the committed one, or the start's without one.

    Raises ConfigError as :func:`load_model`; StoreError naming the file: the committed shared state cannot be
    read, is not finite or does not fit the model.
    """
    from flex.state import load_shared, shared_state

    strategy = STRATEGIES[config.federation.strategy]()
    model, tokenizer = load_model(config)
    parameters = prepare_model(model, config, strategy)
    if store.committed is None:
        shared = shared_state(model)
    else:
        round_ = store.committed.round
        shared = store.load_shared(round_)
        try:
            load_shared(model, shared)
        except ValueError as error:
            path = store.shared_path(round_)
            raise StoreError(f"{path} does not fit this run: {error}") from error
    return Session(
        config, strategy, model, tokenizer, {c.name: c for c in clients}, shared, store, parameters
    )


def usable_device(config: Config) -> torch.device:
    """Where the model goes. Raises ConfigError: ``model.device`` is not there."""
    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device={device!r} cannot be used here: {error}") from error
    return place


def load_model(config: Config) -> tuple[Any, Any]:
    """(frozen model in eval mode on its device, tokenizer).

    Its experts are quantised where ``model.experts`` and ``model.shared_experts`` ask, and never all in
    memory before that.

    Raises ConfigError: ``model.path`` cannot be loaded, or ``model.device`` is not there.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from flex.attention import PACKED
    from flex.loading import check_folder, load
    from flex_kernels import allow_int8_products

    place = usable_device(config)
    allow_int8_products(config.model.int8_products)
    path = config.model.local_path()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        check_folder(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        kinds: dict[str, Any] = {
            "experts": config.model.experts or None,
            "shared_experts": config.model.shared_experts or None,
        }
        dtype = getattr(torch, config.model.dtype)
        model = load(path, dtype=dtype, attn_implementation=PACKED, **kinds)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path!r} cannot be loaded: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model.requires_grad_(False)
    return model.eval().to(place), tokenizer


def prepare_model(model: Any, config: Config, strategy: Strategy) -> dict[str, int]:
    """Grafts, adds LoRA, in place; the start depends on ``run.seed`` alone. Returns the numbers of
    parameters.
    """
    from flex.block import checkpoint_layers
    from flex.grafting import graft
    from flex.lora import add_lora
    from flex.models import find_blocks
    from flex.quantized import frozen_weights, kind_of
    from flex.state import personal_tensors, shared_tensors

    personal, settings = config.personal, config.model
    held = kind_of(adapter.experts(block) for block, adapter in find_blocks(model).values())
    if held is not None and settings.experts_implementation != "flex_kernels":
        raise ConfigError(
            f"model.experts_implementation={settings.experts_implementation!r}: only 'flex_kernels' computes "
            f"with the {held} experts of {settings.path}"
        )
    if strategy.personal:
        # The choice is made for each client when it first takes part; until then any expert does.
        graft(
            model,
            start=[0] * len(find_blocks(model)),
            mix=personal.mix,  # type: ignore[arg-type]
            save=personal.save,  # type: ignore[arg-type]
            backend=settings.backend,
            personal=personal.kind,  # type: ignore[arg-type]
            rank=personal.rank,
            personal_dtype=torch.float32,
            generator=torch.Generator().manual_seed(derive_seed(config.run.seed, "personal")),
        )
    elif settings.experts_implementation == "flex_kernels":
        graft(model, personal=None, save=personal.save, backend=settings.backend)  # type: ignore[arg-type]
    else:
        model.set_experts_implementation(settings.experts_implementation)
    shared = config.shared
    with torch_seed(config.run.seed, "shared"):
        add_lora(model, shared.rank, shared.alpha, shared.dropout, list(shared.targets) or None)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    return {
        "shared": sum(t.numel() for t in shared_tensors(model).values()),
        "personal": sum(t.numel() for t in personal_tensors(model).values() if t.requires_grad),
        "frozen": frozen_weights(model),
    }
