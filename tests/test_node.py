"""The layer as one node of autograd's graph: any choice of what is trained, and no sum beside the kernels."""

import random
from dataclasses import replace

import pytest
import torch
from cases import Case, make_case, relative_error, with_fixed_routing
from torch.utils._python_dispatch import TorchDispatchMode

from flex_kernels import Personal, Routed, flex_moe


def layer(case: Case, backend: str, **options):
    return flex_moe(
        case.x_TH, case.router, case.experts, case.personal, case.shared, backend=backend, **options
    )


def choices():
    """Sets of tensors to train, drawn from all that a layer has."""
    drawn = random.Random(0)
    for number in range(24):
        kind = ("gated", "plain", "none")[number % 3]
        case = make_case(shared=kind, personal=number % 4 != 3)
        if number % 2:
            case = with_fixed_routing(case)
        names = sorted(case.tensors())
        yield kind, number % 4 != 3, bool(number % 2), drawn.sample(names, drawn.randint(1, len(names)))


@pytest.mark.parametrize(("shared", "personal", "routed", "names"), list(choices()))
@pytest.mark.parametrize("mix", ["add", "convex"])
def test_any_choice_of_what_is_trained_has_the_gradients_of_float64(mix, shared, personal, routed, names):
    case = make_case(shared=shared, personal=personal)
    if routed:
        case = with_fixed_routing(case)
    exact = case.to(torch.float64)
    found = []
    for c, backend in ((case, "cpu"), (exact, "reference")):
        leaves = [c.requiring(*names).tensors()[name] for name in names]
        y = layer(c, backend, mix=mix)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for name, got, want in zip(["y", *names], *found):
        assert got.shape == want.shape and relative_error(got, want) < 2e-6, name


def test_logits_alone_have_gradients_too():
    case = make_case().requiring("x", "router.weight")
    exact = case.to(torch.float64).requiring("x", "router.weight")
    found = []
    for c, backend in ((case, "cpu"), (exact, "reference")):
        _, logits = layer(c, backend, return_router_logits=True)
        found.append(torch.autograd.grad(logits.square().sum(), [c.x_TH, c.router.weight]))
    for got, want in zip(*found):
        assert relative_error(got, want) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_of_another_dtype_get_gradients_in_theirs(dtype):
    case = make_case()
    own = case.personal
    gate = [own.gate_weight.to(dtype).requires_grad_(), own.gate_bias.to(dtype).requires_grad_()]
    case = replace(case, personal=Personal(own.gate_up, own.down, *gate))
    grads = torch.autograd.grad(layer(case, "cpu").square().sum(), gate)
    exact = case.to(torch.float64).requiring("personal.gate_weight", "personal.gate_bias")
    leaves = [exact.personal.gate_weight, exact.personal.gate_bias]
    for got, want in zip(grads, torch.autograd.grad(layer(exact, "reference").square().sum(), leaves)):
        assert got.dtype == dtype and got.shape == want.shape
        assert relative_error(got, want) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_two_gradients_of_x_are_not_added_in_a_pass_of_their_own():
    class Sums(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            self.count += func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
            return found

    case = make_case(T=40).requiring("x", "router.weight", "personal.gate_up")
    y = layer(case, "cpu")
    with Sums() as sums:
        y.backward(torch.ones_like(y))
    assert sums.count == 0


def test_weights_of_a_given_decision_are_trained_without_a_router():
    case = make_case(personal=False, shared="none")
    ids = torch.tensor([[0, 3]] * case.x_TH.shape[0])
    weights = torch.rand(ids.shape, requires_grad=True)
    layer(replace(case, router=Routed(ids, weights)), "cpu").sum().backward()
    exact = weights.detach().double().requires_grad_()
    layer(replace(case.to(torch.float64), router=Routed(ids, exact)), "reference").sum().backward()
    assert relative_error(weights.grad, exact.grad) < 2e-6
