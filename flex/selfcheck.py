"""A two-second proof that a backend computes the layer: values and gradients against the reference in
float64.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flex_kernels import Experts, Personal, Routed, Shared, flex_moe, reference
from flex_kernels.dispatch import DEVICE_OF

MULTIPLE = 8.0
"""How many times the error of plain torch in the same dtype a backend may make."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Check:
    """One backend in one dtype.

    Attributes:
        value_error, gradient_error: relative L2 errors against float64; the gradient's is the worst over all
            inputs.
        value_allowed, gradient_allowed: what the rule allows, from plain torch's own errors in this dtype.
        seconds: what the check took, compilation included.
        problem: the exception's text when the backend raised, else "".
    """

    backend: str
    dtype: str
    value_error: float
    value_allowed: float
    gradient_error: float
    gradient_allowed: float
    seconds: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return (
            not self.problem
            and self.value_error <= self.value_allowed
            and self.gradient_error <= self.gradient_allowed
        )


def self_check(backend: str, dtype: torch.dtype = torch.float32) -> Check:
    """Runs one small layer with everything switched on (personal and shared expert, gates) forward and
    backward.

    The routing decision is given, so that a rounding cannot send a token to another expert.
    """
    started = time.perf_counter()
    device = DEVICE_OF.get(backend, "cuda" if torch.cuda.is_available() else "cpu")
    exact_layer, cotangent_TH = small_layer(torch.float64)
    exact = values_and_gradients(exact_layer, cotangent_TH, "reference")
    layer, cotangent_TH = moved(exact_layer, dtype, device), cotangent_TH.to(device, dtype)
    name = str(dtype).removeprefix("torch.")
    try:
        plain = values_and_gradients(layer, cotangent_TH, "reference")
        found = values_and_gradients(layer, cotangent_TH, backend)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        seconds = time.perf_counter() - started
        nan = float("nan")
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return Check(backend, name, nan, nan, nan, nan, seconds, problem)
    # A few units in the last place, so that a lucky rounding of plain torch fails nobody.
    floor = 4 * torch.finfo(dtype).eps
    errors = [relative_error(f, e) for f, e in zip(found, exact)]
    allowed = [MULTIPLE * relative_error(p, e) + floor for p, e in zip(plain, exact)]
    worst = max(range(1, len(errors)), key=lambda i: errors[i] / allowed[i])
    seconds = time.perf_counter() - started
    return Check(backend, name, errors[0], allowed[0], errors[worst], allowed[worst], seconds)


def small_layer(dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """The arguments of ``flex_moe`` for a random layer at unit scale, and a gradient for its output."""
    T, H, E, K, I = 33, 64, 6, 2, 48
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / fan_in**0.5

    ids_TK = torch.rand(T, E, generator=generator).argsort(dim=-1)[:, :K]
    layer = {
        "x": normal(T, H),
        "router": Routed(ids_TK, normal(T, K).softmax(-1)),
        "experts": Experts(normal(E, 2 * I, H, fan_in=H), normal(E, H, I, fan_in=I)),
        "personal": Personal(
            normal(2 * I, H, fan_in=H), normal(H, I, fan_in=I), normal(H, fan_in=H), normal()
        ),
        "shared": Shared(normal(2 * I, H, fan_in=H), normal(H, I, fan_in=I), normal(H, fan_in=H)),
    }
    return layer, normal(T, H)


def moved(layer: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else value.dtype)
        return replace(value, **{f.name: convert(getattr(value, f.name)) for f in fields(value)})

    return {name: convert(value) for name, value in layer.items()}


def values_and_gradients(layer: dict[str, Any], cotangent_TH: Tensor, backend: str) -> list[Tensor]:
    """y, then the gradients of x, routing weights, personal expert and its gate. Experts stay frozen."""
    personal, router = layer["personal"], layer["router"]
    wanted = [layer["x"], router.weights, personal.gate_up, personal.down, personal.gate_weight]
    leaves = [t.detach().clone().requires_grad_() for t in wanted]
    arguments = {
        **layer,
        "x": leaves[0],
        "router": Routed(router.ids, leaves[1]),
        "personal": Personal(leaves[2], leaves[3], leaves[4], personal.gate_bias),
    }
    if backend == "reference":
        y_TH, _ = reference.moe(
            arguments["x"],
            arguments["router"],
            arguments["experts"],
            arguments["personal"],
            arguments["shared"],
            "add",
        )
    else:
        y_TH = flex_moe(**arguments, backend=backend)
    return [y_TH.detach(), *torch.autograd.grad(y_TH, leaves, cotangent_TH)]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in float64; infinite when ``got`` is not finite."""
    got, exact = got.double().cpu(), exact.double().cpu()
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got - exact).norm() / exact.norm()).item()
