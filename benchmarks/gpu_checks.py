"""The layer at a model's sizes against the float64 reference: fresh data, poisoned memory, awkward routing.

Letters: T tokens, H hidden, E experts, K chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_layers import FAILURES
from flex_kernels import Experts, Personal, Routed, Router, Shared, flex_moe, reference

# The allowed error, as a multiple of what plain torch loses in the same type.
MULTIPLE = 2.0
# (T, H, I, E, K, shared width, routing, routed weights): odd sizes first, then the sizes of real layers.
SIZES = (
    (77, 200, 72, 60, 6, 40, "router", "plain"),
    (1, 2048, 1408, 60, 4, 5632, "router", "plain"),
    (129, 2048, 1408, 60, 4, 5632, "one-hot", "plain"),
    (1000, 2048, 1024, 64, 8, 0, "skip", "plain"),
    (2048, 2048, 1408, 60, 4, 5632, "router", "plain"),
    (1024, 4096, 1792, 8, 2, 0, "router", "plain"),
    (33, 72, 40, 512, 16, 0, "router", "plain"),
)
# What the others leave out of the pinned plans: several tiles a program of a persistent grid, each of fewer
# steps than loads are in flight; tiles of 32 and of 64 rows.
BFLOAT16_SIZES = (
    (30000, 72, 40, 5, 2, 24, "router", "plain"),
    (400, 2048, 1408, 60, 4, 0, "router", "plain"),
    (1024, 2048, 768, 128, 8, 0, "router", "plain"),
)
# Few rows an expert, decoded in the main loop; and many, decoded a part of the experts at a time.
QUANTISED_SIZES = (
    (77, 200, 72, 60, 6, 40, "router", "int8"),
    (77, 200, 72, 60, 6, 40, "router", "nf4"),
    (2048, 2048, 1408, 60, 4, 5632, "router", "int8"),
    (2048, 2048, 1408, 60, 4, 5632, "router", "nf4"),
)
TINY = (
    (9, 24, 12, 5, 2, 8, "router", "plain"),
    (6, 24, 12, 5, 2, 0, "one-hot", "plain"),
    (6, 24, 12, 5, 2, 0, "skip", "plain"),
)
QUANTISED_TINY = ((9, 24, 12, 5, 2, 8, "router", "int8"), (6, 24, 12, 5, 2, 0, "skip", "nf4"))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_layer(sizes: tuple, device: str, dtype: torch.dtype, seed: int) -> tuple:
    T, H, I, E, K, Is, routing, kind = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).div_(shape[-1] ** 0.5).to(dtype)

    router: Router | Routed = Router(normal(E, H), K, normalize=True)
    if routing == "one-hot":
        router = Routed(torch.full((T, 1), E - 1, device=device), torch.ones(T, 1, device=device))
    elif routing == "skip":
        ids = torch.randint(0, E + 1, (T, K), device=device, generator=generator)
        router = Routed(ids, torch.rand(T, K, device=device, generator=generator))
    own = Personal(normal(2 * I, H), normal(H, I), normal(H).float(), torch.tensor(0.1, device=device))
    common = Shared(normal(2 * Is, H), normal(H, Is), normal(H)) if Is else None
    x = torch.randn(T, H, device=device, generator=generator).to(dtype)
    gate_up, down = normal(E, 2 * I, H), normal(E, H, I)
    experts = Experts(gate_up, down) if kind == "plain" else Experts.quantize(gate_up, down, kind)
    return x, router, experts, own, common


def converted(record: Any, dtype: torch.dtype) -> Any:
    if record is None:
        return None
    floats = {f.name: getattr(record, f.name) for f in fields(record)}
    return replace(
        record,
        **{k: v.to(dtype) for k, v in floats.items() if isinstance(v, Tensor) and v.is_floating_point()},
    )


def outputs(
    x: Tensor, router: Any, experts: Experts, own: Any, common: Any, dy: Tensor, **options: Any
) -> dict:
    """y and the gradients that a client's step needs: of x, the personal expert, its gate and the router's
    weights."""
    leaves = {"x": x, "gate_up": own.gate_up, "down": own.down, "gate_weight": own.gate_weight}
    if isinstance(router, Routed):
        leaves["weights"] = router.weights
    for t in leaves.values():
        t.requires_grad_()
    y = flex_moe(x, router, experts, own, common, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d {k}": g for k, g in zip(leaves, grads)}


def fixed_routing(x: Tensor, router: Any) -> Any:
    """A float64 routing decision, so that every type is compared on the same experts."""
    if isinstance(router, Routed):
        return router
    ids, weights, _ = reference.route(x.double(), replace(router, weight=router.weight.double()))
    return Routed(ids, weights.float())


def allowed(plain_error: float, dtype: torch.dtype, longest: int) -> float:
    """The relative error that an output may have, from that of plain torch in the same type.

    The last part is for sums of ``longest`` products in float32, one after the other as a kernel adds them: a
    library that splits a sum among threads, as for one token, loses far less and is no measure of it.
    """
    in_order = 0.5 * torch.finfo(torch.float32).eps * longest**0.5
    return MULTIPLE * plain_error + 4 * torch.finfo(dtype).eps + in_order


def relative_error(got: Tensor, want: Tensor) -> float:
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    return error if math.isfinite(error) else math.inf


def check_layers(backends: list[str], device: str, sizes: tuple, dtypes: tuple, seed: int) -> Iterator[dict]:
    """One record a (backend, type, size, mix): the worst error of any output over what is allowed; > 1 is a
    failure."""
    for dims in sizes:
        for dtype in dtypes:
            x, router, experts, own, common = random_layer(dims, device, dtype, seed)
            router = fixed_routing(x, router)
            dy = torch.randn(x.shape, device=device)
            mix = "convex" if dims[0] % 2 else "add"

            def run(kind: torch.dtype, **options: Any) -> dict:
                parts = (converted(r, kind) for r in (router, experts, own, common))  # noqa: B023
                return outputs(x.detach().to(kind), *parts, dy, mix=mix, **options)  # noqa: B023

            exact = run(torch.float64, backend="reference")
            plain = run(dtype, backend="reference")
            for backend in backends:
                save = "preact" if dims[4] % 2 else "recompute"
                record = {
                    "backend": backend,
                    "dtype": str(dtype).removeprefix("torch."),
                    "sizes": dims,
                    "mix": mix,
                    "save": save,
                }
                try:
                    with poisoned():
                        got = run(dtype, backend=backend, save=save)
                except FAILURES as error:
                    yield record | {"passed": False, "failed": f"{type(error).__name__}: {error}"[:400]}
                    continue
                longest = max(*dims[:3], dims[5])
                ratios = {
                    name: relative_error(got[name], want)
                    / allowed(relative_error(plain[name], want), dtype, longest)
                    for name, want in exact.items()
                }
                worst = max(ratios, key=ratios.__getitem__)
                yield record | {
                    "worst": worst,
                    "error_over_allowed": ratios[worst],
                    "passed": ratios[worst] <= 1,
                }


def far_experts(backend: str) -> dict:
    """Expert weights of more than 2^31 elements, on a GPU: the last expert must give what it gives alone."""
    E, H, I = 160, 4096, 2048
    gate_up = torch.empty(E, 2 * I, H, dtype=torch.bfloat16, device="cuda").normal_(0, H**-0.5)
    down = torch.empty(E, H, I, dtype=torch.bfloat16, device="cuda").normal_(0, I**-0.5)
    x = torch.randn(64, H, dtype=torch.bfloat16, device="cuda")
    ids, ones = torch.full((64, 1), E - 1, device="cuda"), torch.ones(64, 1, device="cuda")
    far = flex_moe(x, Routed(ids, ones), Experts(gate_up, down), backend=backend)
    near = flex_moe(x, Routed(ids - ids, ones), Experts(gate_up[-1:], down[-1:]), backend=backend)
    error = relative_error(far, near)
    return {"backend": backend, "what": "2^31 elements", "error": error, "passed": error < 1e-2}
