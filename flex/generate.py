"""Answers from a run's model as one of its clients sees it, or from any model folder."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flex.batching import prompt_ids
from flex.config import Config, Model


class Writer:
    """A model, its tokenizer, and a client's own part in it if there is one.

    Args:
        personal: whether gates are open, so that :meth:`answer` can also be asked without them.
    """

    def __init__(self, model: Any, tokenizer: Any, personal: bool = False):
        self.model, self.tokenizer, self.personal = model, tokenizer, personal

    @torch.no_grad()
    def answer(
        self,
        instruction: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        without_personal: bool = False,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> str:
        """The model's answer, also given to ``on_text`` piece by piece as it is made.

        Args:
            temperature: 0 takes the likeliest token every time; above, tokens are drawn from ``seed``.
            without_personal: with the gates shut: the pretrained experts (and the shared LoRA) alone.

        Raises:
            ValueError: the instruction is empty, ``temperature`` is negative or not finite,
                ``max_new_tokens`` below 1.
        """
        from transformers import GenerationConfig

        from flex.block import gates_shut
        from flex.seeds import torch_seed

        if not instruction.strip():
            raise ValueError("the prompt is empty")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be at least 0, and finite")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        ids = prompt_ids(self.tokenizer, instruction)
        ids_1L = torch.tensor([ids], device=next(self.model.parameters()).device)
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        pieces: list[str] = []

        def take(text: str) -> None:
            pieces.append(text)
            on_text(text)

        with gates_shut(self.model) if without_personal else nullcontext(), torch_seed(seed, "generate"):
            self.model.generate(
                input_ids=ids_1L,
                attention_mask=torch.ones_like(ids_1L),
                generation_config=config,
                streamer=streamer(self.tokenizer, take),
            )
        return "".join(pieces)


def streamer(tokenizer: Any, take: Callable[[str], None]) -> Any:
    """Hands over text as soon as it cannot change any more, the prompt left out."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                take(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def open_writer(
    source: str, client: str | None = None, experts: str = "", shared_experts: str = ""
) -> Writer:
    """A run's folder with one of its clients, or a model: a folder, a Hugging Face id, or "demo".

    Args:
        experts, shared_experts: "int8" or "nf4" quantises them while a model is loaded; a run has settings of
            its own.

    Raises:
        ValueError: a run without ``client``, a client that the run does not know, a client for a model that
            is no run, ``experts`` or ``shared_experts`` for a run.
        RuntimeError: the run's files cannot be read.
    """
    from flex.session import load_model, load_session
    from flex.store import Store, StoreError

    folder = Path(source)
    if not (folder / "config.toml").is_file():
        if client is not None:
            raise ValueError(f"client={client!r}, but {source} is not a run: there is no config.toml in it")
        # A folder is meant as such, also when it holds no model: the network is not asked for its name.
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"{source} is neither a run (config.toml) nor a model (config.json)")
        model = Model(path=source, experts=experts, shared_experts=shared_experts)
        return Writer(*load_model(replace(Config(), model=model)))
    for name, given in (("experts", experts), ("shared_experts", shared_experts)):
        if given:
            raise ValueError(
                f"{name}={given!r}: {source} is a run, which has model.{name} in its config.toml"
            )
    store = Store(folder)
    store.committed = store.read_latest()
    if store.committed is None:
        raise StoreError(f"{folder} has no finished round yet")
    names = run_clients(folder)
    if client is None:
        raise ValueError(f"{folder} is a run: name one of its clients: {', '.join(names)}")
    name = known_client(client, names)
    # The rows themselves are not needed, and may be gone.
    session = load_session(Config.from_toml(folder / "config.toml"), [], store)
    trained = session.load_client(name)
    if session.strategy.personal and not trained:
        raise ValueError(f"client {name!r} has not taken part in any finished round of {folder} yet")
    return Writer(session.model, session.tokenizer, personal=session.strategy.personal)


def run_clients(folder: Path) -> list[str]:
    """The names of a run's clients, from what it wrote when it began."""
    import json

    try:
        return sorted(json.loads((folder / "data.json").read_text(encoding="utf-8"))["sizes"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/data.json cannot be read: {error}") from error


def known_client(name: str, names: Sequence[str]) -> str:
    """``name``, if it is one of ``names``. Raises ValueError that lists them."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise ValueError(
        f"no client is called {name!r}{f'; did you mean {near[0]!r}?' if near else ''} ({listed})"
    )
