"""The CUDA combine kernel, run on the host: the layer's output, or the sum of row gradients.

Letters: T tokens, H hidden, K chosen, N rows.
"""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, relative_error
from cuda_emulation import emulation_fixture, host_only_fixture, needs_compiler  # noqa: F401
from torch import Tensor

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(T: int, K: int, H: int, dtype: torch.dtype, skipped: float = 0.2) -> dict[str, Tensor]:
    """Everything that combine takes; some slots are skipped, and the rows past the real ones hold NaN."""
    generator = torch.Generator().manual_seed(T + K + H)
    keep_N = torch.rand(T * K, generator=generator) >= skipped
    real = int(keep_N.sum())
    inverse_N = torch.full((T * K,), -1, dtype=torch.int32)
    inverse_N[keep_N] = torch.randperm(real, generator=generator).int()
    y_NH = normal(T * K, H, seed=1)
    y_NH[real:] = float("nan")
    return {
        "y_NH": y_NH.to(dtype),
        "inverse_TK": inverse_N.view(T, K),
        "weights_TK": normal(T, K, seed=2).float(),
        "personal_TH": normal(T, H, seed=3).to(dtype),
        "gate_T": torch.sigmoid(normal(T, seed=4)).float(),
        "shared_TH": normal(T, H, seed=5).to(dtype),
        "shared_gate_T": torch.sigmoid(normal(T, seed=6)).float(),
    }


def plain(y_NH, inverse_TK, weights_TK, personal_TH, gate_T, shared_TH, shared_gate_T, mix, dtype):
    """The equation in torch, computed in ``dtype``."""
    H = y_NH.shape[1]

    def cast(t: Tensor | None, otherwise: float) -> Tensor:
        return torch.full((), otherwise, dtype=dtype) if t is None else t.to(dtype)

    y_NH = torch.cat([y_NH.to(dtype), torch.zeros(1, H, dtype=dtype)])
    rows_TKH = y_NH[inverse_TK.long().flatten()].view(*inverse_TK.shape, H)
    r_TH = (cast(weights_TK, 1.0)[..., None] * rows_TKH).sum(1)
    if shared_TH is not None:
        r_TH = r_TH + cast(shared_gate_T, 1.0)[..., None] * cast(shared_TH, 0.0)
    if personal_TH is not None:
        g_T1 = cast(gate_T, 1.0)[..., None]
        r_TH = (r_TH if mix == "add" else (1 - g_T1) * r_TH) + g_T1 * cast(personal_TH, 0.0)
    return r_TH


def check(emulation, given: dict, mix: str = "add") -> Tensor:
    found = emulation.kernels.combine(**given, mix=mix)
    dtype = given["y_NH"].dtype
    assert found.dtype == dtype
    assert_close(
        found, plain(**given, mix=mix, dtype=torch.float64), plain(**given, mix=mix, dtype=dtype), 1.0, "y"
    )
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", ("add", "convex"))
@pytest.mark.parametrize(
    ("T", "K", "H"), ((1, 1, 8), (7, 4, 64), (13, 6, 96), (5, 16, 33), (33, 8, 2056), (3, 2, 1))
)
def test_all_parts_together_match_float64(emulation, dtype, mix, T, K, H):
    check(emulation, parts(T, K, H, dtype), mix)


@pytest.mark.parametrize("mix", ("add", "convex"))
@pytest.mark.parametrize(
    "absent",
    (
        ("personal_TH", "gate_T"),
        ("shared_TH", "shared_gate_T"),
        ("shared_gate_T",),
        ("gate_T",),
        ("weights_TK",),
        ("personal_TH", "gate_T", "shared_TH", "shared_gate_T"),
    ),
)
def test_an_absent_part_is_left_out_and_an_absent_factor_is_one(emulation, mix, absent):
    given = parts(9, 3, 40, torch.bfloat16)
    check(emulation, given | {name: None for name in absent}, mix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_factors_it_sums_the_gradients_of_rows(emulation, dtype):
    given = parts(21, 4, 48, dtype)
    given |= {"weights_TK": None, "gate_T": None, "shared_gate_T": None}
    check(emulation, given)


@pytest.mark.parametrize("offset", (0, 1, 7))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_tensor_that_starts_off_16_bytes_gives_the_same_bits(emulation, dtype, offset):
    given = parts(6, 3, 32, dtype)
    want = emulation.kernels.combine(**given)
    for name in ("y_NH", "personal_TH", "shared_TH"):
        t = given[name]
        buffer = torch.full((t.numel() + offset,), float("nan"), dtype=dtype)
        moved = buffer[offset:].view(t.shape)
        moved.copy_(t)
        assert torch.equal(emulation.kernels.combine(**(given | {name: moved})), want), name


def test_skipped_slots_read_neither_row_nor_weight(emulation):
    given = parts(4, 3, 16, torch.float32)
    given["inverse_TK"][2] = -1
    given["weights_TK"][2] = float("nan")
    given |= {"personal_TH": None, "gate_T": None, "shared_TH": None, "shared_gate_T": None}
    found = emulation.kernels.combine(**given)
    assert (found[2] == 0).all()
    assert torch.isfinite(found).all()


def test_a_shut_gate_leaves_the_routed_sum_and_an_open_one_the_personal_expert(emulation):
    given = parts(5, 2, 24, torch.bfloat16)
    without = emulation.kernels.combine(**(given | {"personal_TH": None, "gate_T": None}))
    for mix in ("add", "convex"):
        shut = emulation.kernels.combine(**(given | {"gate_T": torch.zeros(5)}), mix=mix)
        assert torch.equal(shut, without)
    opened = emulation.kernels.combine(**(given | {"gate_T": torch.ones(5)}), mix="convex")
    assert torch.equal(opened, given["personal_TH"])


@pytest.mark.parametrize(("T", "K", "H"), ((0, 4, 16), (3, 0, 16), (3, 2, 0)))
def test_empty_shapes_are_answered(emulation, T, K, H):
    given = parts(T, K, H, torch.float32, skipped=0.0)
    found = emulation.kernels.combine(**given)
    assert found.shape == (T, H)
    assert relative_error(found, plain(**given, mix="add", dtype=torch.float64)) < 1e-6


def test_nothing_outside_the_output_is_written(emulation, host_only, monkeypatch):
    given = parts(5, 2, 20, torch.float16)
    guarded = torch.full((7, 20), 3.0, dtype=torch.float16)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: guarded[1:6])
    found = emulation.kernels.combine(**given)
    assert found.data_ptr() == guarded[1].data_ptr()
    assert (guarded[0] == 3).all() and (guarded[6] == 3).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"mix": "max"}, "mix='max' is not one of 'add', 'convex'"),
        ({"gate_T": torch.zeros(4)}, r"gate must be contiguous \[5\] float32, got \[4\] float32"),
        ({"personal_TH": torch.zeros(5, 20)}, r"personal must be .* bfloat16, got \[5, 20\] float32"),
        ({"inverse_TK": torch.zeros(10, dtype=torch.int32)}, r"inverse must be \[T, K\]"),
        ({"inverse_TK": torch.zeros(5, 2)}, r"inverse must be contiguous \[5, 2\] int32"),
        (
            {"shared_TH": torch.zeros(20, 5, dtype=torch.bfloat16).t()},
            r"shared must be .* with strides \[1, 5\]",
        ),
    ),
)
def test_bad_arguments_are_named(emulation, changes, message):
    with pytest.raises(ValueError, match=message):
        emulation.kernels.combine(**({**parts(5, 2, 20, torch.bfloat16), "mix": "add"} | changes))
