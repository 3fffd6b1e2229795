"""What the kernels may round beyond what their operands ask for."""

from __future__ import annotations

_int8_products = False


def allow_int8_products(allowed: bool) -> None:
    """Let quantised experts be multiplied in int8: rows that meet their codes are then rounded to int8 too.

    Every 128 elements of a row (of x and the experts' hidden rows in the forward pass, of both gradients in
    the backward pass) share a scale, their largest absolute value over 127; sums are exact integers within
    them and float32 beyond. An "nf4" weight is multiplied as an int8 weight near to it: a row's largest scale
    over 127 is the scale of the row, and its levels become whole numbers of that. Where the processor
    multiplies int8 (AVX-512 with VNNI and VBMI, or AMX-INT8 for bfloat16 x; the same bits) that is up to
    twice as fast as bfloat16. Elsewhere nothing changes: on other processors, on other devices, with experts
    that are not quantised.

    Off until asked for, and a setting of the process, as ``torch.backends.cuda.matmul.allow_tf32`` is: set it
    before the forward pass and leave it until the backward pass is done.

    Raises:
        TypeError: ``allowed`` is not a bool.
    """
    global _int8_products
    if not isinstance(allowed, bool):
        raise TypeError(f"allowed must be True or False, got {allowed!r}")
    _int8_products = allowed


def int8_products_allowed() -> bool:
    """What :func:`allow_int8_products` was last told."""
    return _int8_products
