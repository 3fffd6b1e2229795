"""Codes and scales: what they stand for, how they are chosen, and what is refused.

Letters: E experts, R rows, C columns of a weight, H hidden, I expert width.
"""

from dataclasses import replace

import pytest
import torch
from cases import make_case

from flex_kernels import Experts, FlexMoE, Quantized, Shared, flex_moe
from flex_kernels import quantize as quantizing
from flex_kernels.cpu import fallback, ops
from flex_kernels.quantize import GROUP_COLUMNS, NF4_LEVELS, quantize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_int8_codes_stand_for_code_times_the_scale_of_the_row():
    codes = torch.tensor([[[-127, 0, 5], [1, 2, 127]]], dtype=torch.int8)
    weight = Quantized(codes, torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16), 3)
    assert weight.dequantize().tolist() == [[[-63.5, 0.0, 2.5], [0.25, 0.5, 31.75]]]
    assert (weight.kind, weight.shape) == ("int8", (1, 2, 3))


def test_nf4_codes_stand_for_levels_times_the_scale_of_their_group():
    # Columns 0 and 1 in the low and high half of the first byte; column 64 begins the second group.
    codes = torch.zeros(1, 33, dtype=torch.uint8)
    codes[0, 0], codes[0, 32] = 0xF0, 0x9E
    weight = Quantized(codes, torch.tensor([[2.0, 4.0]], dtype=torch.bfloat16), 65)
    row = weight.dequantize()[0].tolist()
    assert row[:3] == [-2.0, 2.0, -2.0]
    assert len(row) == 65 and row[64] == 4 * 0.72265625
    assert (weight.kind, weight.shape) == ("nf4", (1, 65))


def test_levels_are_those_of_qlora_rounded_to_bfloat16():
    # arXiv 2305.14314, appendix E.
    published = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
    assert torch.tensor(published).bfloat16().float().tolist() == list(NF4_LEVELS)


@pytest.mark.skipif(ops.kernels is fallback, reason="the native extension is not built")
def test_the_native_kernels_know_the_same_levels_and_groups():
    from flex_kernels.cpu.native import _cpu_ops

    assert list(NF4_LEVELS) == _cpu_ops.NF4_LEVELS
    assert _cpu_ops.GROUP_COLUMNS == GROUP_COLUMNS


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 130])
def test_every_nf4_code_is_the_nearest_level(columns):
    weight_RC = normal(7, columns)
    got = quantize(weight_RC, "nf4")
    scales_RC = got.scales.double().repeat_interleave(64, dim=-1)[:, :columns]
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    candidates = levels * scales_RC[..., None]
    best = (candidates - weight_RC.double()[..., None]).abs().amin(-1)
    assert torch.equal((got.dequantize(torch.float64) - weight_RC).abs(), best)


@pytest.mark.parametrize("columns", [1, 64, 77])
def test_int8_is_off_by_half_a_step_at_most(columns):
    weight_RC = normal(9, columns) * torch.logspace(-6, 3, 9)[:, None]
    got = quantize(weight_RC, "int8")
    error = (got.dequantize() - weight_RC).abs()
    # The scale was rounded to bfloat16: the largest of a row may be clipped by 1 / 256 of itself.
    clipped = weight_RC.abs() / 256
    assert (error <= torch.maximum(got.scales.float()[:, None] * 0.5001, clipped)).all()
    assert got.codes.abs().amax(-1).tolist() == [127 if columns else 0] * 9 or columns == 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_stay_zero(kind):
    weight = torch.zeros(2, 3, 70)
    weight[1, 2, 5] = 1e-3
    got = quantize(weight, kind).dequantize()
    assert not got[0].any() and not got[1, :2].any()
    torch.testing.assert_close(got[1, 2, 5].item(), 1e-3, rtol=1 / 256, atol=0)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_rounding_a_rounded_weight_again_changes_nothing(kind):
    once = quantize(normal(3, 5, 96), kind)
    again = quantize(once.dequantize(), kind)
    assert torch.equal(once.dequantize(), again.dequantize())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_pieces_of_rows_give_the_same_codes(kind, monkeypatch):
    weight = normal(3, 11, 50).transpose(0, 1)
    whole = quantize(weight, kind)
    monkeypatch.setattr(quantizing, "CHUNK", 120)
    pieces = quantize(weight, kind)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)


def test_bytes_held_are_those_of_codes_and_scales():
    weight = normal(4, 2816, 2048).bfloat16()
    assert quantize(weight, "int8").nbytes == 4 * 2816 * (2048 + 2)
    assert quantize(weight, "nf4").nbytes == 4 * 2816 * (1024 + 32 * 2)


def test_an_expert_is_read_back_alone():
    gate_up, down = normal(3, 10, 70), normal(3, 70, 5)
    experts = Experts.quantize(gate_up, down, "nf4")
    one_gate_up, one_down = experts.expert(2, torch.bfloat16)
    assert torch.equal(one_gate_up, experts.gate_up.dequantize(torch.bfloat16)[2])
    assert torch.equal(one_down, experts.down.dequantize(torch.bfloat16)[2])
    assert experts.count == 3


@pytest.mark.parametrize(
    "weight, kind, error, message",
    [
        (torch.zeros(2, 2), "int4", ValueError, "kind='int4' is not one of 'int8', 'nf4'"),
        (
            torch.zeros(4),
            "int8",
            TypeError,
            r"weight must be a float tensor \[..., R, C\], got \[4\] torch.float32",
        ),
        (torch.zeros(2, 2, dtype=torch.int8), "nf4", TypeError, "got .* torch.int8"),
        ([[1.0]], "nf4", TypeError, "got list"),
        (
            torch.tensor([[1.0, float("nan")]]),
            "int8",
            ValueError,
            r"weight \[1, 2\] holds values that are not finite",
        ),
        (torch.tensor([[1.0, float("inf")]]), "nf4", ValueError, "not finite"),
    ],
)
def test_what_cannot_be_quantised_is_named(weight, kind, error, message):
    with pytest.raises(error, match=message):
        quantize(weight, kind)


def quantised_case(kind: str = "nf4", **sizes):
    case = make_case(**sizes)
    return replace(case, experts=Experts.quantize(case.experts.gate_up, case.experts.down, kind))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda q: replace(q, codes=q.codes.short()),
            TypeError,
            "experts.down must have int8 codes .* got codes",
        ),
        (lambda q: replace(q, scales=q.scales.float()), TypeError, "bfloat16 scales"),
        (lambda q: replace(q, codes=q.codes[:, :, 1:]), ValueError, "nf4 of 12 columns has codes .5, 24, 6."),
        (lambda q: replace(q, scales=q.scales[:, 1:]), ValueError, "scales .5, 24, 1., got"),
        (
            lambda q: replace(q, columns=14),
            ValueError,
            r"experts.down must be \[5, 24, 12\], got nf4 \[5, 24, 14\]",
        ),
        (lambda q: q[1:], ValueError, "experts.down must be"),
        (lambda q: q[0], ValueError, "experts.down must be"),
    ],
)
def test_codes_that_do_not_fit_are_named(change, error, message):
    case = quantised_case()
    experts = replace(case.experts, down=change(case.experts.down))
    with pytest.raises(error, match=message):
        flex_moe(case.x_TH, case.router, experts, case.personal, case.shared)


def test_codes_of_a_shared_expert_that_do_not_fit_are_named():
    case = quantised_case()
    shared = Shared.quantize(case.shared.gate_up, case.shared.down, "nf4")
    for changed, message in (
        (replace(shared, down=shared.down[1:]), r"shared.down must be \[24, 14\], got nf4 \[23, 14\]"),
        (replace(shared, gate_up=shared.gate_up[None]), r"shared.gate_up must be \[2\*I, 24\], got nf4"),
        (replace(shared, gate_up=replace(shared.gate_up, scales=shared.down.scales)), "nf4 of 24 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            flex_moe(case.x_TH, case.router, case.experts, None, changed)


def test_a_personal_expert_in_codes_is_refused():
    case = quantised_case()
    personal = replace(case.personal, down=quantize(case.personal.down, "int8"))
    with pytest.raises(TypeError, match=r"personal.down must be a tensor.* got int8"):
        flex_moe(case.x_TH, case.router, case.experts, personal)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_reference_computes_a_shared_expert_with_the_weights_that_codes_stand_for(kind):
    case = quantised_case(kind, T=9, H=70, I=33)
    gate_up, down, gate_weight = vars(case.shared).values()
    coded = Shared.quantize(gate_up, down, kind, gate_weight)
    plain = Shared(coded.gate_up.dequantize(), coded.down.dequantize(), gate_weight)
    got, want = (
        flex_moe(case.x_TH, case.router, case.experts, None, shared, backend="reference")
        for shared in (coded, plain)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_module_keeps_the_codes_of_a_shared_expert(kind):
    case = quantised_case(kind, H=70, I=33)
    gate_up, down, gate_weight = vars(case.shared).values()
    layer = FlexMoE(case.router, case.experts, Shared.quantize(gate_up, down, kind, gate_weight))
    assert {f"shared_{n}.{part}" for n in ("gate_up", "down") for part in ("codes", "scales")} <= set(
        layer.state_dict()
    )
    x = normal(5, 70)
    shared = Shared.quantize(gate_up, down, kind, gate_weight)
    assert torch.equal(layer(x), flex_moe(x, case.router, case.experts, None, shared))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_reference_computes_with_the_weights_that_codes_stand_for(kind):
    case = quantised_case(kind, T=9, H=70, I=33)
    plain = replace(case, experts=Experts(case.experts.gate_up.dequantize(), case.experts.down.dequantize()))
    got, want = (
        flex_moe(c.x_TH, c.router, c.experts, c.personal, c.shared, backend="reference")
        for c in (case, plain)
    )
    assert torch.equal(got, want)


def module(kind: str = "nf4") -> FlexMoE:
    case = quantised_case(kind, H=70, I=33)
    layer = FlexMoE(case.router, case.experts, case.shared)
    layer.personalize(3)
    return layer


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_module_saves_and_loads_its_codes(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    first, second = module(kind), module("int8" if kind == "nf4" else "nf4")
    state = {name: t.contiguous() for name, t in first.state_dict().items()}
    assert {"gate_up.codes", "gate_up.scales", "down.codes", "down.scales"} <= set(state)
    save_file(state, tmp_path / "layer.safetensors")
    with pytest.raises(RuntimeError, match=r"size mismatch for gate_up.codes"):
        second.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    fresh = module(kind)
    for t in fresh.state_dict().values():
        t.zero_()
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = normal(5, 70)
    assert torch.equal(fresh(x), first(x))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_change_of_dtype_leaves_codes_and_scales_alone(kind):
    layer = module(kind)
    before = layer.experts()
    layer.half().to(torch.bfloat16)
    after = layer.experts()
    assert torch.equal(before.down.scales, after.down.scales) and after.down.scales.dtype == torch.bfloat16
    assert torch.equal(before.gate_up.codes, after.gate_up.codes)
    assert layer(normal(4, 70).bfloat16()).dtype == torch.bfloat16


def test_a_personal_expert_starts_as_the_expert_that_the_codes_stand_for():
    layer = module()
    assert torch.equal(layer.personal.gate_up, layer.experts().gate_up.dequantize()[3])
    assert layer.personal.gate_up.requires_grad


def test_frozen_codes_are_no_parameters():
    names = [name for name, _ in module().named_parameters()]
    assert not any("codes" in name or "scales" in name for name in names)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_experts_work_under_autocast_compile_and_no_grad(kind):
    case = quantised_case(kind, T=6, H=70, I=33)
    args = (case.router, case.experts, case.personal, case.shared)
    want = flex_moe(case.x_TH, *args)
    compiled = torch.compile(lambda x: flex_moe(x, *args), fullgraph=True, backend="aot_eager")
    x = case.x_TH.clone().requires_grad_()
    y = compiled(x)
    assert torch.equal(y, want)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = flex_moe(case.x_TH, *args)
    assert low.dtype == torch.bfloat16
    assert (low.float() - want).norm() < 0.02 * want.norm()
