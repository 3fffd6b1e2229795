"""The layer under torch.func: gradients, and one gradient a sample, against float64 in plain torch; and no
second derivatives, said aloud."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_case, relative_error
from torch.func import grad, vmap

from flex_kernels import Routed, flex_moe, reference

NAMES = ("gate_up", "down", "gate_weight", "gate_bias")


def loss(case: Case, own: dict, x_TH: torch.Tensor, backend: str) -> torch.Tensor:
    personal = replace(case.personal, **own)
    return flex_moe(x_TH, case.router, case.experts, personal, case.shared, backend=backend).square().sum()


def trained(case: Case) -> dict:
    return {name: getattr(case.personal, name) for name in NAMES}


@pytest.mark.parametrize("kind", ["router", "routed"])
def test_grad_is_that_of_float64(kind):
    case = make_case()
    if kind == "routed":
        ids_TK, weights_TK, _ = reference.route(case.x_TH, case.router)
        case = replace(case, router=Routed(ids_TK, weights_TK))
    exact = case.to(torch.float64)
    got = grad(loss, argnums=(1, 2))(case, trained(case), case.x_TH, "cpu")
    want = grad(loss, argnums=(1, 2))(exact, trained(exact), exact.x_TH, "reference")
    assert relative_error(got[1], want[1]) < 1e-5
    for name in NAMES:
        assert relative_error(got[0][name], want[0][name]) < 1e-5, name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_one_gradient_a_sample_is_that_of_the_sample_alone():
    case = make_case()
    exact = case.to(torch.float64)
    x_BTH = torch.randn(3, 5, case.x_TH.shape[1], generator=torch.Generator().manual_seed(3))
    own = trained(case)
    got = vmap(lambda x_TH: grad(loss, argnums=1)(case, own, x_TH, "cpu"))(x_BTH)
    for b, x_TH in enumerate(x_BTH):
        want = grad(loss, argnums=1)(exact, trained(exact), x_TH.double(), "reference")
        for name in NAMES:
            assert relative_error(got[name][b], want[name]) < 1e-5, (b, name)


def test_a_second_derivative_is_refused_and_never_zero():
    case = make_case().requiring("x", "personal.gate_up")
    leaves = [case.x_TH, case.personal.gate_up]
    value = lambda x_TH: loss(case, trained(case), x_TH, "cpu")  # noqa: E731
    found = torch.autograd.grad(value(case.x_TH), leaves, create_graph=True)
    for got, want in zip(found, torch.autograd.grad(value(case.x_TH), leaves)):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="second derivatives on backend='reference' alone"):
        found[0].square().sum().backward()
    case = make_case()
    with pytest.raises(RuntimeError, match="second derivatives on backend='reference' alone"):
        grad(lambda x_TH: grad(value)(x_TH).sum())(case.x_TH)
