"""What the layer keeps for its backward pass, counted in bytes, and what it never allocates."""

from dataclasses import replace

import pytest
import torch
from cases import make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from flex_kernels import Experts, flex_moe


def kept_bytes(case, save: str) -> int:
    """Bytes of distinct storages saved for backward, without the parameters' own."""
    owned = {t.untyped_storage().data_ptr() for name, t in case.tensors().items() if name != "x"}
    found: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, save=save)
    assert y.requires_grad
    return sum(found.values())


def training_case(T: int, dtype=torch.bfloat16):
    case = make_case(T=T, H=256, E=16, K=4, I=128, dtype=dtype, personal_width=128, shared="none")
    return case.requiring(
        "x", "personal.gate_up", "personal.down", "personal.gate_weight", "personal.gate_bias"
    )


def test_recompute_keeps_x_ids_weights_and_gates_alone():
    per_token = (
        kept_bytes(training_case(512), "recompute") - kept_bytes(training_case(256), "recompute")
    ) / 256
    H, K = 256, 4
    assert per_token <= 2 * H + 12 * K


def test_preact_keeps_the_pre_activations_too():
    per_token = (kept_bytes(training_case(512), "preact") - kept_bytes(training_case(256), "preact")) / 256
    H, K, I, personal_width = 256, 4, 128, 128
    assert per_token <= 2 * H + 12 * K + 2 * (2 * I) * K + 2 * (2 * personal_width)


@pytest.mark.parametrize("kind, shared, few", [(None, "none", 38), (None, "gated", 34), ("int8", "none", 19)])
def test_auto_keeps_pre_activations_of_few_tokens(kind, shared, few):
    # Pre-activations of 4 chosen experts and the personal one, of width 128, and a shared one of width 80, in
    # bf16; a 32nd of 16 * 3 * 128 * 256 weights of 2 bytes, or of 1 and a scale of 2 bytes a row.
    a_token = 2 * (5 * 2 * 128 + (2 * 80 if shared == "gated" else 0))
    held = 16 * (3 * 128 * 256 * 2 if kind is None else 3 * 128 * 256 + 2 * (2 * 128 + 256))
    assert few == held // 32 // a_token

    def case(tokens):
        made = make_case(
            T=tokens,
            H=256,
            E=16,
            K=4,
            I=128,
            dtype=torch.bfloat16,
            personal_width=128,
            shared=shared,
            shared_width=80,
        )
        if kind is not None:
            made = replace(made, experts=Experts.quantize(made.experts.gate_up, made.experts.down, kind))
        return made.requiring("x", "personal.gate_up")

    def kept(tokens, save):
        return kept_bytes(case(tokens), save)

    assert kept(few, "auto") == kept(few, "preact") == kept(few, "recompute") + few * a_token
    assert kept(few + 1, "auto") == kept(few + 1, "recompute") < kept(few + 1, "preact")


@pytest.mark.parametrize("save", ["auto", "preact"])
def test_without_gradients_no_pre_activation_is_made(save):
    case = make_case(T=8, H=64, E=16, K=4, I=37, personal_width=37, shared="none").requiring("x")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), LargestAllocation() as forward:
            flex_moe(case.x_TH, case.router, case.experts, case.personal, save=save)
        assert case.x_TH.shape in forward.shapes
        assert ((8 * 4, 2 * 37) in forward.shapes) == ((8, 2 * 37) in forward.shapes) == gradients


def test_no_cast_copy_of_a_float32_personal_expert_is_kept():
    case, wide = training_case(8), training_case(8)
    own = wide.personal
    gate_up, down = (t.detach().float().requires_grad_() for t in (own.gate_up, own.down))
    wide = replace(wide, personal=replace(own, gate_up=gate_up, down=down))
    assert kept_bytes(wide, "recompute") == kept_bytes(case, "recompute")


class LargestAllocation(TorchDispatchMode):
    """Records the largest tensor that any torch operation returns, and the shape of each."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            t.untyped_storage().data_ptr()
            for t in tree_flatten((args, kwargs))[0]
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
                self.shapes.add(tuple(t.shape))
        return out


def test_backward_is_handed_no_zeros_in_the_shape_of_the_pre_activations():
    case = training_case(65)
    y = flex_moe(case.x_TH, case.router, case.experts, case.personal, save="preact")
    with LargestAllocation() as backward:
        y.sum().backward()
    assert case.x_TH.shape in backward.shapes
    assert (65 * 4, 2 * 128) not in backward.shapes


@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_no_buffer_of_the_size_of_the_frozen_experts_is_ever_allocated(save):
    case = training_case(64)
    experts_bytes = case.experts.down.numel() * 2
    with LargestAllocation() as seen:
        flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, save=save).sum().backward()
    assert 0 < seen.bytes < experts_bytes / 2
