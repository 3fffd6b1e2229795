"""The CUDA route kernels, run on the host: product, scores, choice, weights and gates.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import relative_error
from cuda_emulation import emulation_fixture, host_only_fixture, needs_compiler, survives  # noqa: F401
from torch import Tensor

from flex_kernels import Router, reference
from flex_kernels.cuda import ops

pytestmark = needs_compiler

# Up to 64 tokens the product is fused; 65 and more go through one product and the route kernel.
FUSED, SPLIT = 9, 67


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def inputs(T: int, H: int, E: int, G: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None):
    """x, router rows, gate rows and gate biases of unit-scale logits."""
    return (
        normal(T, H, seed=1).to(dtype),
        normal(E, H, seed=2, scale=H**-0.5).to(weight_dtype or dtype),
        normal(G, H, seed=3, scale=H**-0.5).float(),
        normal(G, seed=4).float(),
    )


def route(emulation, x_TH, weight_EH, gates=None, bias_E=None, top_k=2, **settings):
    gate_weight_GH, gate_bias_G = gates or (torch.empty(0, x_TH.shape[1]), torch.empty(0))
    options = {"normalize": False, "score": "softmax", "scale": 1.0, "want_logits": True} | settings
    return emulation.kernels.route(x_TH, weight_EH, bias_E, gate_weight_GH, gate_bias_G, top_k, **options)


def giving(T: int, logit_E: Tensor) -> tuple[Tensor, Tensor]:
    """(x, router rows) whose logits are exactly ``logit_E`` for every token."""
    weight_EH = torch.zeros(len(logit_E), 4)
    weight_EH[:, 0] = logit_E
    return torch.eye(4)[:1].repeat(T, 1), weight_EH


def assert_best(ids_TK: Tensor, choice_TE: Tensor) -> None:
    """``ids`` are the K best of float64 ``choice``, best first, but for neighbours within float32's reach."""
    ids_TK = ids_TK.long()
    want_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : ids_TK.shape[1]]
    got, want = choice_TE.gather(1, ids_TK), choice_TE.gather(1, want_TK)
    assert torch.allclose(got, want, rtol=3e-6, atol=0), (got - want).abs().max()
    assert all(len(set(row)) == len(row) for row in ids_TK.tolist()), "an expert chosen twice"


@pytest.mark.parametrize("T", (FUSED, SPLIT))
@pytest.mark.parametrize(
    ("E", "K"), ((1, 1), (8, 2), (32, 4), (33, 3), (60, 6), (64, 16), (128, 8), (257, 5), (512, 16), (40, 32))
)
def test_any_number_of_experts_and_choices_matches_float64(emulation, T, E, K):
    x_TH, weight_EH, *gates = inputs(T, 24, E, 2, torch.float32)
    ids, weights, gates_GT, logits = route(emulation, x_TH, weight_EH, gates, top_k=K)
    exact_TE = x_TH.double() @ weight_EH.double().t()
    p_TE = exact_TE.softmax(-1)
    assert_best(ids, p_TE)
    assert relative_error(weights, p_TE.gather(1, ids.long())) < 1e-6
    assert relative_error(logits, exact_TE) < 1e-6
    open_GT = torch.sigmoid(gates[0].double() @ x_TH.double().t() + gates[1].double()[:, None])
    assert relative_error(gates_GT, open_GT) < 1e-6
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32


@pytest.mark.parametrize("T", (FUSED, SPLIT))
@pytest.mark.parametrize(
    ("score", "normalize", "scale", "biased"),
    tuple(product(("softmax", "sigmoid"), (False, True), (2.5,), (False, True))),
)
def test_every_kind_of_router_matches_the_reference(emulation, T, score, normalize, scale, biased):
    x_TH, weight_EH, *gates = inputs(T, 16, 60, 1, torch.float32)
    bias_E = normal(60, seed=9, scale=0.3).float() if biased else None
    ids, weights, *_ = route(
        emulation, x_TH, weight_EH, gates, bias_E, 6, score=score, normalize=normalize, scale=scale
    )
    router = Router(
        weight_EH.double(), 6, normalize, score, scale, None if bias_E is None else bias_E.double()
    )
    want_ids, want_weights, _ = reference.route(x_TH.double(), router)
    assert torch.equal(ids.long(), want_ids)
    assert relative_error(weights, want_weights) < 1e-6


@pytest.mark.parametrize("T", (FUSED, SPLIT))
@pytest.mark.parametrize("x_dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("weight_dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("H", (264, 61))
def test_16_bit_tokens_lose_nothing_against_float32_products(emulation, T, x_dtype, weight_dtype, H):
    x_TH, weight_EH, *gates = inputs(T, H, 20, 2, x_dtype, weight_dtype)
    ids, _, gates_GT, logits = route(emulation, x_TH, weight_EH, gates, top_k=3)
    exact_TE = x_TH.double() @ weight_EH.double().t()
    plain_TE = x_TH.float() @ weight_EH.float().t()
    allowed = 4 * relative_error(plain_TE, exact_TE) + 4 * torch.finfo(torch.float32).eps
    assert relative_error(logits, exact_TE) <= allowed
    assert_best(ids, exact_TE.softmax(-1))
    open_GT = torch.sigmoid(gates[0].double() @ x_TH.double().t() + gates[1].double()[:, None])
    assert relative_error(gates_GT, open_GT) <= allowed


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("magnitude", (1e-4, 1.0, 1e3))
def test_three_16_bit_parts_hold_a_float32_row(emulation, host_only, dtype, magnitude):
    weight_EH = normal(5, 33, seed=6, scale=magnitude).float()
    gate_GH = normal(2, 33, seed=7, scale=magnitude).float()
    rows_RH = torch.full((24, 33), float("nan"), dtype=dtype)
    scale = ops.PART_SCALE[dtype]
    native, codes = emulation.kernels.native, emulation.kernels.codes
    error = native.split_rows(
        0, 0, weight_EH.data_ptr(), codes[torch.float32], gate_GH.data_ptr(), rows_RH.data_ptr(),
        codes[dtype], 5, 2, 33, 24, scale,
    )  # fmt: skip
    assert error == 0
    parts = rows_RH.double()
    router = parts[0:5] + scale * parts[5:10] + scale**2 * parts[10:15]
    gates = parts[15:17] + scale * parts[17:19] + scale**2 * parts[19:21]
    for got, want in ((router, weight_EH), (gates, gate_GH)):
        error = ((got - want.double()).abs() / want.double().abs()).max()
        assert error <= 2 * torch.finfo(torch.float32).eps
    assert (parts[21:] == 0).all()


@pytest.mark.parametrize("T", (FUSED, SPLIT))
def test_ties_go_to_the_lowest_index(emulation, T):
    logit_E = torch.zeros(100)
    logit_E[[70, 3, 99, 38]] = 2.0
    logit_E[[64, 32]] = 5.0
    ids, weights, *_ = route(emulation, *giving(T, logit_E), top_k=9)
    assert ids.tolist() == [[32, 64, 3, 38, 70, 99, 0, 1, 2]] * T
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 5]).all()


@pytest.mark.parametrize("T", (FUSED, SPLIT))
def test_scores_that_underflow_to_zero_are_chosen_by_index(emulation, T):
    logit_E = torch.tensor([-900.0, -800.0, 300.0, -700.0])
    ids, weights, *_ = route(emulation, *giving(T, logit_E), top_k=3, normalize=True)
    assert ids.tolist() == [[2, 0, 1]] * T
    assert weights.tolist() == [[1.0, 0.0, 0.0]] * T


def test_a_bias_that_cancels_a_score_ties_with_any_other_zero(emulation):
    bias_E = torch.tensor([-0.0, -0.5, 0.0, -1.0])
    logit_E = torch.tensor([-200.0, 0.0, -200.0, -200.0])
    ids, weights, *_ = route(emulation, *giving(1, logit_E), bias_E=bias_E, top_k=4, score="sigmoid")
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.0, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize("T", (FUSED, SPLIT))
@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_a_nan_score_is_chosen_first_and_shows(emulation, T, sign):
    logit_E = torch.tensor([1.0, 4.0, sign * float("nan"), 2.0])
    ids, weights, *_ = route(emulation, *giving(T, logit_E), top_k=2, score="sigmoid")
    assert ids.tolist() == [[2, 1]] * T
    assert weights[:, 0].isnan().all() and not weights[:, 1].isnan().any()
    ids, weights, *_ = route(emulation, *giving(T, logit_E), top_k=2, score="softmax")
    assert ids.tolist() == [[0, 1]] * T, "softmax spreads the NaN to every score"
    assert weights.isnan().all()


@pytest.mark.parametrize("T", (FUSED, SPLIT))
def test_the_histogram_counts_each_choice_once(emulation, T):
    x_TH, weight_EH, *_ = inputs(T, 16, 60, 0, torch.float32)
    histogram_E = torch.zeros(60, dtype=torch.int32)
    ids, *_ = route(emulation, x_TH, weight_EH, top_k=4, histogram_E=histogram_E)
    assert torch.equal(histogram_E, torch.bincount(ids.flatten(), minlength=60).int())


@pytest.mark.parametrize("T", (FUSED, SPLIT))
def test_gates_alone_need_no_router(emulation, T):
    x_TH, _, *gates = inputs(T, 16, 1, 2, torch.bfloat16)
    ids, weights, gates_GT, logits = route(emulation, x_TH, torch.empty(0, 16), gates, top_k=0)
    assert ids.shape == weights.shape == (T, 0) and logits.shape == (T, 0)
    want = torch.sigmoid(gates[0].double() @ x_TH.double().t() + gates[1].double()[:, None])
    assert relative_error(gates_GT, want) < 1e-6


@pytest.mark.parametrize("T", (FUSED, SPLIT))
def test_a_gate_may_be_a_column_of_another_tensor(emulation, T):
    x_TH, weight_EH, gate_GH, gate_G = inputs(T, 16, 8, 1, torch.float32)
    column_GH = torch.stack([gate_GH, gate_GH + 1], dim=-1)[..., 0]
    assert not column_GH.is_contiguous()
    want, found = (route(emulation, x_TH, weight_EH, (g, gate_G))[2] for g in (gate_GH, column_GH))
    assert torch.equal(found, want)


@pytest.mark.parametrize("T", (0, 1, 64, 65, 1001))
def test_any_number_of_tokens_matches_the_reference(emulation, T):
    x_TH, weight_EH, *gates = inputs(T, 8, 20, 2, torch.float32)
    ids, weights, gates_GT, logits = route(emulation, x_TH, weight_EH, gates, top_k=3, want_logits=False)
    want_ids, want_weights, _ = reference.route(x_TH.double(), Router(weight_EH.double(), 3))
    assert torch.equal(ids.long(), want_ids)
    assert T == 0 or relative_error(weights, want_weights) < 1e-6
    assert gates_GT.shape == (2, T) and logits.shape == (0, 20)


def test_rows_beyond_the_fused_kernels_reach_take_the_product(emulation, monkeypatch):
    x_TH, weight_EH, *gates = inputs(3, 32, 60, 1, torch.bfloat16)
    fused = route(emulation, x_TH, weight_EH, gates, top_k=6)
    monkeypatch.setattr(ops, "FUSED_BYTES", 1)
    taken = route(emulation, x_TH, weight_EH, gates, top_k=6)
    assert torch.equal(fused[0], taken[0])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(fused[1:], taken[1:]))


@pytest.mark.parametrize("offset", (0, 4))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_tokens_that_start_off_16_bytes_are_routed_alike(emulation, dtype, offset):
    x_TH, weight_EH, *gates = inputs(5, 40, 60, 1, dtype)
    want = route(emulation, x_TH, weight_EH, gates, top_k=6)
    moved = torch.empty(x_TH.numel() + offset, dtype=dtype)[offset:].view(x_TH.shape).copy_(x_TH)
    assert ops.fits_fused(moved, weight_EH, gates[0]) == (offset * dtype.itemsize % 16 == 0)
    found = route(emulation, moved, weight_EH, gates, top_k=6)
    assert torch.equal(found[0], want[0])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found[1:], want[1:]))


@pytest.mark.parametrize("T", (FUSED, SPLIT))
def test_the_order_of_threads_changes_nothing(emulation, T):
    x_TH, weight_EH, *gates = inputs(T, 16, 60, 2, torch.float32)
    histograms = torch.zeros(5, 60, dtype=torch.int32)
    outputs = []
    for seed in range(5):
        emulation.seed(seed)
        outputs.append(route(emulation, x_TH, weight_EH, gates, top_k=6, histogram_E=histograms[seed]))
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other))
    assert (histograms == histograms[0]).all()


@pytest.mark.parametrize(("T", "barrier"), ((FUSED, 0), (SPLIT, 0), (SPLIT, 1)))
def test_a_missing_barrier_is_caught(emulation, host_only, T, barrier):
    x_TH, weight_EH, *_ = inputs(T, 16, 300, 0, torch.float32)

    def run():
        histogram_E = torch.zeros(300, dtype=torch.int32)
        return *route(emulation, x_TH, weight_EH, top_k=6, histogram_E=histogram_E)[:2], histogram_E

    want = run()

    def always_right() -> bool:
        emulation.drop_barrier(barrier)
        for seed in range(20):
            emulation.seed(seed)
            if not all(torch.equal(a, b) for a, b in zip(run(), want)):
                return False
        return True

    assert not survives(always_right)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"top_k": 9}, r"top_k=9 is not between 0 and 8 \(of 8 experts\)"),
        ({"weight_EH": torch.zeros(513, 4)}, "513 experts exceed the 512"),
        ({"gates": (torch.zeros(33, 4), torch.zeros(33))}, "33 gates exceed the 32"),
        ({"x_TH": torch.zeros(4, 3).t()}, r"x must be contiguous \[3, 4\]"),
        (
            {"x_TH": torch.zeros(3, 4, dtype=torch.float64)},
            r"x must be .*float32 or bfloat16 or float16, got",
        ),
        ({"weight_EH": torch.zeros(8, 5)}, r"router.weight must be contiguous \[8, 4\]"),
        ({"bias_E": torch.zeros(7)}, r"router.bias must be contiguous \[8\] float32, got \[7\]"),
        ({"histogram_E": torch.zeros(8)}, r"histogram must be contiguous \[8\] int32, got \[8\] float32"),
        ({"x_TH": torch.zeros(3, 4, device="meta")}, "x is on meta, this kernel wants it on (cpu|cuda)"),
    ),
)
def test_bad_arguments_are_named(emulation, changes, message):
    with pytest.raises(ValueError, match=message):
        route(emulation, **({"x_TH": torch.zeros(3, 4), "weight_EH": torch.zeros(8, 4)} | changes))
