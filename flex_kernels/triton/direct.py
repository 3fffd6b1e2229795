"""Launches that skip what Triton works out anew each time: the compiled form that the arguments want.

``kernel[grid](...)`` looks at some thirty arguments and builds a long key from all of them. With few tokens
the host's time is the layer's. Here the key is made of what can differ within this package, and a launch that
was seen before goes straight to the compiled kernel's launcher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# The launcher's arguments are no public interface of Triton: these are the versions whose source was read.
# Any other launches by kernel[grid](...).
KNOWN_LAUNCHER = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"], ["3", "8"], ["3", "9"])
OPTIONS = ("num_warps", "num_stages")
# A product and the sum after it may be rounded once, which is faster; Triton 3.10 is to change its default.
FUSED = {"enable_fp_fusion": True}


class Form(NamedTuple):
    """A compiled kernel (which unloads when it goes), its launcher, what that wants of it, and a place for
    each compile-time argument."""

    kernel: Any
    run: Any
    function: int
    metadata: tuple
    places: tuple[None, ...]


FORMS: dict[tuple, Form] = {}


def observed() -> bool:
    """Whether a profiler wants to hear of launches: Triton's own way tells it."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


def launch(
    kernel: Any,
    device: torch.device,
    grid: tuple[int, int],
    tensors: tuple[Tensor | TensorDescriptor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[int | float, ...],
    **constants: Any,
) -> None:
    """``kernel`` on the current stream of ``device``, which is the current device.

    Args:
        tensors, sizes, numbers: the arguments before the compile-time ones, in the kernel's order; ``sizes``
            are those that it does not specialise on.
        constants: the compile-time arguments, and Triton's launch options.
    """
    if not KNOWN_LAUNCHER or not isinstance(kernel, JITFunction):
        kernel[grid](*tensors, *sizes, *numbers, **constants, **FUSED)
        return
    arguments: list[Any] = []
    types: list[Any] = []
    for t, parameter in zip(tensors, kernel.params):
        if t is None:
            arguments.append(None)
            types.append(None)
        elif isinstance(t, Tensor):
            address = t.data_ptr()
            arguments.append(address)
            types.append(t.dtype)
            if address % 16 and not parameter.do_not_specialize_on_alignment:
                types.append(False)
        else:
            arguments.append(t)
            types.append((t.base.dtype, *t.block_shape))
    key = (kernel.fn, device, *types, *numbers, *constants.values())
    form = FORMS.get(key)
    # A size beyond int32 is an argument of another type, which the key does not hold.
    wide = bool(sizes) and max(sizes) >= 2**31
    if form is None or wide or observed():
        compiled = kernel[grid](*tensors, *sizes, *numbers, **constants, **FUSED)
        # None where launches are only recorded (codegen.py).
        if compiled is not None and not wide:
            places = (None,) * sum(name not in OPTIONS for name in constants)
            FORMS[key] = Form(compiled, compiled.run, compiled.function, compiled.packed_metadata, places)
        return
    stream = driver.active.get_current_stream(device.index)
    form.run(
        *(grid[0], grid[1], 1, stream, form.function, form.metadata, None, None, None),
        *(*arguments, *sizes, *numbers, *form.places),
    )
