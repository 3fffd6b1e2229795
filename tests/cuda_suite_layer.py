"""The whole layer on the CUDA backend, forward and backward; run by test_cuda_backend.py in its own process.

On a GPU everything is real. Elsewhere Triton's interpreter runs the expert products and the host emulation
the routing kernels, on CPU tensors.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import assert_close, make_case, with_fixed_routing
from cuda_emulation import ON_GPU, emulation_fixture  # noqa: F401
from triton_device import DEVICE, DTYPES, to_device

from flex_kernels import Experts, Routed, reference
from flex_kernels.cuda import ops
from flex_kernels.layer import fused_moe

pytestmark = pytest.mark.skipif((DEVICE == "cuda") != ON_GPU, reason="needs a GPU, or Triton's interpreter")


@pytest.fixture(autouse=True)
def in_place_of_the_extension(emulation, monkeypatch):
    if emulation.emulated:
        monkeypatch.setattr(ops, "kernels", lambda: emulation.kernels)


def run(case, mix: str, backend: str, save: str = "recompute") -> dict:
    """The output and every gradient, by name, for a fixed random cotangent."""
    case.requiring()
    parts = (case.x_TH, case.router, case.experts, case.personal, case.shared, mix)
    y = reference.moe(*parts)[0] if backend == "reference" else fused_moe(*parts, save, backend, False)[0]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    named = case.tensors()
    grads = torch.autograd.grad(y, list(named.values()), dy.to(y.device, y.dtype))
    return {"y": y.detach()} | {f"d {n}": g for n, g in zip(named, grads)}


def agree(case, mix: str = "add", save: str = "recompute") -> None:
    case = to_device(case)
    exact = run(case.to(torch.float64), mix, "reference")
    plain = run(case.to(case.x_TH.dtype), mix, "reference")
    for name, got in run(case.to(case.x_TH.dtype), mix, "cuda", save).items():
        assert_close(got, exact[name], plain[name], 3.0, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mix", "save"), [("add", "recompute"), ("convex", "preact")])
def test_every_value_and_gradient_is_as_exact_as_plain_torch(dtype, mix, save):
    agree(with_fixed_routing(make_case(T=21, H=40, E=6, K=3, I=36, dtype=dtype)), mix, save)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_experts_run_on_the_same_products(kind):
    case = with_fixed_routing(make_case(T=21, H=40, E=6, K=3, I=36))
    agree(replace(case, experts=Experts.quantize(case.experts.gate_up, case.experts.down, kind)), "convex")


@pytest.mark.parametrize(("T", "score"), [(1, "sigmoid"), (66, "softmax"), (9, "sigmoid")])
def test_the_router_s_own_kernels_carry_the_gradients(T, score):
    agree(make_case(T=T, E=12, K=3, I=8, router={"score": score, "normalize": True, "scale": 2.5}))


def test_skipped_slots_and_experts_without_a_token():
    case = make_case(T=12, E=5, K=2)
    ids_TK = torch.randint(0, 2, (12, 2), generator=torch.Generator().manual_seed(0)) * 4
    ids_TK[3] = 5
    case = to_device(replace(case, router=Routed(ids_TK, torch.rand(12, 2))))
    agree(case)
