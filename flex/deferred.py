"""Tensors of a checkpoint that are read when somebody asks for them, put together as its loader would.

transformers' loader stacks experts and joins their projections; which way depends on the architecture and on
the checkpoint's layout. It is handed objects that only note what it does with them, and that do it later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flex.shards import FLOATS


class Deferred:
    """A tensor to be: its shape and dtype are known, :meth:`read` makes it, every time anew.

    Indexing it, ``to``, and functions of torch that return one tensor give another one.

    Attributes:
        like: on the meta device.
        read: makes the tensor.
    """

    def __init__(self, like: Tensor, read: Callable[[], Tensor]):
        self.like = like
        self.read = read

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def __getitem__(self, index: Any) -> Deferred:
        return Deferred(self.like[index], lambda: self.read()[index])

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Deferred:
        return Deferred(self.like.to(dtype=dtype), lambda: self.read().to(device=device, dtype=dtype))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Deferred:
        kwargs = kwargs or {}
        like = func(*given(args, meta), **given(kwargs, meta))
        if not isinstance(like, Tensor):
            raise TypeError(f"{func.__name__} of a tensor that is not read yet gives no tensor")
        return cls(like, lambda: func(*given(args, read), **given(kwargs, read)))


def meta(tensor: Deferred) -> Tensor:
    return tensor.like


def read(tensor: Deferred) -> Tensor:
    return tensor.read()


def given(value: Any, instead: Callable[[Deferred], Tensor]) -> Any:
    """Arguments of a function with ``instead(d)`` for every :class:`Deferred` d in them."""
    if isinstance(value, Deferred):
        return instead(value)
    if isinstance(value, list | tuple):
        return type(value)(given(item, instead) for item in value)
    if isinstance(value, dict):
        return {key: given(item, instead) for key, item in value.items()}
    return value


def defer_experts(tensors: Mapping[str, Any], stored: Iterable[str]) -> dict[str, Any]:
    """``tensors`` of a checkpoint, those of routed experts as :class:`Deferred`.

    Args:
        tensors: name -> a safetensors slice.
        stored: what the names of a routed expert's tensors have in them, any one of these.

    Raises:
        ValueError: a routed expert's tensor is of no float type that can be rounded; names it.
    """
    named = {name for name in tensors if any(part in name for part in stored)}
    return {name: defer(name, held) if name in named else held for name, held in tensors.items()}


def defer(name: str, held: Any) -> Deferred:
    kind = held.get_dtype()
    if kind not in FLOATS:
        raise ValueError(f"{name} is {kind}, not one of {', '.join(FLOATS)}")
    return Deferred(torch.empty(held.get_shape(), dtype=FLOATS[kind], device="meta"), lambda: held[...])
