"""pytest-benchmark of the small native CPU kernels beside their plain torch counterparts.

    python -m pytest benchmarks/test_kernels_benchmark.py

Sizes of Qwen1.5-MoE-A2.7B at 256 tokens: T*K = 1024 rows, H = 2048, I = 1408, E = 60, K = 4.
"""

import pytest
import torch

from flex_kernels import routing
from flex_kernels.cpu import fallback

native = pytest.importorskip("flex_kernels.cpu.native", reason="the native extension is not built")
native_routing = pytest.importorskip("flex_kernels.cpu.native_routing")
pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

T, K, H, E, I = 256, 4, 2048, 60, 1408
both = pytest.mark.parametrize("kernels", [native, fallback], ids=["native", "torch"])
both_routing = pytest.mark.parametrize("kernels", [native_routing, fallback], ids=["native", "torch"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.mark.parametrize(
    "product",
    [
        native_routing.router_product,
        lambda x, *rows: routing.thin_product(x, torch.cat([r.float() for r in rows])),
    ],
    ids=["native", "torch"],
)
@dtypes
def test_router_product(benchmark, product, dtype):
    logits = benchmark(product, torch.randn(T, H).to(dtype), torch.randn(E, H).to(dtype), torch.randn(1, H))
    assert torch.isfinite(logits).all()


@both_routing
def test_choose(benchmark, kernels):
    ids, _ = benchmark(kernels.choose, torch.randn(T, E), E, None, K, True, "softmax", 1.0)
    assert ids.shape == (T, K)


@both_routing
def test_sort_rows(benchmark, kernels):
    ids, weights = torch.randint(E, (T, K), dtype=torch.int32), torch.rand(T, K)
    offsets, *_ = benchmark(kernels.sort_rows, ids, weights, None, E)
    assert offsets[-1] == T * K


@both
@dtypes
def test_gather_rows(benchmark, kernels, dtype):
    source, tokens = torch.randn(T, H).to(dtype), torch.randint(T, (T * K,), dtype=torch.int32)
    out = torch.empty(T * K, H, dtype=dtype)
    benchmark(kernels.gather_rows, source, tokens, out)
    assert torch.equal(out[5], source[tokens[5]])


@both
@dtypes
def test_swiglu(benchmark, kernels, dtype):
    z, out = torch.randn(T * K, 2 * I).to(dtype), torch.empty(T * K, I, dtype=dtype)
    benchmark(kernels.swiglu, z, out)
    assert torch.isfinite(out).all()


@both
@dtypes
def test_swiglu_backward(benchmark, kernels, dtype):
    z, da = torch.randn(T * K, 2 * I).to(dtype), torch.randn(T * K, I).to(dtype)
    dz, dscale = torch.empty_like(z), torch.empty(T * K)
    benchmark(kernels.swiglu_backward, z, da, torch.rand(T * K), dz, dscale, None)
    assert torch.isfinite(dscale).all()


@both
@dtypes
def test_scatter_add(benchmark, kernels, dtype):
    rows, tokens = torch.randn(T * K, H).to(dtype), torch.randint(T, (T * K,), dtype=torch.int32)
    out = torch.zeros(T, H)
    benchmark(kernels.scatter_add, rows, tokens, torch.rand(T * K), out)
    assert torch.isfinite(out).all()
