"""Error feedback of NF4: against GPTQ by an explicit inverse in float64, and its objective.

Letters: M matrices, R rows, C columns; n inputs; G = 64 columns of a group.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flex_kernels import quantize as quantizing
from flex_kernels.quantize import NF4_LEVELS, Quantized, quantize

LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float64)


def drawn(rows: int, columns: int, inputs: int, seed: int = 0, matrices: int = 1):
    """(weights [M, R, C], mean [M, C, C] of x x^T) in float32; inputs are correlated, some of them large."""
    gen = torch.Generator().manual_seed(seed)
    weight_MRC = torch.randn(matrices, rows, columns, generator=gen)
    mix = torch.randn(matrices, -(-columns // 4), columns, generator=gen) / columns**0.5
    x_MnC = torch.randn(matrices, inputs, mix.shape[1], generator=gen) @ mix
    x_MnC += 0.1 * torch.randn(matrices, inputs, columns, generator=gen)
    x_MnC *= torch.exp(torch.randn(matrices, 1, columns, generator=gen))
    return weight_MRC, x_MnC.mT @ x_MnC / inputs


def objective(quantized: Quantized, weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """tr(E S E^T) in float64."""
    error = quantized.dequantize(torch.float64) - weight.double()
    return ((error @ moments.double()) * error).sum((-1, -2))


def damped(moments: torch.Tensor) -> torch.Tensor:
    """With a part of the mean of the diagonal added to it, as GPTQ does."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return moments + quantizing.FEEDBACK_DAMPING * mean * torch.eye(moments.shape[-1])


def gptq_by_inverse(weight_RC: torch.Tensor, moments_CC: torch.Tensor, scales_RN: torch.Tensor):
    """Decoded weights [R, C]: round a column, then move those after it by the inverse of what is left.

    The optimal brain surgeon's steps, as GPTQ's equations (2) and (3) tell them: the inverse is that of
    the moments without the columns done, computed anew for each.
    """
    left_RC, columns = weight_RC.double().clone(), weight_RC.shape[1]
    decoded_RC = torch.empty_like(left_RC)
    for c in range(columns):
        inverse = torch.linalg.inv(moments_CC[c:, c:].double())
        scale_R = scales_RN[:, c // 64].double()
        nearest_R = (scale_R[:, None] * LEVELS - left_RC[:, c, None]).abs().argmin(-1)
        decoded_RC[:, c] = scale_R * LEVELS[nearest_R]
        miss_R = (left_RC[:, c] - decoded_RC[:, c]) / inverse[0, 0]
        left_RC[:, c:] -= miss_R[:, None] * inverse[0]
    return decoded_RC


@pytest.mark.parametrize("columns", [1, 7, 64, 65, 130])
def test_codes_are_those_of_gptq_with_an_explicit_inverse(columns):
    weight_MRC, moments_MCC = drawn(20, columns, 300, seed=columns, matrices=2)
    got = quantize(weight_MRC, "nf4", moments_MCC)
    for weight_RC, moments_CC, rounded in zip(weight_MRC, moments_MCC, (got[0], got[1]), strict=True):
        want_RC = gptq_by_inverse(weight_RC, damped(moments_CC), rounded.scales)
        same_R = (rounded.dequantize(torch.float64) == want_RC).all(-1)
        # A weight within float32's error of the middle of two levels may fall to either side.
        assert same_R.double().mean() >= 0.9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(64, 200), st.integers(1, 400))
def test_the_objective_is_never_above_that_of_rounding_each_weight_by_itself(seed, columns, inputs):
    weight_MRC, moments_MCC = drawn(48, columns, inputs, seed)
    minimised_MCC = damped(moments_MCC)
    fed_back = objective(quantize(weight_MRC, "nf4", moments_MCC), weight_MRC, minimised_MCC)
    for importance in (None, minimised_MCC.diagonal(dim1=-2, dim2=-1).contiguous()):
        alone = quantize(weight_MRC, "nf4", importance)
        assert fed_back <= objective(alone, weight_MRC, minimised_MCC)


def test_correlated_inputs_lose_half_of_what_they_lost():
    weight_MRC, moments_MCC = drawn(200, 192, 1000)
    fed_back = objective(quantize(weight_MRC, "nf4", moments_MCC), weight_MRC, moments_MCC)
    counted_MC = moments_MCC.diagonal(dim1=-2, dim2=-1).contiguous()
    alone = objective(quantize(weight_MRC, "nf4", counted_MC), weight_MRC, moments_MCC)
    assert fed_back < 0.65 * alone


@pytest.mark.parametrize("columns", [1, 3, 64, 70, 129])
@pytest.mark.parametrize("moments", [torch.eye, lambda n: torch.zeros(n, n), lambda n: 1e-9 * torch.eye(n)])
def test_uncorrelated_equal_or_unseen_inputs_give_plain_rounding(columns, moments):
    weight = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(2))
    got = quantize(weight, "nf4", moments(columns).expand(3, -1, -1))
    want = quantize(weight, "nf4", torch.ones(3, columns))
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)


def test_columns_that_no_input_reaches_change_nothing_in_other_groups():
    weight_MRC, moments_MCC = drawn(30, 192, 500)
    moments_MCC[:, 64:128], moments_MCC[..., 64:128] = 0.0, 0.0
    got = quantize(weight_MRC, "nf4", moments_MCC)
    weight_MRC[..., 64:128] = 100.0
    other = quantize(weight_MRC, "nf4", moments_MCC)
    assert torch.equal(got.codes[..., :32], other.codes[..., :32])
    assert torch.equal(got.codes[..., 64:], other.codes[..., 64:])
    assert torch.equal(got.scales[..., ::2], other.scales[..., ::2])
    # They are rounded themselves nevertheless.
    torch.testing.assert_close(
        other.dequantize()[..., 64:128], weight_MRC[..., 64:128], rtol=1 / 128, atol=0.0
    )


def test_matrices_are_rounded_each_by_its_own_moments_however_many_at_a_time(monkeypatch):
    weight_MRC, moments_MCC = drawn(9, 90, 200, matrices=5)
    whole = quantize(weight_MRC, "nf4", moments_MCC)
    again = quantize(weight_MRC, "nf4", moments_MCC)
    assert torch.equal(whole.codes, again.codes) and torch.equal(whole.scales, again.scales)
    monkeypatch.setattr(quantizing, "ROWS", 20)
    pieces = quantize(weight_MRC, "nf4", moments_MCC)
    other = quantize(weight_MRC, "nf4", moments_MCC.flip(0))
    same = (whole.codes == pieces.codes).double().mean()
    assert same > 0.99 > 0.9 > (whole.codes == other.codes).double().mean()


def test_a_single_matrix_and_other_dtypes_are_taken():
    weight_MRC, moments_MCC = drawn(6, 70, 200)
    weight_RC = weight_MRC[0].bfloat16()
    got, want = (
        quantize(weight_RC, "nf4", moments_MCC[0].double()),
        quantize(weight_RC.float()[None], "nf4", moments_MCC)[0],
    )
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert got.codes.shape == (6, 35) and got.scales.shape == (6, 2)


def test_the_moments_unit_changes_nothing_and_the_weights_scale_the_scales_alone():
    weight_MRC, moments_MCC = drawn(6, 70, 200)
    got = quantize(weight_MRC, "nf4", moments_MCC)
    scaled = quantize(weight_MRC * 2.0**-60, "nf4", moments_MCC * 2.0**40)
    assert torch.equal(got.codes, scaled.codes)
    assert torch.equal(got.scales.float() * 2.0**-60, scaled.scales.float())


@pytest.mark.parametrize(
    "weight, moments, error, message",
    [
        (torch.ones(2, 3, 7), torch.ones(2, 7, 6), ValueError, r"\[2, 7\] or \[2, 7, 7\], got \[2, 7, 6\]"),
        (torch.ones(3, 7), torch.eye(7).long(), TypeError, "importance must be a float tensor"),
        (torch.ones(3, 7), -torch.eye(7), ValueError, "negative or not finite"),
        (torch.ones(3, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), ValueError, "not positive semidefinite"),
        (torch.ones(3, 2), torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), ValueError, "not finite"),
        (torch.full((3, 2), torch.inf), torch.eye(2), ValueError, "holds values that are not finite"),
        (torch.full((3, 2), 1e31), torch.eye(2), ValueError, "beyond 1e[+]30"),
    ],
)  # fmt: skip
def test_what_cannot_be_rounded_is_named(weight, moments, error, message):
    with pytest.raises(error, match=message):
        quantize(weight, "nf4", moments)
