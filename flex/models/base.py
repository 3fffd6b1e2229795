"""What grafting needs to know of one architecture's Mixture-of-Experts block.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, Is shared width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex.shared_experts import PROJECTIONS, QuantizedMLP
from flex_kernels import Experts, Routed, Router, Shared
from flex_kernels.checkpoint import keep_ids
from flex_kernels.modules import record_of


class Unsupported(ValueError):
    """A model, a block or a setting that the fused layer cannot reproduce; the message names it."""


def is_silu(activation: Any) -> bool:
    return (
        activation is F.silu
        or isinstance(activation, nn.SiLU)
        or type(activation).__name__ == "SiLUActivation"
    )


def check_experts(module: nn.Module) -> None:
    """Raise :class:`Unsupported` unless ``module`` holds gated SiLU experts, [E, 2I, H] and [E, H, I],
    plain or quantised.

    The attributes are those that transformers' ``use_experts_implementation`` sets; absent ones mean the
    plain layout.
    """
    name = type(module).__name__
    # An ungated stack has up_proj in place of gate_up_proj; has_gate says so better.
    for weight in ("gate_up_proj", "down_proj") if getattr(module, "has_gate", True) else ():
        held = getattr(module, weight, None)
        # A quantised weight is a module that holds the tensors.
        if held is None or len(getattr(record_of(held), "shape", ())) != 3:
            raise Unsupported(f"{name} has no 3-dimensional parameter {weight}")
    for flag, wanted, complaint in (
        ("has_bias", False, "expert biases"),
        ("has_gate", True, "ungated experts (no gate_proj)"),
        ("is_transposed", False, "transposed expert weights"),
        ("is_concatenated", True, "interleaved gate and up rows"),
    ):
        if getattr(module, flag, wanted) != wanted:
            raise Unsupported(
                f"{name} has {complaint} ({flag}={getattr(module, flag)}): flex_kernels has none"
            )
    if not is_silu(getattr(module, "act_fn", None)):
        activation = type(getattr(module, "act_fn", None)).__name__
        raise Unsupported(
            f"{name} uses the activation {activation}: flex_kernels computes SiLU (hidden_act='silu')"
        )
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__module__ != "transformers.integrations.moe":
        raise Unsupported(f"{name} overrides _apply_gate: flex_kernels computes silu(gate) * up")


def check_shared(module: nn.Module, where: str) -> None:
    """Raise :class:`Unsupported` unless ``module`` is down(silu(gate x) * up x), of Linears without bias or
    quantised.
    """
    if isinstance(module, QuantizedMLP):
        return
    if not is_silu(getattr(module, "act_fn", None)):
        activation = type(getattr(module, "act_fn", None)).__name__
        raise Unsupported(
            f"{where} uses the activation {activation}: flex_kernels computes SiLU (hidden_act='silu')"
        )
    for part in PROJECTIONS:
        linear = getattr(module, part, None)
        if type(linear) is not nn.Linear:
            raise Unsupported(
                f"{where}.{part} is {type(linear).__name__}, not a plain Linear: the fused layer reads its "
                "weight and would pass over what wraps it; keep adapters off the MoE block"
            )
        if linear.bias is not None:
            raise Unsupported(f"{where}.{part} has a bias (mlp_bias=True): flex_kernels has none")


@dataclass(frozen=True)
class Adapter:
    """How to read one architecture's MoE block; subclass it where a router needs more than its plain fields.

    Attributes:
        architecture: transformers' ``model_type``.
        block_classes: class names of the MoE block in ``transformers.models.<architecture>``.
        normalize: the chosen scores are divided by their sum; None reads ``norm_topk_prob`` of the router
            module.
        shared: attribute of the shared expert in the block, or None.
        shared_gate: attribute of the shared expert's sigmoid gate, or None.
        attention: names of the attention's Linear modules, the default targets of LoRA.
        stored: what the names of the routed experts' tensors in a checkpoint have in them.
        packs: positions meet by attention alone, so that examples can lie end to end in one row.
        floor: what the model's own router adds to the sum that weights are divided by.
    """

    architecture: str
    block_classes: tuple[str, ...]
    normalize: bool | None = None
    shared: str | None = None
    shared_gate: str | None = None
    attention: tuple[str, ...] = field(default=("q_proj", "k_proj", "v_proj", "o_proj"))
    stored: tuple[str, ...] = (".experts.",)
    packs: bool = True
    floor: float = 1e-20

    def recognises(self, module: nn.Module) -> bool:
        """By exact class: a subclass may compute something else."""
        home = type(module).__module__
        return type(module).__name__ in self.block_classes and home.startswith(
            f"transformers.models.{self.architecture}."
        )

    def check(self, block: nn.Module) -> None:
        """Raise :class:`Unsupported` for a setting that the fused layer cannot reproduce."""
        check_experts(self.part(block, "experts"))
        if self.shared is not None and self.has_shared(block):
            check_shared(self.part(block, self.shared), self.shared)
        self.router(block)

    def has_shared(self, block: nn.Module) -> bool:
        """Whether this block has a shared expert: some configurations of an architecture have none."""
        return self.shared is not None and getattr(block, self.shared, None) is not None

    def part(self, block: nn.Module, name: str) -> nn.Module:
        module = getattr(block, name, None)
        if not isinstance(module, nn.Module):
            raise Unsupported(f"{type(block).__name__} has no submodule {name}")
        return module

    def gate(self, block: nn.Module) -> Any:
        """The model's own router module."""
        return block.gate

    def router(self, block: nn.Module) -> Router:
        """The router's settings, read from the model's own router module."""
        gate = self.gate(block)
        normalize = gate.norm_topk_prob if self.normalize is None else self.normalize
        return Router(gate.weight, gate.top_k, normalize=bool(normalize))

    def router_decides(self, block: nn.Module) -> bool:
        """Whether the choice of experts needs the model's own router module (group-limited routing)."""
        return False

    def decide(self, block: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [T, E], ids [T, K]) of the model's own router module."""
        logits_TE, _, ids_TK = self.gate(block)(x_TH)
        return logits_TE, ids_TK

    def route(self, block: nn.Module, x_TH: Tensor) -> Router | Routed:
        """The router's settings; or its decision, where only the model's own module can make it.

        Its own module also runs whenever someone listens to it: transformers records router logits by a
        forward hook there. Weights are then taken from its logits at the kept ids, so that a checkpoint's
        replay cannot route a token elsewhere.
        """
        router = self.router(block)
        gate = self.gate(block)
        if not (self.router_decides(block) or gate._forward_hooks or gate._forward_pre_hooks):
            return router
        logits_TE, ids_TK = self.decide(block, x_TH)
        ids_TK = keep_ids(ids_TK)
        return Routed(ids_TK, weights_at(logits_TE, ids_TK, router, self.floor))

    def experts(self, block: nn.Module) -> Experts:
        """The routed experts as the layer takes them, plain or quantised; nothing is copied."""
        module: Any = block.experts
        try:
            return Experts(record_of(module.gate_up_proj), record_of(module.down_proj))
        except AttributeError as error:
            raise Unsupported(
                f"experts is a {type(module).__name__} without gate_up_proj and down_proj: the fused layer "
                "reads them and would pass over what wraps them; keep adapters off the MoE block"
            ) from error

    def shared_parts(self, block: nn.Module) -> tuple[Any, Tensor | None] | None:
        """The shared expert's module and the weight [H] of its gate, or None."""
        if self.shared is None or not self.has_shared(block):
            return None
        module = getattr(block, self.shared)
        gate_weight = None if self.shared_gate is None else getattr(block, self.shared_gate).weight[0]
        return module, gate_weight

    def shared_expert(self, block: nn.Module, gate_up: Tensor | None = None) -> Shared | None:
        """The shared expert; ``gate_up`` [2 Is, H] is used in place of stacking its two weights anew."""
        parts = self.shared_parts(block)
        if parts is None:
            return None
        module, gate_weight = parts
        if isinstance(module, QuantizedMLP):
            return module.record(gate_weight)
        if gate_up is None:
            gate_up = torch.cat((module.gate_proj.weight, module.up_proj.weight))
        return Shared(gate_up, module.down_proj.weight, gate_weight)


def weights_at(logits_TE: Tensor, ids_TK: Tensor, router: Router, floor: float = 1e-20) -> Tensor:
    """The router's weights for a given choice, [T, K], differentiable in the logits."""
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if router.score == "softmax" else logits_TE.sigmoid()
    weights_TK = scores_TE.gather(1, ids_TK)
    if router.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + floor)
    return weights_TK * router.scale
