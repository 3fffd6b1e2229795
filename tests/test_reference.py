"""The specification itself, against numbers worked out by hand and against autograd's numerical check."""

import math

import pytest
import torch
from cases import make_case

from flex_kernels import Experts, Personal, Routed, Router, Shared, flex_moe, reference


def silu(v: float) -> float:
    return v / (1 + math.exp(-v))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def one_wide(gate: float, up: float, down: float) -> tuple[torch.Tensor, torch.Tensor]:
    """An expert on H = 1, I = 1: x -> down * silu(gate x) * (up x)."""
    return torch.tensor([[gate], [up]], dtype=torch.float64), torch.tensor([[down]], dtype=torch.float64)


def scalar_layer(x: float, mix: str) -> float:
    """Two experts, top-1, on one-dimensional input, through the public function."""
    first, second, own, common = one_wide(1, 2, 3), one_wide(-1, 1, 1), one_wide(0.5, 1, 2), one_wide(1, 1, 1)
    experts = Experts(torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]]))
    f64 = torch.float64
    router = Router(torch.tensor([[2.0], [-1.0]], dtype=f64), top_k=1)
    personal = Personal(*own, torch.tensor([0.3], dtype=f64), torch.tensor(0.1, dtype=f64))
    shared = Shared(*common, torch.tensor([-0.7], dtype=f64))
    y = flex_moe(torch.tensor([[x]], dtype=f64), router, experts, personal, shared, mix=mix)
    return y.item()


@pytest.mark.parametrize("mix", ["add", "convex"])
def test_a_scalar_layer_gives_the_number_worked_out_by_hand(mix):
    x = 1.5
    score = math.exp(2 * x) / (math.exp(2 * x) + math.exp(-x))
    routed = score * 3 * silu(x) * 2 * x
    r = routed + sigmoid(-0.7 * x) * silu(x) * x
    g = sigmoid(0.3 * x + 0.1)
    own = 2 * silu(0.5 * x) * x
    expected = r + g * own if mix == "add" else (1 - g) * r + g * own
    assert scalar_layer(x, mix) == pytest.approx(expected, rel=1e-12)


def test_ties_go_to_the_lowest_index():
    router = Router(torch.zeros(6, 4, dtype=torch.float64), top_k=3)
    ids, weights, _ = reference.route(torch.randn(5, 4, dtype=torch.float64), router)
    assert ids.tolist() == [[0, 1, 2]] * 5
    assert torch.allclose(weights, torch.full_like(weights, 1 / 6))


def test_the_selection_bias_chooses_but_does_not_weigh():
    weight = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 10.0], dtype=torch.float64)
    router = Router(weight, top_k=2, score="sigmoid", normalize=True, scale=2.5, bias=bias)
    ids, weights, _ = reference.route(torch.ones(1, 1, dtype=torch.float64), router)
    chosen = [sigmoid(-1), sigmoid(1)]
    assert ids.tolist() == [[2, 0]]
    assert weights[0].tolist() == pytest.approx([2.5 * c / sum(chosen) for c in chosen], rel=1e-12)


@pytest.mark.parametrize("mix", ["add", "convex"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_agree_with_finite_differences(mix, score, normalize):
    settings = {"score": score, "normalize": normalize, "scale": 1.7}
    case = make_case(T=4, H=6, E=4, K=2, I=3, dtype=torch.float64, router=settings).requiring()
    names = list(case.tensors())

    def layer(*_):
        return flex_moe(
            case.x_TH, case.router, case.experts, case.personal, case.shared, mix=mix, backend="reference"
        )

    assert torch.autograd.gradcheck(layer, [case.tensors()[n] for n in names], eps=1e-6, atol=1e-6)


def test_a_sentinel_id_contributes_nothing():
    case = make_case(T=3, E=4, K=2, dtype=torch.float64, personal=False, shared="none")
    weights = torch.ones(3, 2, dtype=torch.float64)
    full = flex_moe(case.x_TH, Routed(torch.tensor([[0, 4], [1, 4], [4, 4]]), weights), case.experts)
    first = flex_moe(case.x_TH[:2], Routed(torch.tensor([[0], [1]]), weights[:2, :1]), case.experts)
    assert torch.equal(full[:2], first)
    assert full[2].abs().max() == 0
