"""The layer and its peers on the same tensors: what the GPU suite checks and measures.

Letters: T tokens, H hidden, E experts, K chosen, I expert width, Is shared width.

Every peer gets the same frozen weights, ids and weights, and computes the routed experts alone, as ours does
beside it; the personal and shared experts are measured in cases of our own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.roofline import Layer
from flex_kernels import Experts, Personal, Routed, Shared, flex_moe
from flex_kernels.quantize import KINDS, Kind

Forward = Callable[[Tensor], Tensor]
Build = Callable[["Problem"], Forward]
GROUPED, EAGER, BATCHED = (f"transformers {kind}" for kind in ("grouped_mm", "eager", "batched_mm"))
DENSE, LIGER, SCATTERMOE = "dense of equal FLOPs", "liger fused_moe", "scattermoe"
# What a kernel or a peer that does not work on this machine raises; it is recorded, and the suite goes on.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, TypeError, AttributeError, NotImplementedError)
FAILURES += (ValueError, LookupError, AssertionError)
if importlib.util.find_spec("triton"):
    from triton.errors import TritonError

    FAILURES += (TritonError,)


@dataclass(frozen=True)
class Problem:
    """One layer with random weights, an input, and a routing decision."""

    layer: Layer
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor


def make_problem(
    layer: Layer, tokens: int, device: str, dtype: torch.dtype, skewed: bool = False, seed: int = 0
) -> Problem:
    """Unit-scale activations. ``skewed`` draws experts with Zipf's weights 1/1, 1/2, 1/3, ... instead of
    evenly."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(0, shape[-1] ** -0.5, generator=generator)

    x_TH = torch.empty(tokens, layer.H, dtype=dtype, device=device).normal_(generator=generator)
    odds_E = 1 / torch.arange(1, layer.E + 1, device=device) if skewed else torch.ones(layer.E, device=device)
    ids_TK = torch.multinomial(odds_E.float().expand(tokens, -1), layer.K, generator=generator)
    weights_TK = torch.rand(tokens, layer.K, device=device, generator=generator)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    gate_up, down = normal(layer.E, 2 * layer.I, layer.H), normal(layer.E, layer.H, layer.I)
    return Problem(layer, x_TH, ids_TK.int(), weights_TK, gate_up, down)


def ours(p: Problem, backend: str, save: str) -> Forward:
    return lambda x: flex_moe(
        x, Routed(p.ids_TK, p.weights_TK), Experts(p.gate_up_E2IH, p.down_EHI), save=save, backend=backend
    )


def ours_quantised(p: Problem, backend: str, kind: Kind) -> Forward:
    """The same experts rounded to 8 or 4 bits: another layer's values, at another size in memory."""
    experts, routed = Experts.quantize(p.gate_up_E2IH, p.down_EHI, kind), Routed(p.ids_TK, p.weights_TK)
    return lambda x: flex_moe(x, routed, experts, save="recompute", backend=backend)


def ours_complete(p: Problem, backend: str, save: str) -> Forward:
    """With the shared expert of the model, and a personal expert of the routed width whose parameters
    train."""
    layer, x = p.layer, p.x_TH

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=x.dtype, device=x.device) / shape[-1] ** 0.5

    own = Personal(normal(2 * layer.I, layer.H), normal(layer.H, layer.I), normal(layer.H).float())
    for t in (own.gate_up, own.down, own.gate_weight):
        t.requires_grad_()
    common = Shared(normal(2 * layer.Is, layer.H), normal(layer.H, layer.Is)) if layer.Is else None
    experts, routed = Experts(p.gate_up_E2IH, p.down_EHI), Routed(p.ids_TK, p.weights_TK)
    return lambda x: flex_moe(x, routed, experts, own, common, save=save, backend=backend)


def transformers_experts(p: Problem, implementation: str) -> Forward:
    """transformers' own experts ("eager", "grouped_mm" or "batched_mm") over the same frozen weights."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    layer = p.layer
    config = SimpleNamespace(
        num_experts=layer.E,
        hidden_size=layer.H,
        moe_intermediate_size=layer.I,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        module = Qwen2MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(p.gate_up_E2IH, requires_grad=False)
    module.down_proj = torch.nn.Parameter(p.down_EHI, requires_grad=False)
    ids_TK, weights_TK = p.ids_TK.long(), p.weights_TK.to(p.x_TH.dtype)
    return lambda x: module(x, ids_TK, weights_TK)


def liger(p: Problem) -> Forward:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    weights_TK = p.weights_TK.to(p.x_TH.dtype)
    return lambda x: LigerFusedMoEFunction.apply(x, p.gate_up_E2IH, p.down_EHI, p.ids_TK, weights_TK)


def scattermoe(p: Problem) -> Forward:
    from scattermoe.mlp import GLUMLP

    layer = p.layer
    with torch.device("meta"):
        module = GLUMLP(layer.H, layer.I, layer.E, layer.K)
    # Its up rows come first, ours last.
    up_first = p.gate_up_E2IH.roll(layer.I, dims=1)
    module.experts.weight = torch.nn.Parameter(up_first, requires_grad=False)
    module.output_experts.weight = torch.nn.Parameter(p.down_EHI, requires_grad=False)
    ids_TK, weights_TK = p.ids_TK.long(), p.weights_TK.to(p.x_TH.dtype)
    return lambda x: module(x, weights_TK, ids_TK)


def dense(p: Problem) -> Forward:
    """A dense SwiGLU of equal operations: T rows through one expert of width K*I, two library GEMMs."""
    layer = p.layer
    picked = [p.gate_up_E2IH[e % layer.E] for e in range(layer.K)]
    gate = torch.cat([w[: layer.I] for w in picked])
    up = torch.cat([w[layer.I :] for w in picked])
    gate_up = torch.cat([gate, up])
    down = torch.cat([p.down_EHI[e % layer.E] for e in range(layer.K)], dim=1)

    def forward(x: Tensor) -> Tensor:
        z_TI, u_TI = torch.nn.functional.linear(x, gate_up).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(z_TI) * u_TI, down)

    return forward


def compiled(build: Build, device: str, fullgraph: bool) -> Build:
    """``build``'s layer under torch.compile; off a GPU without code generation, which takes minutes there."""

    def build_compiled(p: Problem) -> Forward:
        torch._dynamo.reset()
        backend = "inductor" if device != "cpu" else "aot_eager"
        return torch.compile(build(p), fullgraph=fullgraph, backend=backend)

    return build_compiled


def quantised_name(backend: str, kind: Kind) -> str:
    return f"flex {backend} recompute, {kind} experts"


def complete_name(backend: str) -> str:
    return f"flex {backend} recompute, with personal and shared"


def contenders(backends: Sequence[str]) -> dict[str, Build]:
    """Every layer that can be measured, by name: ours, then what a user could choose instead.

    A builder whose peer is not installed raises ImportError.
    """
    found: dict[str, Build] = {}
    for backend in backends:
        for save in ("preact", "recompute"):
            found[f"flex {backend} {save}"] = partial(ours, backend=backend, save=save)
        for kind in KINDS:
            found[quantised_name(backend, kind)] = partial(ours_quantised, backend=backend, kind=kind)
        found[complete_name(backend)] = partial(ours_complete, backend=backend, save="recompute")
    found[GROUPED] = partial(transformers_experts, implementation="grouped_mm")
    found[DENSE] = dense
    found[LIGER] = liger
    found[SCATTERMOE] = scattermoe
    found[EAGER] = partial(transformers_experts, implementation="eager")
    found[BATCHED] = partial(transformers_experts, implementation="batched_mm")
    return found


def compiled_contenders(backends: Sequence[str], device: str) -> dict[str, Build]:
    """The same under torch.compile: ours as one graph, transformers' with the graph breaks it needs."""
    plain = contenders(backends)
    ours_first = [f"flex {backend} recompute" for backend in backends[:1]]
    return {
        f"{name}, compiled": compiled(plain[name], device, fullgraph=name in ours_first)
        for name in (*ours_first, GROUPED, EAGER)
    }
