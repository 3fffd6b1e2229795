"""Finds the native extension: where it is built ``kernels`` is :mod:`native` and ``routing``
:mod:`native_routing`, where not, both are :mod:`fallback`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from types import ModuleType

from flex_kernels.cpu import fallback
from flex_kernels.precision import int8_products_allowed

kernels: ModuleType = fallback
routing: ModuleType = fallback
if importlib.util.find_spec("flex_kernels._cpu_ops") is not None:
    from flex_kernels.cpu import native, native_routing

    kernels, routing = native, native_routing

# Runs an instruction set other than the best: "avx512" on a processor with AMX, for example.
ISA_VARIABLE = "FLEX_KERNELS_ISA"
if kernels is not fallback and os.environ.get(ISA_VARIABLE):
    if os.environ[ISA_VARIABLE] not in kernels.isas():
        raise ValueError(
            f"{ISA_VARIABLE}={os.environ[ISA_VARIABLE]!r} is not one of what can run here: "
            f"{', '.join(kernels.isas())}"
        )
    kernels.set_isa(os.environ[ISA_VARIABLE])

BUILD_HINT = "build it with `pip install .` or `python setup.py build_ext --inplace` (needs a C++17 compiler)"


def fused() -> bool:
    """Whether the fused feed-forward kernels can run on this processor."""
    return kernels is not fallback and kernels.fused()


def int8_products() -> bool:
    """Whether int8 experts are multiplied in int8: allowed, and among what these kernels can."""
    return int8_products_allowed() and kernels is not fallback and kernels.multiplies_int8()


@functools.cache
def warn_if_missing() -> None:
    """Say once that the native extension is missing, at the first use and not at import."""
    if kernels is fallback:
        warnings.warn(
            f"the native extension flex_kernels._cpu_ops is missing: the cpu backend runs on plain torch, "
            f"several times slower and with more memory; {BUILD_HINT}",
            RuntimeWarning,
            stacklevel=3,
        )
