"""The native routing kernels one by one, on every instruction set of this machine, against plain torch in
float64.

Letters: T tokens, H hidden, E experts, K chosen, G gates, R = E + G columns, N = T*K rows.
"""

import pytest
import torch

from flex_kernels.cpu import fallback

native = pytest.importorskip("flex_kernels.cpu.native", reason="the native extension is not built")
native_routing = pytest.importorskip("flex_kernels.cpu.native_routing")

both = pytest.mark.parametrize("kernels", [native_routing, fallback], ids=["native", "fallback"])
# x, and the router.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
dtypes = pytest.mark.parametrize("dtype, router_dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Whole tiles and what is left of them, nothing, and more tokens than a gradient goes through at a time.
sizes = pytest.mark.parametrize(
    "T, H, E, G",
    [
        (64, 64, 60, 1),
        (7, 37, 5, 2),
        (1, 576, 4, 1),
        (18, 130, 33, 0),
        (3, 16, 0, 1),
        (0, 8, 4, 1),
        (1030, 19, 3, 1),
    ],
)


@pytest.fixture(params=[name for name in native.isas() if name != "generic"])
def isa(request):
    """Runs the test on one instruction set, then goes back to the best."""
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@sizes
@dtypes
def test_the_logits_of_router_and_gates(isa, dtype, router_dtype, T, H, E, G):
    x, router, gates = (
        normal(T, H, dtype=dtype),
        normal(E, H, dtype=router_dtype, seed=1),
        normal(G, H, seed=2),
    )
    found = native_routing.router_product(x, router, gates)
    exact = x.double() @ torch.cat([router.double(), gates.double()]).t()
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)


@sizes
@dtypes
@pytest.mark.parametrize("added", [True, False])
def test_the_gradient_of_x(isa, dtype, router_dtype, added, T, H, E, G):
    router, gates = normal(E, H, dtype=router_dtype, seed=1), normal(G, H, seed=2)
    d, other = normal(T, E + G, seed=3), normal(T, H, dtype=dtype, seed=4)
    found = torch.full((T, H), float("nan"), dtype=dtype)
    native_routing.router_input_gradient(d, router, gates, other if added else None, found)
    exact = d.double() @ torch.cat([router.double(), gates.double()])
    if added:
        exact = exact + other.double()
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=torch.finfo(dtype).eps)


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_the_rows(isa, dtype, T, H, E, G):
    x, d = normal(T, H, dtype=dtype), normal(T, E + G, seed=3)
    for columns in (range(0, E), range(E, E + G)):
        found = native_routing.router_rows_gradient(d, columns, x)
        exact = d[:, columns.start : columns.stop].double().t() @ x.double()
        torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-5)


def test_a_token_has_the_same_logits_in_any_company_and_on_any_number_of_threads(isa):
    x, router, gates = normal(37, 130, dtype=torch.bfloat16), normal(21, 130, seed=1), normal(1, 130, seed=2)
    together = native_routing.router_product(x, router, gates)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            alone = [native_routing.router_product(x[t : t + 1], router, gates) for t in range(37)]
            assert torch.equal(torch.cat(alone), together)
            assert torch.equal(native_routing.router_product(x, router, gates), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E, K, G", [(60, 6, 1), (8, 2, 2), (3, 3, 0), (1, 1, 1)])
def test_the_gradient_of_the_logits_is_autograds(score, normalize, added, E, K, G):
    logits, grad, more = normal(50, E + G), normal(50, K, seed=1), normal(50, E, seed=2)
    grad_gates, bias = normal(G, 50, seed=3), torch.linspace(-1, 1, G)
    ids, _ = native_routing.choose(logits, E, None, K, normalize, score, 2.5)
    gates = native_routing.open_gates(logits, E, bias)
    exact, bias = logits.double().requires_grad_(), bias.double().requires_grad_()
    p = exact[:, :E].softmax(-1) if score == "softmax" else exact[:, :E].sigmoid()
    s = p.gather(1, ids.long())
    weights = 2.5 * (s / s.sum(-1, keepdim=True) if normalize else s)
    opened = torch.sigmoid(exact[:, E:] + bias).t()
    loss = (weights * grad).sum() + (opened * grad_gates).sum()
    (loss + (exact[:, :E] * more).sum() if added else loss).backward()
    native_routing.choose_backward(logits, ids, grad, more if added else None, E, normalize, score, 2.5)
    dbias = native_routing.open_gates_backward(gates, grad_gates, logits)
    torch.testing.assert_close(logits.double(), exact.grad, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(dbias.double(), bias.grad, atol=2e-6, rtol=1e-5)


@both
def test_the_sort_is_stable_and_skips_ids_outside_the_experts(kernels):
    ids = torch.tensor([[2, 0], [3, 2], [0, 3], [2, 2]], dtype=torch.int32)
    weights = torch.arange(8.0).view(4, 2)
    offsets, order, tokens, scale = kernels.sort_rows(ids, weights, None, 3)
    assert offsets == [0, 2, 2, 6]
    assert order[:6].tolist() == [1, 4, 0, 3, 6, 7]
    assert tokens[:6].tolist() == [0, 2, 0, 1, 3, 3] and tokens.dtype == torch.int32
    assert scale[:6].tolist() == [1, 4, 0, 3, 6, 7]
    *_, scale = kernels.sort_rows(ids, weights, torch.tensor([1.0, 2.0, 0.0, 10.0]), 3)
    assert scale[:6].tolist() == [1, 0, 0, 6, 60, 70]


@both
@pytest.mark.parametrize("T, K", [(0, 2), (3, 0)])
def test_the_sort_of_no_slots_is_empty(kernels, T, K):
    offsets, *rows = kernels.sort_rows(torch.empty(T, K, dtype=torch.int32), torch.empty(T, K), None, 4)
    assert offsets == [0] * 5 and all(t.shape == (0,) for t in rows)


@both
def test_sorted_values_go_back_to_their_slots(kernels):
    values, order = torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    assert kernels.unsort_rows(values, order, 4, torch.Size((2, 2))).tolist() == [[6, 8], [5, 7]]
    assert kernels.unsort_rows(values, order, 2, torch.Size((2, 2))).tolist() == [[6, 0], [5, 0]]


@both
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E, K", [(60, 6), (8, 2), (3, 3), (1, 1)])
def test_choose_agrees_with_a_float64_top_k(kernels, score, E, K):
    logits, bias = normal(50, E + 2), normal(E, seed=3) * 0.1
    ids, weights = kernels.choose(logits, E, bias, K, True, score, 2.5)
    exact = logits[:, :E].double()
    p = exact.softmax(-1) if score == "softmax" else exact.sigmoid()
    want = (p + bias.double()).topk(K).indices
    chosen = p.gather(1, want)
    assert torch.equal(ids.long(), want)
    torch.testing.assert_close(
        weights.double(), 2.5 * chosen / chosen.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5
    )


@both
def test_ties_go_to_the_lowest_index(kernels):
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 1.0], [0.0] * 6])
    ids, weights = kernels.choose(logits, 6, None, 4, False, "softmax", 1.0)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    torch.testing.assert_close(weights[1], torch.full((4,), 1 / 6))


def test_gates_come_one_row_a_gate():
    logits = normal(9, 7)
    gates = native_routing.open_gates(logits, 5, torch.tensor([0.5, -0.5]))
    exact = torch.sigmoid(logits[:, 5:].double() + torch.tensor([0.5, -0.5]).double()).t()
    torch.testing.assert_close(gates.double(), exact, atol=1e-6, rtol=1e-6)


def test_what_does_not_fit_never_reaches_a_kernel():
    x, router, gates = torch.zeros(4, 6), torch.zeros(3, 6), torch.zeros(1, 6)
    with pytest.raises(ValueError, match="top_k=7"):
        native_routing.choose(x, 6, None, 7, False, "softmax", 1.0)
    with pytest.raises(ValueError, match=r"router weight must be a dense \[3, 6\]"):
        native_routing.router_product(x, torch.zeros(3, 12)[:, ::2], gates)
    with pytest.raises(ValueError, match=r"gate weight must be a dense \[1, 6\] torch.float32"):
        native_routing.router_product(x, router, gates.bfloat16())
    with pytest.raises(ValueError, match=r"d must be a dense \[4, 4\]"):
        native_routing.router_input_gradient(torch.zeros(4, 3), router, gates, None, x)
    with pytest.raises(ValueError, match=r"within \[0, 4\], got range\(2, 5\)"):
        native_routing.router_rows_gradient(torch.zeros(4, 4), range(2, 5), x)
    with pytest.raises(ValueError, match=r"experts=5 must be in 1\.\.4"):
        ids = torch.zeros(4, 2, dtype=torch.int32)
        native_routing.choose_backward(
            torch.zeros(4, 4), ids, torch.zeros(4, 2), None, 5, True, "softmax", 1.0
        )
    with pytest.raises(ValueError, match="used=5 must be in"):
        native_routing.unsort_rows(torch.zeros(4), torch.zeros(4, dtype=torch.int32), 5, torch.Size((2, 2)))
