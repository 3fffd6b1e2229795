"""What stays with a client and what travels to the server: plain dicts of tensors, safetensors files.

Names are those of the model's parameters. Loading copies into the tensors that exist, after everything was
checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flex.block import GraftedBlock, grafted_blocks
from flex.files import check_finite, load_tensors, save_tensors
from flex.personal import PersonalCopy, PersonalLoRA

LOCAL_NAMES = "_flex_local_names"


def personal_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors that stay home: personal experts with their gates and origins, local adapters."""
    found: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, GraftedBlock) and module.personal is not None:
            # The state dict has no buffers that are only kept at hand, such as a decoded frozen expert.
            found |= module.personal.state_dict(prefix=f"{module_name}.personal.", keep_vars=True)
    local: frozenset[str] = getattr(model, LOCAL_NAMES, frozenset())
    found.update((n, t) for n, t in lora_tensors(model).items() if n in local)
    return {n.replace("_orig_mod.", ""): t for n, t in found.items()}


def shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors that travel: LoRA adapters, less those marked local."""
    local: frozenset[str] = getattr(model, LOCAL_NAMES, frozenset())
    return {n.replace("_orig_mod.", ""): t for n, t in lora_tensors(model).items() if n not in local}


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of peft's LoRA layers: a part of their names starts with ``lora_``."""
    return {
        n: t for n, t in model.named_parameters() if any(part.startswith("lora_") for part in n.split("."))
    }


def mark_local(model: nn.Module, select: Callable[[str], bool]) -> tuple[str, ...]:
    """Keep at home the LoRA tensors whose name ``select`` accepts: they move to the personal state.

    Replaces any earlier marking; ``lambda name: False`` clears it. Returns the names that are local now.
    """
    names = tuple(n for n in lora_tensors(model) if select(n))
    setattr(model, LOCAL_NAMES, frozenset(names))
    return names


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}


def personal_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of what stays with the client: personal experts, gates, anything marked local.

    ``<layer>.personal.expert`` is an int64 scalar: the pretrained expert that the personal one began as.

    Raises:
        ValueError: the model is not grafted and nothing in it is marked local.
    """
    tensors = personal_tensors(model)
    if not tensors:
        grafted_blocks(model)
    return snapshot(tensors)


def shared_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of what travels to the server: the LoRA adapters. Empty when there are none."""
    return snapshot(shared_tensors(model))


def save_personal(model: nn.Module, path: str | os.PathLike) -> None:
    """Write :func:`personal_state` to a safetensors file; the file is replaced as a whole or not at all.

    Raises:
        ValueError: the model is not grafted, or a tensor is not finite; ``path`` is untouched.
        OSError: the disk is full or not writable; names ``path``, which still holds what it held before.
    """
    tensors = personal_tensors(model)
    if not tensors:
        grafted_blocks(model)
    check_finite(tensors, f"personal state for {path}")
    save_tensors(path, tensors, {"kind": "flex personal state"})


def load_personal(model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor]) -> None:
    """Copy a client's personal state, a file or a dict, into the model's tensors.

    Raises:
        TypeError: ``source`` is neither.
        FileNotFoundError, ValueError: no such file; a truncated or foreign file; a missing or unknown name, a
            wrong shape or dtype, a value that is not finite, an expert that does not exist. The model is
            unchanged.
    """
    grafted_blocks(model)
    targets = personal_tensors(model)
    what, state = read_source(source, "personal state")
    check_state(state, targets, what)
    check_experts_exist(model, state, what)
    copy_into(targets, state)
    for block in grafted_blocks(model).values():
        if isinstance(block.personal, PersonalLoRA):
            block.personal.follow_buffer()


def load_shared(model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor]) -> None:
    """Copy the shared state, a file or a dict, into the model's LoRA adapters.

    Raises:
        TypeError, FileNotFoundError, ValueError: as for :func:`load_personal`. The model is unchanged.
    """
    targets = shared_tensors(model)
    what, state = read_source(source, "shared state")
    if not targets and state:
        raise ValueError(
            f"{what}: {type(model).__name__} has no LoRA adapters: call flex.add_lora(model) first"
        )
    check_state(state, targets, what)
    copy_into(targets, state)


def read_source(
    source: str | os.PathLike | Mapping[str, Tensor], what: str
) -> tuple[str, Mapping[str, Tensor]]:
    if isinstance(source, Mapping):
        return what, source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{what} must be a file or a dict of tensors, got {type(source).__name__}")
    return f"{what} in {os.fspath(source)}", load_tensors(source)


def check_state(state: Mapping[str, Tensor], targets: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError on the first name, shape, dtype or value that does not fit ``targets``."""
    missing, unknown = sorted(targets.keys() - state.keys()), sorted(state.keys() - targets.keys())
    if missing or unknown:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unknown to this model", unknown))
            if names
        ]
        raise ValueError(f"{what} does not fit the model: {' and '.join(parts)}")
    for name, target in targets.items():
        given = state[name]
        if not isinstance(given, Tensor):
            raise ValueError(f"{what}: {name} must be a tensor, got {type(given).__name__}")
        if given.shape != target.shape or given.dtype != target.dtype:
            raise ValueError(
                f"{what}: {name} is {list(given.shape)} {given.dtype}, "
                f"the model has {list(target.shape)} {target.dtype}"
            )
    check_finite(state, what)


def check_experts_exist(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    for name, block in grafted_blocks(model).items():
        if isinstance(block.personal, PersonalCopy | PersonalLoRA):
            key = f"{name}.personal.expert"
            count = block.adapter.experts(block).count
            if not 0 <= int(state[key]) < count:
                raise ValueError(
                    f"{what}: {key} is {int(state[key])}, the layer has experts 0 to {count - 1}"
                )


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(state[name])
