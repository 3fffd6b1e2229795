"""The bfloat16 kernels for AMX tiles on the shapes that tiles make odd, plain weights and codes, against the
float64 reference.

test_amx.py runs this file where tiles are emulated; on a processor that has them it can be run by name.
Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, make_case, with_fixed_routing
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_backend import agree, one_expert_each, run

from flex_kernels import Experts, allow_int8_products
from flex_kernels.cpu import ops
from flex_kernels.quantize import Quantized, quantize

# Of gate_up and of down; None is left plain.
KINDS = [("int8", "int8"), ("nf4", "nf4"), ("nf4", "int8"), ("int8", None), (None, "nf4")]

pytestmark = pytest.mark.skipif("amx" not in ops.kernels.isas(), reason="neither AMX nor its emulation here")


@pytest.fixture(autouse=True)
def amx_and_poisoned_memory():
    """Fresh memory is NaN, so that whatever is read before it is written shows in the result."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    ops.kernels.set_isa("amx")
    yield
    ops.kernels.set_isa("auto")
    torch.use_deterministic_algorithms(was)


def bfloat16(case: Case) -> Case:
    return case.to(torch.bfloat16)


def with_codes(case: Case, gate_up: str | None, down: str | None) -> Case:
    """The case with its experts in codes, where a kind is given."""
    kinds = {"gate_up": gate_up, "down": down}
    coded = {name: quantize(getattr(case.experts, name), kind) for name, kind in kinds.items() if kind}
    return replace(case, experts=replace(case.experts, **coded))


def decoded(case: Case) -> Case:
    """The case with plain bfloat16 experts, those that the codes stand for."""
    weights = (case.experts.gate_up, case.experts.down)
    plain = [w.dequantize(torch.bfloat16) if isinstance(w, Quantized) else w for w in weights]
    return replace(case, experts=Experts(*plain))


def assert_same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("save", ["recompute", "preact"])
@pytest.mark.parametrize("counts", [range(1, 41), [63, 64, 65, 96, 97], [255, 257, 300]], ids=str)
def test_every_number_of_rows_an_expert(counts, save):
    agree(bfloat16(one_expert_each([*counts], H=70, I=45)), "x", "router.weights", save=save)


@pytest.mark.parametrize("save", ["recompute", "preact"])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_codes_at_every_number_of_rows_an_expert(kinds, save):
    case = bfloat16(one_expert_each([*range(1, 41), 97, 300], H=70, I=45))
    agree(with_codes(case, *kinds), "x", "router.weights", save=save)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_codes_give_the_bits_of_the_weights_that_they_stand_for(kinds):
    widths = {1: 2, 15: 33, 31: 130, 33: 1, 64: 64, 65: 63, 129: 320, 255: 17, 257: 129, 513: 40}
    for H, I in widths.items():
        # Batches of 64 rows: each has an expert of more rows than those that leave the tiles.
        coded = with_codes(bfloat16(one_expert_each([70, 33, 9, 3, 32, 1, 20], H=H, I=I)), *kinds)
        # "auto" would keep pre-activations of one more often than of the other.
        for save in ("recompute", "preact"):
            found = [run(case, "x", "router.weights", save=save) for case in (coded, decoded(coded))]
            assert_same_bits(*found)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_where_every_expert_has_few_rows_go_to_the_avx512_kernels(kind):
    case = with_codes(bfloat16(one_expert_each([4, 1, 0, 3], H=130, I=70)), kind, kind)
    got = run(case, "x", "router.weights")
    ops.kernels.set_isa("avx512")
    assert_same_bits(got, run(case, "x", "router.weights"))


@pytest.fixture
def int8_products():
    allow_int8_products(True)
    yield
    allow_int8_products(False)


@pytest.mark.parametrize("save", ["recompute", "preact"])
@pytest.mark.parametrize("kinds", [("int8", "int8"), ("nf4", "nf4"), ("int8", "nf4")], ids=str)
def test_products_in_int8_give_the_bits_of_the_avx512_kernels(int8_products, kinds, save):
    for H, I in {1: 2, 33: 65, 64: 128, 129: 63, 320: 17, 2100: 40, 70: 1100}.items():
        case = with_codes(bfloat16(one_expert_each([70, 33, 9, 3, 32, 1, 17, 130], H=H, I=I)), *kinds)
        found = []
        for isa in ("amx", "avx512"):
            ops.kernels.set_isa(isa)
            found.append(run(case, "x", "router.weights", save=save))
        assert_same_bits(*found)


@pytest.mark.parametrize("mix, save", [("add", "recompute"), ("convex", "preact")])
def test_experts_in_int8_stand_beside_plain_ones_on_tiles(int8_products, mix, save):
    case = make_case(T=75, H=97, E=4, K=2, I=53, personal_width=131, shared_width=70, dtype=torch.bfloat16)
    case, found = with_codes(with_fixed_routing(case), "int8", "nf4"), []
    for isa in ("amx", "avx512"):
        ops.kernels.set_isa(isa)
        found.append(run(case, mix=mix, save=save))
    for name, want in found[1].items():
        # Sums of plain experts in another order; a row that lies between two codes may be rounded either way.
        assert (found[0][name].double() - want).norm() <= 8e-3 * want.double().norm(), name


@pytest.mark.parametrize("H", [1, 15, 16, 17, 31, 32, 33, 63, 65, 255, 257, 513])
def test_every_remainder_of_the_hidden_size(H):
    agree(bfloat16(one_expert_each([33, 5, 70], H=H, I=40)), "x", "router.weights")


@pytest.mark.parametrize("I", [1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 129, 130, 257])
def test_every_remainder_of_the_expert_width(I):
    agree(bfloat16(one_expert_each([33, 5, 70], H=50, I=I)), "x", "router.weights")


@pytest.mark.parametrize("kinds", [(None, None), ("int8", "nf4")], ids=str)
@pytest.mark.parametrize("H, I, rows", [(4100, 20, 200), (20, 4300, 270), (40, 2100, 20), (6301, 3, 40)])
def test_a_reduction_longer_than_the_cache_goes_in_parts(H, I, rows, kinds):
    agree(with_codes(bfloat16(one_expert_each([rows, 3], H=H, I=I)), *kinds), "x", "router.weights")


@pytest.mark.parametrize("kinds", [(None, None), ("nf4", "int8")], ids=str)
@pytest.mark.parametrize("mix, save", [("add", "recompute"), ("convex", "preact")])
def test_all_gradients_with_shared_and_personal_experts(mix, save, kinds):
    case = make_case(T=75, H=97, E=4, K=2, I=53, personal_width=131, shared_width=70, dtype=torch.bfloat16)
    agree(with_codes(with_fixed_routing(case), *kinds), mix=mix, save=save)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_weights_may_lie_in_wider_rows_at_any_address(first):
    case = bfloat16(one_expert_each([40, 20, 0, 7], H=96, I=64))

    def inside_wider_rows(weight: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*weight.shape[:-1], weight.shape[-1] + 37), float("nan"), dtype=weight.dtype)
        view = wide[..., first : first + weight.shape[-1]]
        return view.copy_(weight)

    apart = Experts(inside_wider_rows(case.experts.gate_up), inside_wider_rows(case.experts.down))
    assert_same_bits(
        run(replace(case, experts=apart), "x", "router.weights"), run(case, "x", "router.weights")
    )
    agree(case, "x", "router.weights")


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_and_scales_may_lie_in_wider_rows_at_any_address(kind, first):
    case = with_codes(bfloat16(one_expert_each([40, 20, 0, 7], H=99, I=67)), kind, kind)

    def inside_wider_rows(part: torch.Tensor, filler: float) -> torch.Tensor:
        wide = torch.full((*part.shape[:-1], part.shape[-1] + 37), filler, dtype=part.dtype)
        view = wide[..., first : first + part.shape[-1]]
        return view.copy_(part)

    def apart(weight: Quantized) -> Quantized:
        codes, scales = inside_wider_rows(weight.codes, 0x77), inside_wider_rows(weight.scales, float("nan"))
        return replace(weight, codes=codes, scales=scales)

    moved = Experts(apart(case.experts.gate_up), apart(case.experts.down))
    assert_same_bits(
        run(replace(case, experts=moved), "x", "router.weights"), run(case, "x", "router.weights")
    )
    agree(case, "x", "router.weights")


def test_what_is_not_a_number_stays_in_its_own_row():
    case = bfloat16(one_expert_each([21, 50], H=41, I=37))
    plain = run(case, "x")
    broken = case.x_TH.detach().clone()
    broken[[3, 60]] = torch.tensor([[float("nan")], [float("inf")]], dtype=torch.bfloat16)
    got = run(replace(case, x_TH=broken), "x")
    others = [t for t in range(71) if t not in (3, 60)]
    for name in ("y", "x"):
        assert torch.equal(got[name][others], plain[name][others])
        assert not torch.isfinite(got[name][[3, 60]]).any()


@pytest.mark.parametrize("T, H, I, kinds", [(40, 160, 700, ("nf4", "int8")), (300, 200, 96, (None, None))])
def test_results_are_the_same_bits_for_one_to_four_threads(T, H, I, kinds):
    case = with_fixed_routing(make_case(T=T, H=H, E=3, K=2, I=I, shared_width=200, dtype=torch.bfloat16))
    case = with_codes(case, *kinds)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(case, "x", "router.weights", "personal.gate_up", mix="convex"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in ("y", "x", "router.weights"))


@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any),
    H=st.integers(1, 140),
    I=st.integers(1, 140),
    save=st.sampled_from(["recompute", "preact"]),
    kinds=st.sampled_from([(None, None), *KINDS]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_shapes(counts, H, I, save, kinds):
    agree(with_codes(bfloat16(one_expert_each(counts, H=H, I=I)), *kinds), "x", "router.weights", save=save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_give_the_bits_of_the_avx512_kernels(dtype):
    case = with_fixed_routing(make_case(T=50, H=70, I=45)).to(dtype)
    got = run(case, "x", mix="convex")
    ops.kernels.set_isa("avx512")
    assert_same_bits(got, run(case, "x", mix="convex"))
