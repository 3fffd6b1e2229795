"""Routed experts in 8 and 4 bits on the Triton backend, decoded in the loop and ahead of it; run by
test_triton_interpreter.py.

The yardstick is the float64 reference on the same codes. Letters: T tokens, H hidden, E experts, K chosen, I
expert width.
"""

from dataclasses import replace

import pytest
import torch
from cases import LargestTensor, make_case, with_fixed_routing
from triton_device import DEVICE, DTYPES, poisoned_memory, to_device
from triton_suite_layer import agree, run

from flex_kernels import Experts, Routed, flex_moe
from flex_kernels.quantize import quantize
from flex_kernels.triton import codegen, codes, experts_backward, tiles
from flex_kernels.triton.groups import dense, grouped

pytestmark = pytest.mark.usefixtures(poisoned_memory.__name__)
# Each product reads one of the two weights, so these two show every product with either kind.
KINDS = [("int8", "nf4"), ("nf4", "int8")]


def coded(case, gate_up="nf4", down="nf4"):
    """The case with its routed experts quantised; None leaves a weight plain."""
    parts = {"gate_up": gate_up, "down": down}
    stored = {n: quantize(getattr(case.experts, n), kind) for n, kind in parts.items() if kind}
    return replace(case, experts=replace(case.experts, **stored))


def coded_shared(case, gate_up, down):
    """The case with its shared expert quantised."""
    shared = case.shared
    stored = {"gate_up": quantize(shared.gate_up, gate_up), "down": quantize(shared.down, down)}
    return replace(case, shared=replace(shared, **stored))


def decode_ahead(monkeypatch, staged_bytes=70_000):
    """Whatever the rows, weights are decoded before the product, into a buffer of that many bytes."""
    monkeypatch.setattr(codes, "IN_LOOP_ROWS", 0)
    monkeypatch.setattr(codes, "STAGED_BYTES", staged_bytes)


@pytest.fixture(params=["in the loop", "ahead"])
def way(request, monkeypatch):
    if request.param == "ahead":
        decode_ahead(monkeypatch)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("columns", [1, 37, 64, 130])
def test_decoded_weights_are_those_of_the_format_bit_for_bit(dtype, kind, columns):
    weight = torch.randn(3, 37, columns, generator=torch.Generator().manual_seed(1))
    stored = quantize(weight.to(DEVICE), kind)
    out = torch.empty(3, 37, columns, dtype=dtype, device=DEVICE)
    codes.decode(stored, out)
    assert torch.equal(out, stored.dequantize(dtype))


def test_every_nf4_code_has_its_level():
    pairs = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 4, 64)
    scales = torch.ones(1, 4, 2, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(1, 4, 128, device=DEVICE)
    codes.decode(codes.Quantized(pairs, scales, 128), out)
    levels = torch.tensor(codes.NF4_LEVELS, device=DEVICE)
    byte = torch.arange(256, device=DEVICE)
    assert torch.equal(out.view(256, 2), torch.stack([levels[byte % 16], levels[byte // 16]], 1))


@pytest.mark.parametrize(
    ("dtype", "kinds"), [(DTYPES[0], KINDS[0]), *((dtype, KINDS[1]) for dtype in DTYPES)], ids=str
)
def test_every_value_and_gradient_is_as_exact_as_plain_torch_on_the_same_codes(dtype, kinds, way):
    case = with_fixed_routing(make_case(T=14, H=72, E=4, K=2, I=37, dtype=dtype))
    agree(coded(case, *kinds), "convex", save="recompute")


@pytest.mark.parametrize("mix", ["add", "convex"])
@pytest.mark.parametrize("kinds", [*KINDS, ("int8", "int8"), ("nf4", "nf4")], ids=str)
def test_a_shared_expert_in_codes_beside_plain_experts(kinds, mix, way):
    case = with_fixed_routing(make_case(T=14, H=72, E=4, K=2, I=20, shared_width=37))
    agree(coded_shared(case, *kinds), mix, save="preact" if mix == "add" else "recompute")


def test_shared_and_routed_experts_in_codes_of_different_kinds(way):
    case = with_fixed_routing(make_case(T=9, H=37, E=4, K=2, I=21, shared_width=65, shared="plain"))
    agree(coded_shared(coded(case, "nf4", "nf4"), "int8", "int8"))


@pytest.mark.parametrize(
    ("kinds", "sizes"),
    [
        (("nf4", "int8"), {"T": 1, "H": 24, "I": 12}),
        (("nf4", "nf4"), {"T": 9, "H": 37, "I": 65, "E": 3, "K": 1}),
        (("int8", "int8"), {"T": 9, "H": 37, "I": 65, "E": 3, "K": 1}),
        (("nf4", "nf4"), {"T": 18, "H": 130, "I": 64, "E": 4, "K": 2}),
        (("int8", "nf4"), {"T": 2, "E": 20, "K": 3, "H": 7, "I": 5}),
    ],
    ids=str,
)
def test_odd_sizes(kinds, sizes, way):
    agree(coded(make_case(**sizes), *kinds), save="preact")


def test_all_tokens_on_one_expert_and_none_on_the_others(way):
    case = make_case(T=20, E=5)
    agree(replace(coded(case, "nf4", "int8"), router=Routed(torch.full((20, 1), 3), torch.rand(20, 1))))


def test_slots_that_another_rank_serves_are_skipped(way):
    some = torch.tensor([[3, 5], [5, 5], [0, 1], [5, 4]]).repeat(5, 1)
    agree(replace(coded(make_case(T=20, E=5)), router=Routed(some, torch.rand(20, 2))), "convex")


@pytest.mark.parametrize(("gate_up", "down"), [(None, "nf4"), ("int8", None)])
def test_one_plain_weight_beside_a_quantised_one_still_trains(gate_up, down, way):
    agree(coded(make_case(T=13), gate_up, down))


def test_no_tokens_give_zero_gradients(way):
    got = run(to_device(coded(make_case(T=0))), backend="triton")
    assert got["y"].shape == (0, 24) and all((g == 0).all() for g in got.values())


def test_codes_and_scales_are_read_with_the_strides_they_are_stored_with(way):
    case = to_device(coded(make_case(T=11), "int8", "nf4"))

    def strided(weight):
        every_other = torch.stack([weight.codes, weight.codes], 1)[:, 1]
        wide = torch.stack([weight.scales, weight.scales], -1)[..., 0]
        return replace(weight, codes=every_other, scales=wide)

    spread = Experts(strided(case.experts.gate_up), strided(case.experts.down))
    assert not spread.down.codes.is_contiguous() and not spread.down.scales.is_contiguous()
    agree(replace(case, experts=spread))


def test_parts_of_any_size_give_the_same_layer(monkeypatch):
    case = to_device(coded(make_case(T=19, E=7, K=3, personal=False, shared="none")))
    whole = run(case, backend="triton")
    for experts_at_a_time in (1, 3, 4):
        decode_ahead(monkeypatch, experts_at_a_time * 2 * 12 * 24 * 4)
        assert codes.staged_experts(case.experts.gate_up, 4) == experts_at_a_time
        for name, got in run(case, backend="triton").items():
            torch.testing.assert_close(got, whole[name], rtol=1e-4, atol=1e-5, msg=name)


def test_parts_are_few_and_as_even_as_they_can_be(monkeypatch):
    monkeypatch.setattr(codes, "STAGED_BYTES", 11 * 8 * 16 * 2)
    weight = quantize(torch.randn(60, 8, 16), "nf4")
    # 11 fit, so six parts are the fewest, of ten.
    assert codes.staged_experts(weight, 2) == 10 and codes.staged_experts(weight[:9], 2) == 9
    assert codes.staged_experts(weight, 8) == 2 and codes.staged_experts(weight, 32) == 0


def test_two_runs_agree_bit_for_bit(way):
    case = to_device(coded(make_case(T=17, E=4, K=3, personal=False, shared="none"), "int8", "nf4"))
    first, second = run(case, backend="triton"), run(case, backend="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_buffer_ever_holds_all_experts(way, monkeypatch):
    if way == "ahead":
        decode_ahead(monkeypatch, 1 << 15)
    case = to_device(coded(make_case(T=3, H=32, E=20, K=2, I=32, personal=False, shared="none")))
    gate_up, down = case.experts.gate_up, case.experts.down
    ids, weights = torch.tensor([[0, 1]] * 3).int().to(DEVICE), torch.rand(3, 2).to(DEVICE)
    none = torch.empty(0, device=DEVICE)
    needs = [True, True] + [False] * 8
    with LargestTensor() as seen:
        flex_moe(case.x_TH, Routed(ids, weights), case.experts, backend="triton")
        experts_backward(
            *(torch.ones_like(case.x_TH), case.x_TH, ids, weights, gate_up.codes, down.codes),
            *(gate_up.scales, down.scales, *(None,) * 8, none, none, none, none.int()),
            *("add", needs),
        )
    bound = codes.STAGED_BYTES // 4 if way == "ahead" else 3 * 2 * 64
    assert 0 < seen.numel <= bound < down.shape.numel()


def test_an_expert_too_large_to_decode_ahead_is_decoded_in_the_loop(monkeypatch):
    x, plan = codegen.meta(8192, 4096), tiles.HOPPER[128]

    def weight(*shape):
        return codegen.quantised("nf4", *shape)

    small = weight(8, 2 * 1792, 4096), weight(8, 4096, 1792)
    large = weight(8, 2 * 14336, 4096), weight(8, 4096, 14336)
    assert codes.decodable(plan, small, x) is plan
    assert codes.decodable(plan, large, x).m <= codes.IN_LOOP_ROWS
    with pytest.raises(ValueError, match=r"one expert's matrix \[28672, 4096\] in torch.bfloat16 exceeds"):
        next(codes.pieces(large[0], dense(8, 128), plan.up, torch.bfloat16))


def test_plain_weights_keep_their_tile_and_their_one_launch():
    weight, groups, tile = torch.randn(2, 4, 8), dense(8, 128), tiles.HOPPER[128].up
    assert codes.suited(tile, weight) is tile
    assert list(codes.pieces(weight, groups, tile, torch.float32)) == [(weight, groups)]


@pytest.mark.parametrize("plans", [tiles.AMPERE, tiles.HOPPER, tiles.FLOAT32], ids=["80", "90", "float32"])
def test_tiles_that_decode_hold_one_group_of_columns_and_keep_their_rows(plans):
    weight = codegen.quantised("nf4", 8, 128, 64)
    for m, plan in plans.items():
        tile = codes.suited(plan.down, weight)
        assert tile.m == m
        if m <= codes.IN_LOOP_ROWS:
            assert max(tile.n, tile.k) <= 64 and not tile.tma
        else:
            assert (tile.n, tile.k, tile.tma) == (plan.down.n, plan.down.k, plan.down.tma) and tile.per_sm


def test_the_rows_of_some_experts_stay_in_their_places():
    offsets = torch.tensor([0, 5, 5, 37, 38], dtype=torch.int32, device=DEVICE)
    groups = grouped(offsets, torch.arange(40, dtype=torch.int32, device=DEVICE), 2, 16)
    part = groups.of_experts(2, 4)
    count = int(part.tile_count_1)
    assert part.rows == 40 and part.tile_bound == 40 // 16 + 2
    assert part.tile_expert_M[:count].tolist() == [0, 0, 1]
    assert part.tile_row_M[:count].tolist() == [5, 21, 37]
    with pytest.raises(ValueError, match="dense expert"):
        dense(8, 16).of_experts(0, 1)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are captured on a GPU")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_layer_can_be_captured_in_a_cuda_graph(kind, way):
    case = to_device(coded(make_case(T=64, H=64, I=64, E=8, dtype=torch.bfloat16), kind, kind))
    args = (case.x_TH, case.router, case.experts, case.personal, case.shared)
    want = flex_moe(*args, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flex_moe(*args, backend="triton")
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter's kernels cannot be traced")
def test_torch_compile_sees_one_graph(way):
    case = to_device(coded(make_case(T=64, H=64, I=64, E=8)))
    args = (case.x_TH, case.router, case.experts, case.personal, case.shared)
    compiled = torch.compile(lambda x: flex_moe(x, *args[1:], backend="triton"), fullgraph=True)
    torch.testing.assert_close(compiled(case.x_TH), flex_moe(*args, backend="triton"))
