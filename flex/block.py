"""The grafted MoE block: takes the original's place, keeps its submodules, adds ``personal``.

Letters: T tokens, H hidden, Is shared width.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flex.models import Adapter, find_blocks
from flex.models.base import check_shared
from flex.personal import PersonalCopy, PersonalLoRA
from flex.shared_experts import QuantizedMLP
from flex_kernels import Routed, Router, Shared, checkpoint_contexts, flex_moe
from flex_kernels.types import Mix, Save


class GraftedBlock(nn.Module):
    """One MoE block computed by the fused layer, with room for a personal expert.

    The original's submodules, parameters and buffers are adopted as they are, under the same names: the keys
    of the model's state dict do not change, ``personal.*`` is added to them. They are read, not called, so
    forward hooks on them do not fire; the router is the exception (see
    :meth:`flex.models.base.Adapter.route`).

    Args:
        original: the pretrained block.
        adapter: of its architecture.
        mix, backend: as in :func:`flex_kernels.flex_moe`.
        save: as there, but that "auto" is also "preact" in a layer that gradient checkpointing runs again,
            which keeps pre-activations from that replay to the backward pass right behind it, one layer at a
            time.

    Attributes:
        personal: the client's expert and gate, or None: then the block is the pretrained one.
        shut: True leaves ``personal`` out for the time being (see :func:`gates_shut`).
    """

    personal: PersonalCopy | PersonalLoRA | None

    def __init__(
        self,
        original: nn.Module,
        adapter: Adapter,
        mix: Mix = "add",
        save: Save = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in original.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        self.adapter = adapter
        self.mix: Mix = mix
        self.save: Save = save
        self.backend = backend
        self.shut = False
        self._gradient_checkpointing_func: Any = None
        self.gradient_checkpointing = False
        self.personal = None
        self.shared_gate_up: Tensor | None = None
        self.stack_shared()
        self.train(original.training)

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers gives every module with this attribute the function that all decoder layers will call,
        then switches it on or off.
        """
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            keep_routing_on_replay(self._gradient_checkpointing_func)
        self._checkpointing = on

    def forward(self, hidden_states: Tensor) -> Tensor:
        """y [..., H] for hidden_states [..., H]."""
        experts = self.adapter.experts(self)
        open_ = self.personal is not None and not self.shut
        personal = self.personal.record_over(experts) if open_ else None  # type: ignore[union-attr]
        shared = self.shared()
        return flex_moe(
            hidden_states,
            self.route(hidden_states),
            experts,
            personal,
            shared,
            self.mix,
            self.kept(),
            self.backend,
        )

    def kept(self) -> Save:
        """What backward keeps of a call, as :func:`flex_kernels.flex_moe` takes it."""
        replayed = self.save == "auto" and self.gradient_checkpointing and self.training
        return "preact" if replayed else self.save

    def route(self, x: Tensor) -> Router | Routed:
        return self.adapter.route(self, x.reshape(-1, x.shape[-1]))

    def shared(self) -> Shared | None:
        """The shared expert over its stacked weights [2 Is, H]; stacked anew when it is trained."""
        parts = self.adapter.shared_parts(self)
        if parts is None:
            return None
        module, _ = parts
        if isinstance(module, QuantizedMLP):
            return self.adapter.shared_expert(self)
        check_shared(module, self.adapter.shared or "")
        gate, up = module.gate_proj.weight, module.up_proj.weight
        if gate.requires_grad or up.requires_grad:
            return self.adapter.shared_expert(self)
        # Someone may have given a projection other memory (quantisation, offloading); tracing cannot ask and
        # trusts.
        if not torch.compiler.is_compiling() and not self.is_stacked(gate, up):
            self.stack_shared()
        return self.adapter.shared_expert(self, self.shared_gate_up)

    def is_stacked(self, gate: Tensor, up: Tensor) -> bool:
        stack = self.shared_gate_up
        if stack is None or stack.device != gate.device or stack.dtype != gate.dtype:
            return False
        return stack.data_ptr() == gate.data_ptr() and stack[gate.shape[0] :].data_ptr() == up.data_ptr()

    @torch.no_grad()
    def stack_shared(self) -> None:
        """Lay the shared expert's gate and up weights in one [2 Is, H] memory, of which both become views.

        The layer wants them stacked; this way nothing is kept twice and nothing is copied at a call. Codes
        have been stacked for good.
        """
        parts = self.adapter.shared_parts(self)
        if parts is None or isinstance(parts[0], QuantizedMLP):
            return
        gate, up = parts[0].gate_proj.weight, parts[0].up_proj.weight
        stack = torch.cat((gate.detach(), up.detach()))
        gate.data, up.data = stack[: gate.shape[0]], stack[gate.shape[0] :]
        self.shared_gate_up = stack

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.stack_shared()
        return self

    def extra_repr(self) -> str:
        return f"{self.adapter.architecture}, mix={self.mix!r}, save={self.save!r}, backend={self.backend!r}"


def checkpoint_layers(model: Any) -> None:
    """Have a transformers model compute its layers again in the backward pass, with the routing of the first
    time.
    """
    # The older name is deprecated where there is the other.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": checkpoint_contexts})


def keep_routing_on_replay(function: Any) -> None:
    """Give a checkpoint function of transformers :func:`flex_kernels.checkpoint_contexts`, in place.

    It is one ``functools.partial`` that all decoder layers share, and made anew by each
    ``gradient_checkpointing_enable``. One that brings a ``context_fn`` of its own is left alone; a reentrant
    one takes none, and is warned about.
    """
    settings = function.keywords if isinstance(function, functools.partial) else {}
    if "context_fn" in settings:
        return
    if settings.get("use_reentrant") is False:
        settings["context_fn"] = checkpoint_contexts
        return
    warnings.warn(
        "this kind of gradient checkpointing lets the replay choose experts again, and a token near a tie "
        "may go elsewhere than in the forward pass; call model.gradient_checkpointing_enable() without "
        "use_reentrant=True",
        stacklevel=2,
    )


def pass_checkpointing_on(model: nn.Module) -> None:
    """Tell the grafted blocks of checkpointing that was switched on before they were there."""
    blocks = list(grafted_blocks(model).values())
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and not isinstance(module, GraftedBlock):
            function = getattr(module, "_gradient_checkpointing_func", None)
            keep_routing_on_replay(function)
            for block in blocks:
                block._gradient_checkpointing_func, block._checkpointing = function, True


def grafted_blocks(model: nn.Module) -> dict[str, GraftedBlock]:
    """The grafted blocks of ``model`` in order, by name (without torch.compile's ``_orig_mod``).

    Raises:
        ValueError: there is none.
    """
    blocks = {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, GraftedBlock)
    }
    if not blocks:
        raise ValueError(f"{type(model).__name__} is not grafted: call flex.graft(model, calibration) first")
    return blocks


def moe_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    """The MoE blocks of a model, grafted or not, in order: name -> (block, adapter).

    Raises:
        Unsupported: as :func:`flex.models.find_blocks`.
    """
    grafted = {n: m for n, m in model.named_modules() if isinstance(m, GraftedBlock)}
    return {n: (m, m.adapter) for n, m in grafted.items()} or find_blocks(model)


@contextmanager
def gates_shut(model: nn.Module) -> Iterator[None]:
    """Inside the block ``model`` computes what it did before grafting; an ungrafted model always does."""
    blocks = [module for module in model.modules() if isinstance(module, GraftedBlock)]
    before = [block.shut for block in blocks]
    try:
        for block in blocks:
            block.shut = True
        yield
    finally:
        for block, shut in zip(blocks, before):
            block.shut = shut
