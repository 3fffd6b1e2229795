"""One MoE layer with frozen experts in every implementation compared: the same weights, routing and
gradients.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, Is shared width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flex_kernels import Experts, Personal, Router, Shared, allow_int8_products, flex_moe
from flex_kernels.quantize import Kind


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's MoE layer; ``Is`` 0 for no shared expert. Qwen1.5's shared expert has a sigmoid
    gate.
    """

    H: int
    I: int
    E: int
    K: int
    Is: int = 0
    normalize: bool = False


# DeepSeek-MoE-16B's two ungated shared experts are left out: no block of transformers has them beside this
# router.
SHAPES = {
    "qwen1.5": Shape(2048, 1408, 60, 4, Is=5632),
    "deepseek": Shape(2048, 1408, 64, 6),
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3": Shape(2048, 768, 128, 8, normalize=True),
    "mixtral": Shape(4096, 14336, 8, 2, normalize=True),
    "demo": Shape(576, 1152, 4, 2, normalize=True),
}


@dataclass(frozen=True)
class Layer:
    """The weights: frozen router, experts and shared expert; a personal expert that trains."""

    shape: Shape
    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared: tuple[Tensor, Tensor, Tensor] | None
    personal: tuple[Tensor, Tensor, Tensor, Tensor]
    coded: dict[Kind, tuple[Experts, Shared | None]] = field(default_factory=dict)

    def quantized(self, kind: Kind) -> tuple[Experts, Shared | None]:
        """The routed experts in 8 or 4 bits and the shared one in 8; made at the first call and kept."""
        if kind not in self.coded:
            shared = None
            if self.shared is not None:
                gate_up, down, gate_weight = self.shared
                shared = Shared.quantize(gate_up, down, "int8", gate_weight)
            self.coded[kind] = Experts.quantize(self.gate_up, self.down, kind), shared
        return self.coded[kind]


def make_layer(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Layer:
    """Random weights; every expert is one random expert times its own factor, which is quick to make."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * size[-1] ** -0.5).to(dtype)

    def stack(*size: int) -> Tensor:
        one, out = normal(*size), torch.empty(shape.E, *size, dtype=dtype)
        for e in range(shape.E):
            torch.mul(one, 0.9 + 0.2 * e / shape.E, out=out[e])
        return out

    shared = None
    if shape.Is:
        shared = normal(2 * shape.Is, shape.H), normal(shape.H, shape.Is), normal(shape.H)
    gate_up, down = stack(2 * shape.I, shape.H), stack(shape.H, shape.I)
    personal = gate_up[0].clone(), down[0].clone(), normal(shape.H), torch.zeros((), dtype=dtype)
    for leaf in personal:
        leaf.requires_grad_()
    return Layer(shape, normal(shape.E, shape.H), gate_up, down, shared, personal)


def flex_layer(
    layer: Layer, save: str, with_personal: bool, kind: Kind | None = None, int8_products: bool = False
) -> Callable[[Tensor], Tensor]:
    """``int8_products`` holds from a forward pass to the next one of any layer made here."""
    router = Router(layer.router, layer.shape.K, normalize=layer.shape.normalize)
    if kind is None:
        experts = Experts(layer.gate_up, layer.down)
        shared = None if layer.shared is None else Shared(*layer.shared)
    else:
        experts, shared = layer.quantized(kind)
    personal = Personal(*layer.personal) if with_personal else None

    def run(x_TH: Tensor) -> Tensor:
        allow_int8_products(int8_products)
        return flex_moe(x_TH, router, experts, personal, shared, save=save, backend="cpu")  # type: ignore[arg-type]

    return run


def stock_layer(layer: Layer, implementation: str, with_personal: bool) -> Callable[[Tensor], Tensor]:
    """The real block of transformers over the same weights; the personal expert as plain torch beside it.

    ``implementation``: "eager" or "grouped_mm", transformers' own switch.
    """
    from transformers import OlmoeConfig, Qwen2MoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    s = layer.shape
    common = {
        "hidden_size": s.H,
        "num_experts": s.E,
        "num_experts_per_tok": s.K,
        "norm_topk_prob": s.normalize,
    }
    with torch.device("meta"):
        if s.Is:
            config = Qwen2MoeConfig(**common, moe_intermediate_size=s.I, shared_expert_intermediate_size=s.Is)
            block: torch.nn.Module = Qwen2MoeSparseMoeBlock(config)
        else:
            config = OlmoeConfig(**common, intermediate_size=s.I)
            block = OlmoeSparseMoeBlock(config)
    config._experts_implementation = implementation
    state = {
        "gate.weight": layer.router,
        "experts.gate_up_proj": layer.gate_up,
        "experts.down_proj": layer.down,
    }
    if layer.shared is not None:
        gate_up, down, gate = layer.shared
        names = [f"shared_expert.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
        state |= dict(zip(names, (*gate_up.chunk(2), down))) | {"shared_expert_gate.weight": gate[None]}
    block.load_state_dict(state, assign=True)
    block.requires_grad_(False)

    def run(x_TH: Tensor) -> Tensor:
        y = block(x_TH[None])
        y_TH = (y[0] if isinstance(y, tuple) else y).view_as(x_TH)
        if not with_personal:
            return y_TH
        gate_up, down, gate_weight, gate_bias = layer.personal
        gate, up = F.linear(x_TH, gate_up).chunk(2, dim=-1)
        g_T1 = torch.sigmoid(x_TH @ gate_weight + gate_bias)[:, None]
        return y_TH + g_T1 * F.linear(F.silu(gate) * up, down)

    return run


def dense_layer(layer: Layer, with_personal: bool) -> Callable[[Tensor], Tensor]:
    """One dense feed-forward of equal multiplications, without activation: what torch's own product could
    do.
    """
    s = layer.shape
    width = s.K * s.I + s.Is + (s.I if with_personal else 0)
    generator = torch.Generator().manual_seed(1)
    dtype = layer.router.dtype
    gate_up = torch.randn(2 * width, s.H, generator=generator).mul_(s.H**-0.5).to(dtype)
    down = torch.randn(s.H, width, generator=generator).mul_(width**-0.5).to(dtype)
    return lambda x: F.linear(F.linear(x, gate_up)[:, :width], down)


def implementations(
    layer: Layer, with_personal: bool, kinds: Sequence[Kind] = ()
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every implementation by name; experts of ``kinds`` with save="preact", also multiplied in int8
    ("products").
    """
    quantized = {
        f"flex {kind}{' products' if products else ''}": flex_layer(
            layer, "preact", with_personal, kind, products
        )
        for products in (False, True)
        for kind in kinds
    }
    return {
        "flex recompute": flex_layer(layer, "recompute", with_personal),
        "flex preact": flex_layer(layer, "preact", with_personal),
        **quantized,
        "transformers eager": stock_layer(layer, "eager", with_personal),
        "transformers grouped_mm": stock_layer(layer, "grouped_mm", with_personal),
        "dense gemm": dense_layer(layer, with_personal),
    }


def forward_backward(
    layer: Layer, run: Callable[[Tensor], Tensor], x_TH: Tensor, dy_TH: Tensor
) -> Callable[[], None]:
    """Forward and backward to x and, where the layer uses them, the personal expert and its gate."""
    leaf_TH = x_TH.detach().requires_grad_()

    def step() -> None:
        run(leaf_TH).backward(dy_TH)
        for tensor in (leaf_TH, *layer.personal):
            tensor.grad = None

    return step


def forward_only(run: Callable[[Tensor], Tensor], x_TH: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def step() -> None:
        run(x_TH)

    return step
