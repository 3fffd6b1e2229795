"""Argument checks of the layer: every error names the argument, what was given and what is accepted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flex_kernels.dispatch import NAMES
from flex_kernels.quantize import GROUP_COLUMNS, Quantized
from flex_kernels.types import Experts, Personal, Routed, Router, Shared

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device.type}"


def pattern(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def differs(shape: tuple[int | str, ...], sizes: tuple[int, ...]) -> bool:
    """Whether ``sizes`` are not of ``shape``, which mixes sizes that must match with letters for any."""
    if len(shape) != len(sizes):
        return True
    # Every forward pass asks this of every tensor, and any() over a generator takes longer.
    for wanted, size in zip(shape, sizes):  # noqa: SIM110
        if isinstance(wanted, int) and wanted != size:
            return True
    return False


def check_tensor(name: str, t: object, shape: tuple[int | str, ...], device: torch.device) -> None:
    """``shape`` as in :func:`differs`."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor {pattern(shape)}, got {type(t).__name__}")
    if differs(shape, t.shape):
        raise ValueError(f"{name} must be {pattern(shape)}, got {describe(t)}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {describe(t)}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, but x is on {device}: move one of them")


def check_weights(
    name: str, weights: Tensor | Quantized, shape: tuple[int | str, ...], device: torch.device
) -> None:
    """Of frozen experts: a float tensor, or codes and scales that fit each other."""
    if not isinstance(weights, Quantized):
        check_tensor(name, weights, shape, device)
        return
    codes, scales, columns = weights.codes, weights.scales, weights.columns
    if codes.dtype not in (torch.int8, torch.uint8) or scales.dtype != torch.bfloat16:
        raise TypeError(
            f"{name} must have int8 codes (int8) or uint8 codes (nf4) and bfloat16 scales, "
            f"got codes {describe(codes)} and scales {describe(scales)}"
        )
    if differs(shape, weights.shape):
        raise ValueError(f"{name} must be {pattern(shape)}, got {weights.kind} {list(weights.shape)}")
    outer = codes.shape[:-1]
    packed = columns if weights.kind == "int8" else -(-columns // 2)
    groups = () if weights.kind == "int8" else (-(-columns // GROUP_COLUMNS),)
    if codes.shape[-1] != packed or scales.shape != (*outer, *groups):
        raise ValueError(
            f"{name}: {weights.kind} of {columns} columns has codes {[*outer, packed]} and scales "
            f"{[*outer, *groups]}, got {list(codes.shape)} and {list(scales.shape)}"
        )
    if codes.device != device or scales.device != device:
        raise ValueError(f"{name} is on {codes.device}, but x is on {device}: move one of them")


def check_option(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, accepted))}")


def check_ffn(
    name: str, gate_up: Tensor | Quantized, down: Tensor | Quantized, hidden: int, device: torch.device
) -> None:
    check_weights(f"{name}.gate_up", gate_up, ("2*I", hidden), device)
    if gate_up.shape[0] % 2 or not gate_up.shape[0]:
        raise ValueError(
            f"{name}.gate_up stacks gate rows on up rows: its first size must be even and positive, "
            f"got {list(gate_up.shape)}"
        )
    check_weights(f"{name}.down", down, (hidden, gate_up.shape[0] // 2), device)


def check_ids(ids_TK: Tensor, experts: int) -> None:
    """Looks at values in eager calls on the CPU alone: a GPU would have to be waited for, a tracer has none.
    There the layer skips such ids.
    """
    if ids_TK.device.type != "cpu" or torch.compiler.is_compiling() or not ids_TK.numel():
        return
    wrong = ids_TK[(ids_TK < 0) | (ids_TK > experts)]
    if wrong.numel():
        raise ValueError(
            f"routed.ids must lie in [0, {experts}] ({experts} marks a slot to skip), found {wrong[0].item()}"
        )


def check_router(
    router: Router | Routed, tokens: int, experts: int, hidden: int, device: torch.device
) -> None:
    if isinstance(router, Routed):
        for name, t in (("ids", router.ids), ("weights", router.weights)):
            if not isinstance(t, Tensor) or t.ndim != 2 or t.shape[0] != tokens or t.device != device:
                got = describe(t) if isinstance(t, Tensor) else type(t).__name__
                raise ValueError(f"routed.{name} must be [{tokens}, K] on {device}, got {got}")
        if router.ids.shape != router.weights.shape:
            raise ValueError(
                f"routed.ids {list(router.ids.shape)} and routed.weights {list(router.weights.shape)} "
                "differ in shape"
            )
        if router.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"routed.ids must be int32 or int64, got {describe(router.ids)}")
        if router.weights.dtype not in DTYPES:
            raise TypeError(f"routed.weights must be a float tensor, got {describe(router.weights)}")
        check_ids(router.ids, experts)
        return
    if not isinstance(router, Router):
        raise TypeError(f"router must be a Router or Routed, got {type(router).__name__}")
    check_tensor("router.weight", router.weight, (experts, hidden), device)
    if not isinstance(router.top_k, int) or isinstance(router.top_k, bool) or router.top_k < 1:
        raise ValueError(f"router.top_k must be an integer of at least 1, got {router.top_k!r}")
    if router.top_k > experts:
        raise ValueError(
            f"top_k={router.top_k} exceeds the {experts} experts of router.weight {list(router.weight.shape)}"
        )
    if not isinstance(router.normalize, bool):
        raise TypeError(f"router.normalize must be True or False, got {router.normalize!r}")
    check_option("router.score", router.score, ("softmax", "sigmoid"))
    scale = router.scale
    if not isinstance(scale, float | int) or isinstance(scale, bool) or not -math.inf < scale < math.inf:
        raise ValueError(f"router.scale must be a finite number, got {scale!r}")
    if router.bias is not None:
        check_tensor("router.bias", router.bias, (experts,), device)


def check_arguments(
    x: Tensor,
    router: Router | Routed,
    experts: Experts,
    personal: Personal | None,
    shared: Shared | None,
    mix: str,
    save: str,
) -> None:
    """Raise TypeError or ValueError on the first argument that does not fit the others; allocates nothing."""
    if not isinstance(x, Tensor) or x.ndim < 1 or x.dtype not in DTYPES:
        got = describe(x) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float tensor [..., H], got {got}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got {describe(x)} in layout {x.layout}: use x.to_dense()")
    hidden, device = x.shape[-1], x.device
    if not hidden:
        raise ValueError(f"x must have at least one feature in its last dimension, got {describe(x)}")
    if not isinstance(experts, Experts):
        raise TypeError(f"experts must be an Experts, got {type(experts).__name__}")
    check_weights("experts.gate_up", experts.gate_up, ("E", "2*I", hidden), device)
    count, rows = experts.gate_up.shape[:2]
    if not count or not rows or rows % 2:
        raise ValueError(
            "experts.gate_up must hold at least one expert and an even number of rows, "
            f"got {list(experts.gate_up.shape)}"
        )
    check_weights("experts.down", experts.down, (count, hidden, rows // 2), device)
    for name, t in (("gate_up", experts.gate_up), ("down", experts.down)):
        if isinstance(t, Tensor) and t.dtype != x.dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(
                f"experts.{name} is {t.dtype}, but x is {x.dtype}: "
                "convert one of them, or call under torch.autocast"
            )
    check_router(router, x.numel() // hidden, count, hidden, device)
    if personal is not None:
        if not isinstance(personal, Personal):
            raise TypeError(f"personal must be a Personal or None, got {type(personal).__name__}")
        for name, t in (("gate_up", personal.gate_up), ("down", personal.down)):
            if isinstance(t, Quantized):
                raise TypeError(
                    f"personal.{name} must be a tensor, as a personal expert is trained, got {t.kind}"
                )
        check_ffn("personal", personal.gate_up, personal.down, hidden, device)
        check_tensor("personal.gate_weight", personal.gate_weight, (hidden,), device)
        if personal.gate_bias is not None:
            check_tensor("personal.gate_bias", personal.gate_bias, (), device)
    if shared is not None:
        if not isinstance(shared, Shared):
            raise TypeError(f"shared must be a Shared or None, got {type(shared).__name__}")
        check_ffn("shared", shared.gate_up, shared.down, hidden, device)
        if shared.gate_weight is not None:
            check_tensor("shared.gate_weight", shared.gate_weight, (hidden,), device)
    check_option("mix", mix, ("add", "convex"))
    check_option("save", save, ("auto", "recompute", "preact"))


def check_module(
    router: Router, experts: Experts, shared: Shared | None, mix: str, save: str, backend: str
) -> None:
    """:func:`check_arguments` for a module that has seen no x yet: one without tokens stands in for it."""
    if not isinstance(router, Router):
        raise TypeError(f"router must be a Router, got {type(router).__name__}")
    if not isinstance(experts, Experts):
        raise TypeError(f"experts must be an Experts, got {type(experts).__name__}")
    gate_up = experts.gate_up
    if not isinstance(gate_up, Tensor | Quantized):
        raise TypeError(f"experts.gate_up must be a tensor [E, 2*I, H], got {type(gate_up).__name__}")
    check_weights("experts.gate_up", gate_up, ("E", "2*I", "H"), gate_up.device)
    dtype = gate_up.dtype if isinstance(gate_up, Tensor) else torch.float32
    x = torch.empty(0, gate_up.shape[-1], dtype=dtype, device=gate_up.device)
    check_arguments(x, router, experts, None, shared, mix, save)
    check_option("backend", backend, ("auto", *NAMES))
