"""Quantised experts on the cpu backend: every instruction set and engine against the float64 reference.

Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import Case, LargestTensor, with_fixed_routing
from test_cpu_backend import DTYPES, ISAS, agree, engine, make_case, one_expert_each, run  # noqa: F401

from flex_kernels import Experts, Shared
from flex_kernels.cpu import experts, fused, ops
from flex_kernels.cpu.plan import Block
from flex_kernels.quantize import quantize

KINDS = ["int8", "nf4"]
FUSED = [isa for isa in ISAS if isa != "generic"]


def quantised(case: Case, gate_up: str, down: str | None = None) -> Case:
    """The case with its experts in codes, of one kind or of one for each matrix."""
    record = Experts(quantize(case.experts.gate_up, gate_up), quantize(case.experts.down, down or gate_up))
    return replace(case, experts=record)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_values_and_all_gradients_match_the_reference(engine, dtype, save, kind):  # noqa: F811
    case = make_case(T=41, H=72, E=5, K=2, I=37, personal_width=19, shared_width=70, dtype=dtype)
    agree(quantised(with_fixed_routing(case), kind), mix="convex", save=save)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_odd_sizes_and_many_rows_an_expert(engine, dtype, kind):  # noqa: F811
    agree(quantised(with_fixed_routing(make_case(T=215, H=129, E=2, K=2, I=131, dtype=dtype)), kind))


@pytest.mark.parametrize("H, I", [(256, 128), (1601, 3), (3, 1409), (320, 352), (112, 176)])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_groups_and_long_reductions(engine, kind, H, I):  # noqa: F811
    for T in (9, 70):
        case = make_case(T=T, H=H, E=2, K=1, I=I, dtype=torch.bfloat16, personal=False, shared="none")
        agree(quantised(with_fixed_routing(case), kind), "x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [2, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_have_a_sign(engine, dtype, T, kind):  # noqa: F811
    """Scales of down negated: the same sums with the other sign, bit for bit, in few rows and in many."""
    sizes = {"H": 200, "E": 2, "K": 2, "I": 130, "personal": False, "shared": "none"}
    case = quantised(with_fixed_routing(make_case(T=T, dtype=dtype, **sizes)), kind)
    down = case.experts.down
    assert kind == "int8" or bool((down.scales < 0).any() and (down.scales > 0).any())
    turned = replace(case, experts=replace(case.experts, down=replace(down, scales=-down.scales)))
    got, want = run(turned, "x"), run(case, "x")
    assert all(torch.equal(got[name], -want[name]) for name in ("y", "x"))


def with_coded_shared(case: Case, kind: str) -> Case:
    shared = case.shared
    return replace(case, shared=Shared.quantize(shared.gate_up, shared.down, kind, shared.gate_weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 41, 215])
@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_a_shared_expert_in_codes_matches_the_reference(engine, dtype, T, save, kind):  # noqa: F811
    """Beside plain experts, for few rows and for many."""
    case = make_case(T=T, H=130, E=3, K=2, I=37, shared_width=131, dtype=dtype)
    agree(with_coded_shared(with_fixed_routing(case), kind), mix="convex", save=save)


@pytest.mark.parametrize("kinds", [("int8", "int8"), ("nf4", "int8"), ("int8", "nf4"), ("nf4", "nf4")])
def test_routed_and_shared_experts_in_codes(engine, kinds):  # noqa: F811
    case = make_case(T=50, H=192, E=3, K=2, I=64, shared_width=320, shared="plain", dtype=torch.bfloat16)
    agree(with_coded_shared(quantised(with_fixed_routing(case), kinds[0]), kinds[1]))


@pytest.mark.parametrize("kinds", [("int8", "nf4"), ("nf4", "int8")])
def test_the_two_matrices_may_differ_in_kind(engine, kinds):  # noqa: F811
    agree(quantised(with_fixed_routing(make_case(T=30, H=130, I=70)), *kinds))


@pytest.mark.parametrize("plain", ["gate_up", "down"])
def test_one_matrix_may_stay_plain(engine, plain):  # noqa: F811
    case = with_fixed_routing(make_case(T=30, H=130, I=70))
    experts = replace(quantised(case, "nf4").experts, **{plain: getattr(case.experts, plain)})
    exact = replace(case, experts=replace(experts, **{plain: getattr(experts, plain).double()}))
    got = run(replace(case, experts=experts), "x")
    want = run(replace(exact.to(torch.float64), experts=exact.experts), "x", backend="reference")
    for name, value in got.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", FUSED)
def test_every_number_of_rows_around_the_kernels_limits(isa, dtype, kind):
    most, block = ops.kernels.THIN_CODE_ROWS, ops.kernels.BLOCK_ROWS
    ops.kernels.set_isa(isa)
    try:
        for H, I in ((101, 67), (192, 128)):
            case = one_expert_each([*range(1, 14), most - 1, most, most + 1, block + 1], H=H, I=I).to(dtype)
            agree(quantised(case, kind), "x", "router.weights")
    finally:
        ops.kernels.set_isa("auto")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", FUSED)
def test_many_rows_get_the_bits_of_the_weights_that_codes_stand_for(isa, kind):
    """Packing decodes to the dtype of x: from there on nothing differs from plain weights."""
    ops.kernels.set_isa(isa)
    try:
        for dtype in DTYPES:
            # Batches cut the second expert's rows into pieces of 64, 64 and 52: none is thin.
            case = one_expert_each([50, 180], H=200, I=130).to(dtype)
            coded = quantised(case, kind)
            stored = Experts(coded.experts.gate_up.dequantize(dtype), coded.experts.down.dequantize(dtype))
            got, want = (
                run(coded, "x", "router.weights"),
                run(replace(case, experts=stored), "x", "router.weights"),
            )
            assert all(torch.equal(got[name], want[name]) for name in want)
    finally:
        ops.kernels.set_isa("auto")


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_the_number_of_threads(kind):
    case = quantised(with_fixed_routing(make_case(T=150, H=320, E=6, I=150, dtype=torch.bfloat16)), kind)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(case, "x", "router.weights"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a[n], b[n]) for a, b in itertools.pairwise(found) for n in a)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_may_be_views_of_larger_memory(engine, kind):  # noqa: F811
    case = quantised(with_fixed_routing(make_case(T=40, H=130, E=4, I=70)), kind)
    want = run(case, "x")

    def shifted(weight):
        codes = torch.zeros(weight.codes.numel() + 3, dtype=weight.codes.dtype)[3:].view(weight.codes.shape)
        wide = torch.zeros(*weight.scales.shape, 2, dtype=torch.bfloat16)
        wide[..., 0] = weight.scales
        return replace(weight, codes=codes.copy_(weight.codes), scales=wide[..., 0])

    moved = replace(case, experts=Experts(shifted(case.experts.gate_up), shifted(case.experts.down)))
    got = run(moved, "x")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not FUSED, reason="no fused kernels on this processor")
def test_scales_that_the_kernels_cannot_read_go_to_the_other_engine():
    weight = quantize(torch.randn(1, 4, 130), "nf4")
    tokens, scale = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    plain = torch.randn(1, 130, 2)
    strided = replace(weight, scales=weight.scales.mT.contiguous().mT)
    assert fused.serves([Block(weight, plain, tokens, scale).group()])
    assert not fused.serves([Block(strided, plain, tokens, scale).group()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_no_expert_is_ever_decoded_whole(engine, monkeypatch, save, kind):  # noqa: F811
    """Neither engine makes a float tensor of an expert's size; strips are made smaller than one here."""
    from flex_kernels.cpu import blocks

    monkeypatch.setattr(blocks, "STRIP_ELEMENTS", 4096)
    case = quantised(make_case(T=3, H=256, E=8, K=2, I=128, personal=False, shared="none"), kind)
    with LargestTensor() as seen:
        run(case, "x", save=save)
    assert seen.numel < case.experts.gate_up.codes[0].numel()


def test_codes_get_no_gradient():
    case = quantised(make_case(T=5), "int8")
    y, *_ = experts.experts_forward(
        *(case.x_TH, torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1)),
        *(case.experts.gate_up.codes, case.experts.down.codes),
        *(case.experts.gate_up.scales, case.experts.down.scales),
        *(*(None,) * 8, "add", False),
    )
    assert torch.isfinite(y).all()
    assert set(run(case)) >= {"y", "x"} and not any(n.startswith("experts") for n in run(case))
