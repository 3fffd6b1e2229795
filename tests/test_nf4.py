"""How a group of 64 weights finds its 4-bit scale: against float64, and against all scales there are.

Letters: E experts, R rows, C columns of a weight; N groups, S scales.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flex_kernels import Experts
from flex_kernels import quantize as quantizing
from flex_kernels.quantize import NF4_LEVELS, quantize

LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float64)
KINDS_OF_GROUP = [
    "normal",
    "uniform",
    "heavy tails",
    "constant",
    "one hot",
    "two outliers",
    "one sign",
    "levels",
]


def groups(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    """[count, 64] float32 weights, some 2^-20 and some 2^20 times as large as others."""
    gen = torch.Generator().manual_seed(seed)
    w_NG = torch.randn(count, 64, generator=gen)
    if kind == "uniform":
        w_NG = torch.rand(count, 64, generator=gen) - 0.5
    if kind == "heavy tails":
        w_NG = w_NG / torch.randn(count, 64, generator=gen)
    if kind == "constant":
        w_NG = w_NG[:, :1].expand(-1, 64).clone()
    if kind == "one hot":
        w_NG = w_NG * torch.nn.functional.one_hot(torch.randint(64, (count,), generator=gen), 64)
    if kind == "two outliers":
        w_NG[:, 3], w_NG[:, 40] = 20.0, -17.0
    if kind == "one sign":
        w_NG = w_NG.abs()
    if kind == "levels":
        w_NG = LEVELS.float()[torch.randint(16, (count, 64), generator=gen)]
    return w_NG * torch.exp2(torch.randint(-20, 21, (count, 1), generator=gen).float())


def error_with(w_NG: torch.Tensor, scales_N: torch.Tensor, importance_G: torch.Tensor | float = 1.0):
    """Squared errors [N] in float64 with the nearest level for every weight."""
    decoded = LEVELS * scales_N.double()[:, None, None]
    nearest_NG = (decoded - w_NG.double()[..., None]).abs().amin(-1)
    return (nearest_NG.square() * importance_G).sum(-1)


def error_of(quantized, w_NG: torch.Tensor, importance_G: torch.Tensor | float = 1.0) -> torch.Tensor:
    return ((quantized.dequantize(torch.float64) - w_NG.double()).square() * importance_G).sum(-1)


def least_error(w_NG: torch.Tensor, importance_G: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The least error [N] with any bfloat16 scale of either sign from 0.4 to 1.6 times the largest weight.

    Beyond 1.6 times it no weight is nearer to an outer level than 0.6: the others then serve worse.
    """
    largest_N = w_NG.abs().amax(-1)
    every = torch.arange(0x0080, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    best_N = torch.full_like(largest_N, torch.inf, dtype=torch.float64)
    for n, largest in enumerate(largest_N):
        some_S = every[(every >= 0.4 * largest) & (every <= 1.6 * largest)]
        for sign in (1, -1):
            row_SG = w_NG[n].expand(len(some_S), -1)
            best_N[n] = min(best_N[n], error_with(row_SG, sign * some_S, importance_G).min())
    return best_N


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS_OF_GROUP), st.integers(0, 2**31), st.integers(1, 64))
def test_no_group_has_more_error_than_with_its_largest_weight_as_scale(kind, seed, columns):
    w_NC = groups(kind, 40, seed)[:, :columns]
    got = error_of(quantize(w_NC, "nf4"), w_NC)
    largest_N = w_NC.abs().amax(-1)
    # Both are compared in float32 there.
    assert (
        got <= error_with(w_NC, largest_N.bfloat16()) * (1 + 1e-5) + 1e-12 * largest_N.double() ** 2
    ).all()


@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy tails", "two outliers", "one sign"])
def test_the_scales_tried_come_near_the_best_of_all_scales(kind):
    w_NG = groups(kind, 40)
    largest_N = w_NG.abs().amax(-1).double()
    got, best = (e / largest_N**2 for e in (error_of(quantize(w_NG, "nf4"), w_NG), least_error(w_NG)))
    assert (got >= best * (1 - 1e-9)).all()
    assert got.sum() <= 1.08 * best.sum()
    assert (got <= 1.4 * best).all()


def test_on_normal_weights_a_seventh_of_the_squared_error_is_saved():
    w_NG = torch.randn(4000, 64, generator=torch.Generator().manual_seed(3))
    ratio = (
        error_of(quantize(w_NG, "nf4"), w_NG).sum() / error_with(w_NG, w_NG.abs().amax(-1).bfloat16()).sum()
    )
    assert 0.8 < ratio < 6 / 7


@pytest.mark.parametrize("kind", ["constant", "one hot", "levels"])
def test_groups_that_codes_hold_exactly_lose_the_rounding_of_the_scale_at_most(kind):
    w_NG = groups(kind, 50)
    error = (quantize(w_NG, "nf4").dequantize() - w_NG).abs().amax(-1)
    assert (error <= w_NG.abs().amax(-1) / 256).all()


def test_a_mirrored_group_gets_the_mirrored_scale_and_equal_error():
    w_NG = groups("normal", 200)
    got, mirrored = quantize(w_NG, "nf4"), quantize(-w_NG, "nf4")
    assert torch.equal(got.scales, -mirrored.scales)
    assert 60 < int((got.scales < 0).sum()) < 140
    torch.testing.assert_close(error_of(got, w_NG), error_of(mirrored, -w_NG))


@pytest.mark.parametrize("kind", KINDS_OF_GROUP)
def test_rounding_twice_is_rounding_once(kind):
    once = quantize(groups(kind, 300), "nf4").dequantize()
    assert torch.equal(quantize(once, "nf4").dequantize(), once)


@pytest.mark.parametrize("largest", [3.4e38, 3e38, 1e-37, 1e-39, 1e-42])
def test_the_ends_of_float32_are_rounded_like_the_middle(largest):
    w = torch.tensor([[largest, -largest / 2, 0.0, largest / 8]])
    got = quantize(w, "nf4")
    assert torch.isfinite(got.scales).all()
    # The least bfloat16 is 9e-41.
    error = (got.dequantize(torch.float64) - w.double()).abs().max()
    assert error <= max(0.1 * w[0, 0].double(), 1e-40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_that_a_weight_comes_in_changes_nothing(dtype):
    w = torch.randn(6, 130, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(w.to(dtype).float(), w.float())
    a, b = quantize(w.to(dtype), "nf4"), quantize(w.float(), "nf4")
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    w = torch.randn(3, 700, 200, generator=torch.Generator().manual_seed(2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(quantize(w, "nf4", torch.rand(3, 200, generator=torch.Generator().manual_seed(3))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].codes, q.codes) for q in found)
    assert all(torch.equal(found[0].scales, q.scales) for q in found)


def importance_like(*shape: int) -> torch.Tensor:
    """Mean squares as layers have them: most alike, a few columns a hundred times as much."""
    gen = torch.Generator().manual_seed(4)
    squares = torch.rand(shape, generator=gen)
    return squares * torch.where(torch.rand(shape, generator=gen) < 0.03, 100.0, 1.0)


def test_importance_lowers_the_error_that_counts():
    w_NG, importance_G = groups("normal", 40), importance_like(64)
    counted_G = importance_G / importance_G.mean() + quantizing.DAMPING
    with_it = error_of(quantize(w_NG, "nf4", importance_G), w_NG, counted_G)
    without = error_of(quantize(w_NG, "nf4"), w_NG, counted_G)
    largest_N = w_NG.abs().amax(-1).double()
    assert (with_it <= without * (1 + 1e-5)).float().mean() > 0.9
    assert (with_it / largest_N**2).sum() < 0.6 * (without / largest_N**2).sum()
    assert (with_it / largest_N**2).sum() < 1.5 * (least_error(w_NG, counted_G) / largest_N**2).sum()


def test_every_expert_is_rounded_by_its_own_importance(monkeypatch):
    w_ERC, importance_EC = (
        torch.randn(4, 5, 70, generator=torch.Generator().manual_seed(5)),
        importance_like(4, 70),
    )
    whole = quantize(w_ERC, "nf4", importance_EC)
    for e in range(4):
        one = quantize(w_ERC[e], "nf4", importance_EC[e])
        assert torch.equal(whole[e].codes, one.codes) and torch.equal(whole[e].scales, one.scales)
    # Pieces of three rows, so that some hold rows of two experts.
    monkeypatch.setattr(quantizing, "CHUNK", 230)
    pieces = quantize(w_ERC, "nf4", importance_EC)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)
    assert not torch.equal(whole.codes, quantize(w_ERC, "nf4").codes)


def test_importance_has_no_unit_and_of_an_unseen_expert_counts_columns_alike():
    w_RC, importance_C = torch.randn(5, 70, generator=torch.Generator().manual_seed(6)), importance_like(70)
    a, b = (quantize(w_RC, "nf4", importance_C * unit) for unit in (1.0, 1024.0))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    zeros, ones = (quantize(w_RC, "nf4", torch.full((70,), value)) for value in (0.0, 1.0))
    assert torch.equal(zeros.codes, ones.codes) and torch.equal(zeros.scales, ones.scales)


def test_experts_take_an_importance_for_each_matrix():
    gate_up, down = torch.randn(2, 6, 70), torch.randn(2, 70, 3)
    importance = importance_like(2, 70), importance_like(2, 3)
    got = Experts.quantize(gate_up, down, "nf4", importance)
    assert torch.equal(got.gate_up.codes, quantize(gate_up, "nf4", importance[0]).codes)
    assert torch.equal(got.down.scales, quantize(down, "nf4", importance[1]).scales)


@pytest.mark.parametrize(
    "kind, importance, error, message",
    [
        ("int8", torch.ones(2, 7), ValueError, "importance is for kind='nf4'"),
        ("nf4", [1.0], TypeError, r"must be a float tensor \[..., C\] or \[..., C, C\], got list"),
        ("nf4", torch.ones(2, 7, dtype=torch.int32), TypeError, "got torch.int32"),
        (
            "nf4",
            torch.ones(7),
            ValueError,
            r"a weight \[2, 3, 7\] must be \[2, 7\] or \[2, 7, 7\], got \[7\]",
        ),
        ("nf4", torch.ones(2, 7) * -1, ValueError, "negative or not finite"),
        ("nf4", torch.full((2, 7), torch.nan), ValueError, "negative or not finite"),
    ],
)
def test_an_importance_that_does_not_fit_is_named(kind, importance, error, message):
    with pytest.raises(error, match=message):
        quantize(torch.ones(2, 3, 7), kind, importance)
