"""Router and gate gradients in plain torch, against float64 autograd of the reference.

Letters: T tokens, H hidden, E experts, K chosen, G gates.
"""

import pytest
import torch
from cases import relative_error

from flex_kernels import Router, cpu, reference, routing


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("has_other", [False, True])
def test_every_gradient_of_route_matches_float64_autograd(score, normalize, has_other):
    T, H, E, K, G, scale = 17, 12, 7, 3, 2, 1.7
    x, weight, gate_weight, gate_bias = (
        normal(T, H),
        normal(E, H, seed=1),
        normal(G, H, seed=2),
        normal(G, seed=3),
    )
    bias = normal(E, seed=8) * 0.1
    dweights, dgates, dlogits = normal(T, K, seed=4), normal(G, T, seed=5), normal(T, E, seed=6)
    ids, weights, gates, logits = cpu.route(
        x, weight, bias, gate_weight, gate_bias, K, normalize, score, scale, True
    )
    other = normal(T, H, seed=9) if has_other else None
    saved = x, weight, gate_weight, ids, weights, gates
    found = routing.route_backward(
        dweights, dgates, dlogits, *saved, normalize, score, scale, [True] * 4, other
    )

    leaves = [t.double().requires_grad_() for t in (x, weight, gate_weight, gate_bias)]
    x64, weight64, gate64, gate_bias64 = leaves
    router = Router(weight64, K, normalize, score, scale, bias.double())
    ids64, weights64, logits64 = reference.route(x64, router)
    gates64 = torch.sigmoid(x64 @ gate64.t() + gate_bias64).t()
    assert torch.equal(ids.long(), ids64)
    for got, want in [(weights, weights64), (gates, gates64), (logits, logits64)]:
        assert relative_error(got, want) < 2e-6
    loss = (weights64 * dweights).sum() + (gates64 * dgates).sum() + (logits64 * dlogits).sum()
    if has_other:
        loss = loss + (x64 * other).sum()
    for got, want in zip(found, torch.autograd.grad(loss, leaves)):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-5


def test_only_the_gradients_asked_for_are_made():
    x, weight, gate_weight = normal(5, 4), normal(3, 4, seed=1), normal(1, 4, seed=2)
    ids, weights, gates, _ = cpu.route(
        x, weight, None, gate_weight, torch.zeros(1), 2, False, "softmax", 1.0, False
    )
    found = routing.route_backward(
        torch.ones(5, 2),
        torch.ones(1, 5),
        torch.empty(0, 3),
        x,
        weight,
        gate_weight,
        ids,
        weights,
        gates,
        False,
        "softmax",
        1.0,
        [False, False, True, False],
    )
    assert [t.numel() for t in found] == [0, 0, 4, 0]


def test_gates_alone_need_no_router():
    x, gate_weight = normal(6, 4), normal(2, 4, seed=1)
    ids, weights, gates, logits = cpu.route(
        x, torch.empty(0, 4), None, gate_weight, torch.zeros(2), 0, False, "softmax", 1.0, False
    )
    assert (ids.shape, weights.shape, logits.shape) == ((6, 0), (6, 0), (0, 0))
    torch.testing.assert_close(gates, torch.sigmoid(gate_weight @ x.t()))


def test_the_thin_product_is_the_same_in_pieces(monkeypatch):
    x, rows = normal(10, 6).bfloat16(), normal(3, 6, seed=1)
    monkeypatch.setattr(routing, "CHUNK", 25)
    assert [s.stop for s in routing.chunks(x)] == [4, 8, 12]
    exact = x.double() @ rows.double().t()
    assert relative_error(routing.thin_product(x, rows), exact) < 1e-6
    assert (
        relative_error(routing.weight_gradient(normal(10, 3), x), normal(10, 3).double().t() @ x.double())
        < 1e-6
    )
