"""The fused FLEx layer: checks its arguments, picks a backend, and reads like the equations.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, G sigmoid gates (personal first, then
shared).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flex_kernels import reference
from flex_kernels.check import check_arguments
from flex_kernels.dispatch import resolve_backend
from flex_kernels.node import Call, run
from flex_kernels.quantize import Quantized
from flex_kernels.types import Experts, Mix, Personal, Routed, Router, Save, Shared

# Of the bytes of a layer's routed experts, what save="auto" keeps of pre-activations at most.
LITTLE = 1 / 32


def flex_moe(
    x: Tensor,
    router: Router | Routed,
    experts: Experts,
    personal: Personal | None = None,
    shared: Shared | None = None,
    mix: Mix = "add",
    save: Save = "auto",
    backend: str = "auto",
    return_router_logits: bool = False,
) -> Any:
    """A Mixture-of-Experts layer with a client's personal expert mixed in by an adaptive gate.

    y = r + g E_p(x) for ``mix="add"``, (1 - g) r + g E_p(x) for ``mix="convex"``, where r is the routed sum
    plus the shared expert and g = sigmoid(x . w_g + b_g) (FLEx, arXiv 2506.00965).

    Args:
        x: [..., H] float32, bfloat16, float16 (float64 on the reference backend); any strides.
        router: a :class:`Router`, or a :class:`Routed` decision [T, K] made elsewhere.
        experts: the routed experts, in x's dtype or quantised, and consumed as stored.
        personal: the client's expert and gate; any float dtype, cast to x's for the products. The cast copy
            lives within a pass: none is kept for the backward pass.
        shared: the shared expert; plain weights likewise, quantised ones consumed as stored.
        mix: ``"add"`` or ``"convex"``.
        save: ``"recompute"`` keeps x, ids, weights and gates for the backward pass (about 2H + 12K bytes a
            token in bf16); ``"preact"`` also keeps the pre-activations, 4 K I bytes a token more, and is
            faster; ``"auto"`` does so in calls of few tokens (see :func:`keeps_preact`).
        backend: ``"auto"``, or a name from :func:`flex_kernels.backends`.
        return_router_logits: also return the router's logits [T, E] in float32.

    Returns:
        y, shaped and typed like x; with ``return_router_logits`` the pair (y, logits).

    Raises:
        TypeError, ValueError: an argument does not fit the others; nothing has been computed.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Gradients exist exactly where ``requires_grad`` asks; a frozen weight never gets a buffer of its size.
    """
    check_arguments(x, router, experts, personal, shared, mix, save)
    if return_router_logits and isinstance(router, Routed):
        raise ValueError("return_router_logits=True needs a Router: a Routed decision carries no logits")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, experts = x.to(dtype), Experts(cast(experts.gate_up, dtype), cast(experts.down, dtype))
        # The custom ops choose their own dtypes; autocast would only convert the float32 router product.
        with torch.autocast(x.device.type, enabled=False):
            return flex_moe(x, router, experts, personal, shared, mix, save, backend, return_router_logits)
    name = resolve_backend(backend, x.device, x.dtype)
    x_TH = (x if x.ndim == 2 else x.reshape(-1, x.shape[-1])).contiguous()
    if name == "reference":
        y_TH, logits_TE = reference.moe(x_TH, router, experts, personal, shared, mix)
    else:
        y_TH, logits_TE = fused_moe(
            x_TH, router, experts, personal, shared, mix, save, name, return_router_logits
        )
    y = y_TH if x.ndim == 2 else y_TH.view(x.shape)
    return (y, logits_TE) if return_router_logits else y


def fused_moe(
    x_TH: Tensor,
    router: Router | Routed,
    experts: Experts,
    personal: Personal | None,
    shared: Shared | None,
    mix: Mix,
    save: Save,
    backend: str,
    want_logits: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y_TH, logits_TE float32 if wanted): the same equations on custom ops."""
    decision: tuple[Any, ...]
    settings: tuple[Any, ...]
    if isinstance(router, Routed):
        top_k = router.ids.shape[1]
        decision = None, None, skip_unknown(router.ids, experts.count, backend).int(), router.weights.float()
        settings = 0, False, "softmax", 1.0
    else:
        top_k = router.top_k
        decision = router.weight, router.bias, None, None
        settings = top_k, router.normalize, router.score, router.scale
    own: tuple[Any, ...] = (None,) * 4
    common: tuple[Any, ...] = (None,) * 5
    if personal is not None:
        own = personal.gate_weight, personal.gate_bias, personal.gate_up, personal.down
    if shared is not None:
        common = shared.gate_weight, *stored(shared)
    tensors = x_TH, *decision, *own[:2], common[0], *stored(experts), *own[2:], *common[1:]
    keep = keeps_preact(save, x_TH, top_k, experts, personal, shared)
    return run(Call._make((*tensors, *settings, want_logits, mix, keep, backend)))


def keeps_preact(
    save: Save, x_TH: Tensor, top_k: int, experts: Experts, personal: Personal | None, shared: Shared | None
) -> bool:
    """Whether a call keeps its pre-activations: never where gradients are off.

    ``"auto"`` keeps them where they take at most ``LITTLE`` of what the routed experts hold: there reading
    weights takes most of the time, and computing them again would read a part of them twice.
    """
    if save == "recompute" or not torch.is_grad_enabled():
        return False
    if save == "preact":
        return True
    columns = top_k * experts.gate_up.shape[1]
    columns += sum(ffn.gate_up.shape[0] for ffn in (personal, shared) if ffn is not None)
    # Not nbytes, which a tracer with symbolic sizes does not know.
    held = sum(t.numel() * t.element_size() for t in stored(experts) if t is not None)
    return x_TH.shape[0] * columns * x_TH.element_size() <= LITTLE * held


def skip_unknown(ids_TK: Tensor, experts: int, backend: str) -> Tensor:
    """``ids_TK`` with everything outside [0, E] as E, a slot to skip, where :func:`check_ids` could not look.

    Before the cast to int32, in which an id of 2^32 would become expert 0. Without waiting for the device.
    The CUDA kernels' sort skips such ids itself.
    """
    looked = backend == "cpu" and not torch.compiler.is_compiling()
    if looked or (backend == "cuda" and ids_TK.dtype == torch.int32):
        return ids_TK
    # -1 modulo E + 1 is E: two small kernels, where comparisons and a choice would be four.
    return ids_TK.clamp(-1, experts).remainder(experts + 1)


def cast(weights: Tensor | Quantized, dtype: torch.dtype) -> Tensor | Quantized:
    """Plain weights in ``dtype``; codes have none to change."""
    return weights if isinstance(weights, Quantized) else weights.to(dtype)


def stored(ffn: Experts | Shared) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the custom ops take: gate_up and down, or their codes; then the scales of codes, or None."""
    weights = (ffn.gate_up, ffn.down)
    held = [w.codes if isinstance(w, Quantized) else w for w in weights]
    scales = [w.scales if isinstance(w, Quantized) else None for w in weights]
    return held[0], held[1], scales[0], scales[1]
