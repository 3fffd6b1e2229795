"""The ways in which a call reaches its backend: the same bits, and seen by whoever looks on."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from cases import make_case
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flex_kernels import calls, flex_moe

NAMES = {f"flex_kernels::{name}" for name in ("route", "experts", "route_backward", "experts_backward")}


class Seeing(TorchDispatchMode):
    """Notes the names of this package's ops."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flex_kernels":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A tensor of a class of its own, which sees what is dispatched."""

    seen: ClassVar[set[str]] = set()

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(func.name())
        given = [a.inner if isinstance(a, Wrapped) else a for a in args]
        return func(*given, **(kwargs or {}))


def both_ways(case):
    names = sorted(case.tensors())
    leaves = [case.requiring().tensors()[name] for name in names]
    y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def test_straight_calls_and_ops_give_the_same_bits_and_a_mode_sees_the_ops():
    assert calls.called([torch.zeros(1), None]) is calls.STRAIGHT
    want = both_ways(make_case())
    with Seeing() as seeing:
        found = both_ways(make_case())
    assert seeing.names == NAMES
    assert all(torch.equal(got, t) for got, t in zip(found, want, strict=True))


def test_a_tensor_of_a_class_of_its_own_sees_the_ops():
    case = make_case()
    Wrapped.seen.clear()
    with torch.no_grad():
        want = flex_moe(case.x_TH, case.router, case.experts)
        got = flex_moe(Wrapped(case.x_TH), case.router, case.experts)
    assert {"flex_kernels::route", "flex_kernels::experts"} <= Wrapped.seen
    assert torch.equal(got, want)


def test_a_profiler_sees_the_names_of_the_ops():
    with profile() as seen:
        both_ways(make_case())
    assert {event.key for event in seen.key_averages()} >= NAMES


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_holds_the_ops_and_not_what_they_computed():
    case = make_case()

    def layer(x_TH):
        return flex_moe(x_TH, case.router, case.experts, case.personal, case.shared)

    with torch.no_grad():
        traced = torch.jit.trace(layer, case.x_TH)
        other = case.x_TH.flip(0) + 1
        assert "flex_kernels::experts" in str(traced.graph)
        assert torch.equal(traced(other), layer(other))


@pytest.mark.parametrize("first", [True, False])
def test_a_replay_may_be_looked_at_where_the_first_pass_was_not(first):
    want = both_ways(make_case())
    case = make_case().requiring()

    def layer(x_TH):
        return flex_moe(x_TH, case.router, case.experts, case.personal, case.shared)

    def looked_at(yes, run):
        if not yes:
            return run()
        with Seeing():
            return run()

    y = looked_at(first, lambda: checkpoint(layer, case.x_TH, use_reentrant=False))
    looked_at(not first, lambda: y.square().sum().backward())
    for name, t in zip(sorted(case.tensors()), want[1:], strict=True):
        assert torch.equal(case.tensors()[name].grad, t), name


def test_ops_called_by_name_keep_no_order_unless_told():
    case = make_case(personal=False, shared="none")
    ids = torch.zeros(case.x_TH.shape[0], 1, dtype=torch.int32)
    tensors = (case.x_TH, ids, torch.ones(ids.shape), case.experts.gate_up, case.experts.down)
    *_, order = torch.ops.flex_kernels.experts(*tensors, *(None,) * 10, "add", False, False, "cpu")
    assert order.dtype == torch.int32 and not order.numel()
