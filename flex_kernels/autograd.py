"""The layer's two custom ops, their shapes for tracing, and their gradients there.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, N = T*K rows, G sigmoid gates.

``route``    the thin products of x: router and gates.  Saves x, ids, weights, gates (no logits).
``experts``  the feed-forward blocks and their mix.     Saves x, ids, weights, gates, and Z only when asked.

Each op dispatches to the backend named by its last argument. A backend is a module with ``route``,
``route_backward``, ``experts_forward`` and ``experts_backward``; see :mod:`flex_kernels.dispatch`.
An optional tensor that a backend does not produce is returned with zero elements, never None.

The ops are defined with ``torch.library``'s parts and not with ``custom_op``, whose wrapper costs the host
more than the call. Here are their gradients for those who look into a call: tracers see an op with a
registered gradient, ``torch.func`` a Function of the form it wants. Other calls record the whole layer as one
node (:mod:`flex_kernels.node`), and pass the ops by where nobody looks on (:mod:`flex_kernels.calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flex_kernels.dispatch import backend_module

LIBRARY = torch.library.Library("flex_kernels", "FRAGMENT")


def define(implementation: Callable[..., Any]) -> Any:
    """The op ``flex_kernels::<name of the function>``, on every device, without a gradient of its own."""
    name, schema = implementation.__name__, torch.library.infer_schema(implementation, mutates_args=())
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    return getattr(torch.ops.flex_kernels, name).default


def differentiable(op: Any, setup: Callable[..., None], vjp: Callable[..., tuple]) -> Callable[..., Any]:
    """``op`` with a gradient where its calls are looked into: by a tracer, or by ``torch.func``.

    Args:
        setup: (ctx, inputs, output) -> None, as ``register_autograd`` wants it.
        vjp: (ctx, *gradients of the outputs) -> gradients of the inputs.
    """
    torch.library.register_autograd(op, vjp, setup_context=setup, lib=LIBRARY)

    class Transformed(torch.autograd.Function):
        """``torch.func`` takes no gradient that ``register_autograd`` made."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        setup_context = staticmethod(setup)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple:
            return first_order(vjp, ctx, *grads)

    return lambda *inputs: op(*inputs) if torch.compiler.is_compiling() else Transformed.apply(*inputs)


class SecondDerivative(torch.autograd.Function):
    """The first ``count`` of the tensors as they are; a derivative that goes through them is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError("flex_moe has second derivatives on backend='reference' alone")


def first_order(vjp: Callable[..., tuple], ctx: Any, *grads: Any) -> tuple:
    """``vjp``, whose gradients refuse to be differentiated again instead of passing for constants.

    Autograd leaves gradients enabled here only where a second derivative may follow (``create_graph``).
    """
    if not torch.is_grad_enabled():
        return vjp(ctx, *grads)
    with torch.no_grad():
        found = vjp(ctx, *grads)
    given = [t for t in found if t is not None]
    causes = [t for t in (*grads, *ctx.saved_tensors) if t is not None]
    refusing = iter(SecondDerivative.apply(len(given), *given, *causes))
    return tuple(None if t is None else next(refusing) for t in found)


@define
def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    gate_weight_GH: Tensor,
    gate_bias_G: Tensor,
    top_k: int,
    normalize: bool,
    score: str,
    scale: float,
    want_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids_TK int32, weights_TK float32, gates_GT float32, logits_TE float32 or [0, E] if not wanted)."""
    return backend_module(backend).route(
        x_TH, weight_EH, bias_E, gate_weight_GH, gate_bias_G, top_k, normalize, score, scale, want_logits
    )


@torch.library.register_fake(route, lib=LIBRARY)
def _(
    x_TH, weight_EH, bias_E, gate_weight_GH, gate_bias_G, top_k, normalize, score, scale, want_logits, backend
):
    T, E, G = x_TH.shape[0], weight_EH.shape[0], gate_weight_GH.shape[0]
    f32 = torch.float32
    return (
        x_TH.new_empty(T, top_k, dtype=torch.int32),
        x_TH.new_empty(T, top_k, dtype=f32),
        x_TH.new_empty(G, T, dtype=f32),
        x_TH.new_empty(T if want_logits else 0, E, dtype=f32),
    )


@define
def route_backward(
    grad_weights_TK: Tensor,
    grad_gates_GT: Tensor,
    grad_logits_TE: Tensor,
    x_TH: Tensor,
    weight_EH: Tensor,
    gate_weight_GH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gates_GT: Tensor,
    normalize: bool,
    score: str,
    scale: float,
    needs: Sequence[bool],
    other_grad_x_TH: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, router weight, gate weights, gate biases); zero elements where ``needs`` is false.

    What else the gradient of x is made of, ``other_grad_x_TH``, is added to it in the same pass.
    """
    return backend_module(backend).route_backward(
        grad_weights_TK,
        grad_gates_GT,
        grad_logits_TE,
        x_TH,
        weight_EH,
        gate_weight_GH,
        ids_TK,
        weights_TK,
        gates_GT,
        normalize,
        score,
        scale,
        list(needs),
        other_grad_x_TH,
    )


def empty_unless(needed: bool, like: Tensor) -> Tensor:
    return like.new_empty(like.shape if needed else (0,))


@torch.library.register_fake(route_backward, lib=LIBRARY)
def _(
    gw,
    gg,
    gl,
    x_TH,
    weight_EH,
    gate_weight_GH,
    ids,
    weights,
    gates_GT,
    normalize,
    score,
    scale,
    needs,
    other,
    backend,
):
    bias_like = gate_weight_GH.new_empty(gate_weight_GH.shape[0])
    inputs = (x_TH, weight_EH, gate_weight_GH, bias_like)
    return tuple(empty_unless(n, t) for n, t in zip(needs, inputs))


def route_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_TH, weight_EH, _, gate_weight_GH, _, _, ctx.normalize, ctx.score, ctx.scale, _, ctx.backend = inputs
    ids_TK, weights_TK, gates_GT, _ = output
    ctx.mark_non_differentiable(ids_TK)
    ctx.save_for_backward(x_TH, weight_EH, gate_weight_GH, ids_TK, weights_TK, gates_GT)
    # Without this, backward is handed zeros for ids, and for logits that nobody asked for.
    ctx.set_materialize_grads(False)


def dense(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()


def route_vjp(
    ctx: Any,
    grad_ids: None,
    grad_weights: Tensor | None,
    grad_gates: Tensor | None,
    grad_logits: Tensor | None,
) -> tuple:
    need, saved = ctx.needs_input_grad, ctx.saved_tensors
    needs = [need[0], need[1], need[3], need[4]]
    weight_EH, weights_TK, gates_GT = saved[1], saved[4], saved[5]
    grads = route_backward(
        dense(grad_weights, weights_TK),
        dense(grad_gates, gates_GT),
        gates_GT.new_empty(0, weight_EH.shape[0]) if grad_logits is None else grad_logits.contiguous(),
        *saved,
        ctx.normalize,
        ctx.score,
        ctx.scale,
        needs,
        None,
        ctx.backend,
    )
    dx, dw, dgw, dgb = (g if n else None for n, g in zip(needs, grads))
    return dx, dw, None, dgw, dgb, None, None, None, None, None, None


apply_route = differentiable(route, route_setup, route_vjp)


@define
def experts(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    personal_gate_up_2IH: Tensor | None,
    personal_down_HI: Tensor | None,
    gate_T: Tensor | None,
    shared_gate_up_2IH: Tensor | None,
    shared_down_HI: Tensor | None,
    shared_gate_up_scales: Tensor | None,
    shared_down_scales: Tensor | None,
    shared_gate_T: Tensor | None,
    mix: str,
    save_preact: bool,
    keep_order: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TH, the pre-activations of the routed [N, 2I], personal [T, 2Ip] and shared [T, 2Is] experts, the
    order of the routed rows).

    With scales, ``gate_up`` and ``down`` are the codes of :class:`flex_kernels.quantize.Quantized` weights;
    those of the shared expert likewise.
    The routed rows are in expert order (a stable sort of ids). Pre-activations have zero elements unless
    ``save_preact``; they are outputs only so that the tracer knows of them. The order is the backend's own
    (:mod:`flex_kernels.row_order`), and has zero elements where backward is to find it anew: unless
    ``keep_order``, which no tracer may set, as it does not know how tall a plan's tiles are.
    """
    *found, order = backend_module(backend).experts_forward(
        x_TH,
        ids_TK,
        weights_TK,
        gate_up_E2IH,
        down_EHI,
        gate_up_scales,
        down_scales,
        personal_gate_up_2IH,
        personal_down_HI,
        gate_T,
        shared_gate_up_2IH,
        shared_down_HI,
        shared_gate_up_scales,
        shared_down_scales,
        shared_gate_T,
        mix,
        save_preact,
    )
    return (*found, order if keep_order else order.new_empty(0))


@torch.library.register_fake(experts, lib=LIBRARY)
def _(
    x_TH,
    ids_TK,
    weights_TK,
    gate_up,
    down,
    gate_up_scales,
    down_scales,
    p_gate_up,
    p_down,
    gate,
    s_gate_up,
    s_down,
    s_gate_up_scales,
    s_down_scales,
    s_gate,
    mix,
    save,
    keep_order,
    backend,
):
    def preact(rows: int, weight: Tensor | None) -> Tensor:
        if weight is None or not save:
            return x_TH.new_empty(0)
        return x_TH.new_empty(rows, weight.shape[-2])

    T, K = ids_TK.shape
    preacts = preact(T * K, gate_up), preact(T, p_gate_up), preact(T, s_gate_up)
    return x_TH.new_empty(x_TH.shape), *preacts, ids_TK.new_empty(0)


@define
def experts_backward(
    grad_y_TH: Tensor,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    personal_gate_up_2IH: Tensor | None,
    personal_down_HI: Tensor | None,
    gate_T: Tensor | None,
    shared_gate_up_2IH: Tensor | None,
    shared_down_HI: Tensor | None,
    shared_gate_up_scales: Tensor | None,
    shared_down_scales: Tensor | None,
    shared_gate_T: Tensor | None,
    preact_N2I: Tensor,
    personal_preact_T2I: Tensor,
    shared_preact_T2I: Tensor,
    order: Tensor,
    mix: str,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weights, gate_up, down, personal gate_up, personal down, gate, shared gate_up, shared
    down,
    shared gate); zero elements where ``needs`` is false."""
    return backend_module(backend).experts_backward(
        grad_y_TH,
        x_TH,
        ids_TK,
        weights_TK,
        gate_up_E2IH,
        down_EHI,
        gate_up_scales,
        down_scales,
        personal_gate_up_2IH,
        personal_down_HI,
        gate_T,
        shared_gate_up_2IH,
        shared_down_HI,
        shared_gate_up_scales,
        shared_down_scales,
        shared_gate_T,
        preact_N2I,
        personal_preact_T2I,
        shared_preact_T2I,
        order,
        mix,
        list(needs),
    )


@torch.library.register_fake(experts_backward, lib=LIBRARY)
def _(
    dy,
    x,
    ids,
    weights,
    gate_up,
    down,
    gate_up_scales,
    down_scales,
    p_gate_up,
    p_down,
    gate,
    s_gate_up,
    s_down,
    s_gate_up_scales,
    s_down_scales,
    s_gate,
    z,
    zp,
    zs,
    order,
    mix,
    needs,
    backend,
):
    inputs = (x, weights, gate_up, down, p_gate_up, p_down, gate, s_gate_up, s_down, s_gate)
    return tuple(
        x.new_empty(0) if t is None or not n else t.new_empty(t.shape) for n, t in zip(needs, inputs)
    )


# Positions, among the inputs of ``experts``, of the ten tensors that can have a gradient: not ids and scales.
DIFFERENTIABLE = (0, 2, 3, 4, 7, 8, 9, 10, 11, 14)


def experts_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.mix, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Without this, backward is handed zeros as large as the pre-activations.
    ctx.set_materialize_grads(False)


def experts_vjp(ctx: Any, grad_y: Tensor, *grad_preacts: Any) -> tuple:
    needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
    grads = experts_backward(grad_y.contiguous(), *ctx.saved_tensors, ctx.mix, needs, ctx.backend)
    out: list[Tensor | None] = [None] * 19
    for position, needed, grad in zip(DIFFERENTIABLE, needs, grads):
        out[position] = grad if needed else None
    return tuple(out)


apply_experts = differentiable(experts, experts_setup, experts_vjp)
