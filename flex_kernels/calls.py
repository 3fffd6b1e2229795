"""How a call of the layer reaches its backend: as an op with a gradient, as an op, or straight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flex_kernels import autograd
from flex_kernels.dispatch import backend_module


class Calls(NamedTuple):
    """One way of calling the layer's steps; every function takes what the op of its name does.

    Attributes:
        keep_order: what ``experts`` is to be told.
    """

    route: Callable[..., Any]
    experts: Callable[..., Any]
    route_backward: Callable[..., Any]
    experts_backward: Callable[..., Any]
    keep_order: bool = True


def straight(name: str, op: Any, flags: int = 0) -> Callable[..., Any]:
    """The backend's function ``name``, which the dispatcher would only find again, under the op's name to a
    profiler. It takes the op's arguments but for the last ones: ``flags`` of them, and the backend's name.
    """
    behind = -1 - flags

    def call(*inputs: Any) -> Any:
        function = getattr(backend_module(inputs[-1]), name)
        if not torch.autograd._profiler_enabled():
            return function(*inputs[:behind])
        with torch.profiler.record_function(op.name()):
            return function(*inputs[:behind])

    return call


TRACED = Calls(
    autograd.apply_route,
    autograd.apply_experts,
    autograd.route_backward,
    autograd.experts_backward,
    keep_order=False,
)
OPS = Calls(autograd.route, autograd.experts, autograd.route_backward, autograd.experts_backward)
STRAIGHT = Calls(
    straight("route", autograd.route),
    straight("experts_forward", autograd.experts, flags=1),
    straight("route_backward", autograd.route_backward),
    straight("experts_backward", autograd.experts_backward),
)
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def called(tensors: Iterable[object]) -> Calls:
    """The ops where somebody looks at what is dispatched (modes as of counters and of fake tensors, tensors
    of a class of their own, ``torch.jit.trace``); else the backends' functions themselves: at few tokens the
    host's time is the layer's.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return OPS
    return STRAIGHT if all(t is None or type(t) in PLAIN for t in tensors) else OPS
