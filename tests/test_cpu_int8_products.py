"""Products of int8 with int8, where they are allowed: against the same rounding and plain float64 products.

Letters: T tokens, H hidden, E experts, K chosen, I expert width, N = T*K slots.
"""

import pytest
import torch
import torch.nn.functional as F

from flex_kernels import Experts, Personal, Routed, Router, Shared, allow_int8_products, cpu, flex_moe
from flex_kernels.cpu import ops
from flex_kernels.precision import int8_products_allowed
from flex_kernels.quantize import Quantized, quantize

GROUP = 128
ISAS = ops.kernels.isas() if hasattr(ops.kernels, "isas") else []
needs_vnni = pytest.mark.skipif("avx512" not in ISAS, reason="this processor or build does not multiply int8")


@pytest.fixture(params=[isa for isa in ("avx512", "amx") if isa in ISAS] or ["avx512"])
def allowed(request):
    """The permission, on kernels that use it."""
    ops.kernels.set_isa(request.param)
    allow_int8_products(True)
    yield
    allow_int8_products(False)
    ops.kernels.set_isa("auto")


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, k] float64 on the grid of their groups' scales."""
    columns = rows.shape[1]
    groups = F.pad(rows, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, groups / scale, 0.0).round()
    return (codes * scale).flatten(1)[:, :columns]


def as_int8(weight: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """What a weight is multiplied as: codes [R, C] float64 and the scales [R] of its rows. Of nf4: a row's
    largest scale over 127, and levels in whole numbers of that; what a group's are multiplied with is a whole
    number of sixteenths.
    """
    if weight.kind == "int8":
        return weight.codes.double(), weight.scales.double()
    largest_R1 = weight.scales.float().abs().amax(-1, keepdim=True)
    inverse_R1 = 127 / largest_R1.clamp(min=1e-30)
    levels = Quantized(weight.codes, torch.ones_like(weight.scales), weight.columns).dequantize().double()
    factors = (weight.scales.float() * inverse_R1 * 16).round().double().repeat_interleave(64, dim=-1)
    return (levels * factors[:, : weight.columns] / 16 + 0.5).floor(), 1 / inverse_R1[:, 0].double()


def exact(x_TH, routed, experts, dy_TH):
    """(y, dx, dweights) in float64; what is kept between products is rounded to x's dtype."""
    dtype, x_TH, dy_TH = x_TH.dtype, x_TH.detach().double(), dy_TH.double()
    weights_TK = routed.weights.detach().double()
    y_TH, dx_TH = torch.zeros_like(x_TH), torch.zeros_like(x_TH)
    dweights_TK = torch.zeros_like(weights_TK)
    for e in range(experts.count):
        t, k = (routed.ids == e).nonzero(as_tuple=True)
        if not len(t):
            continue
        (gate_up, gate_up_scale), (down, down_scale) = (
            as_int8(w[e]) for w in (experts.gate_up, experts.down)
        )
        gate, up = (rounded(x_TH[t]) @ gate_up.t() * gate_up_scale).chunk(2, dim=1)
        sig = torch.sigmoid(gate)
        a = gate * sig * up
        y_TH.index_add_(
            0, t, weights_TK[t, k, None] * (rounded(a.to(dtype).double()) @ down.t() * down_scale)
        )
        da = rounded(dy_TH[t] * down_scale) @ down
        dweights_TK[t, k] = (da * a).sum(1)
        dgate = da * up * sig * (1 + gate * (1 - sig))
        dz = (weights_TK[t, k, None] * torch.cat([dgate, da * gate * sig], dim=1)).to(dtype).double()
        dx_TH.index_add_(0, t, rounded(dz * gate_up_scale) @ gate_up)
    return y_TH, dx_TH, dweights_TK


def layer(T: int, H: int, I: int, E: int, K: int, dtype: torch.dtype, kinds=("int8", "int8")):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x_TH = normal(T, H).to(dtype).requires_grad_()
    experts = Experts(
        *(
            quantize((normal(E, *s) * s[1] ** -0.5).to(dtype), kind)
            for s, kind in zip(((2 * I, H), (H, I)), kinds)
        )
    )
    ids_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    routed = Routed(ids_TK, torch.rand(T, K, generator=generator).requires_grad_())
    return x_TH, routed, experts, normal(T, H).to(dtype)


def results(x_TH, routed, experts, dy_TH, save="recompute"):
    y_TH = flex_moe(x_TH, routed, experts, save=save, backend="cpu")
    return y_TH.detach(), *torch.autograd.grad(y_TH, [x_TH, routed.weights], dy_TH)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


# Rows an expert on either side of eight and twelve, widths on either side of 64, 128, 256 and 2,048.
SIZES = [
    (1, 64, 32, 2, 1),
    (5, 63, 65, 3, 2),
    (40, 200, 72, 4, 2),
    (3, 577, 131, 4, 2),
    (150, 300, 257, 2, 1),
    (16, 129, 33, 2, 1),
    (20, 2200, 40, 2, 2),
    (300, 70, 1100, 1, 1),
]
KINDS = [("int8", "int8"), ("nf4", "nf4"), ("int8", "nf4"), ("nf4", "int8")]


@needs_vnni
@pytest.mark.parametrize("save", ["recompute", "preact"])
@pytest.mark.parametrize("T, H, I, E, K", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_results_are_those_of_the_rounded_operands(allowed, kinds, dtype, T, H, I, E, K, save):
    case = layer(T, H, I, E, K, dtype, kinds)
    # A row that lies between two codes may be rounded either way, more often where it is kept in 16 bits
    # first: 1.3 to 2 per cent is what rounding itself changes.
    tolerance = 2e-3 if dtype == torch.float32 else 1.2e-2
    for name, got, want in zip(("y", "dx", "dweights"), results(*case, save=save), exact(*case)):
        assert relative(got, want) < tolerance, name


@needs_vnni
@pytest.mark.parametrize("T", [4, 40])
def test_scales_of_nf4_may_be_zero_negative_and_far_apart(allowed, T):
    x_TH, routed, experts, dy_TH = layer(T, 300, 200, 2, 1, torch.float32, ("nf4", "nf4"))
    for weight in (experts.gate_up, experts.down):
        weight.scales[:, 0] = 0
        weight.scales[:, 1, 1] *= 1000
        weight.scales[:, 2:7] *= -1
        weight.scales[:, 7] *= 1e-30
    case = x_TH, routed, experts, dy_TH
    for name, got, want in zip(("y", "dx", "dweights"), results(*case), exact(*case)):
        assert relative(got, want) < 2e-3, name


@needs_vnni
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_rounding_changes_results_only_where_it_is_allowed(allowed, kind):
    case = layer(40, 200, 72, 4, 2, torch.float32, (kind, kind))
    with_int8 = results(*case)
    assert "int8 products" in cpu.describe()
    allow_int8_products(False)
    without = results(*case)
    assert "int8 products" not in cpu.describe()
    for got, plain in zip(with_int8, without):
        assert 0.005 < relative(got, plain.double()) < 0.03


@needs_vnni
@pytest.mark.parametrize("kinds", [("nf4", None), (None, "int8"), (None, None)], ids=str)
def test_other_experts_are_left_as_they_are(allowed, kinds):
    x_TH, routed, experts, dy_TH = layer(30, 128, 64, 3, 2, torch.bfloat16)
    weights = (w.dequantize(torch.bfloat16) for w in (experts.gate_up, experts.down))
    others = Experts(*(w if kind is None else quantize(w, kind) for w, kind in zip(weights, kinds)))
    found = results(x_TH, routed, others, dy_TH)
    allow_int8_products(False)
    assert all(torch.equal(a, b) for a, b in zip(found, results(x_TH, routed, others, dy_TH)))


@needs_vnni
@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_other_instruction_sets_take_no_notice(allowed, isa):
    if isa not in ops.kernels.isas():
        pytest.skip(f"{isa} cannot run here")
    ops.kernels.set_isa(isa)
    case = layer(30, 128, 64, 3, 2, torch.float32)
    found = results(*case)
    allow_int8_products(False)
    assert all(torch.equal(a, b) for a, b in zip(found, results(*case)))


@needs_vnni
def test_a_personal_expert_and_a_router_beside_them(allowed):
    x_TH, routed, experts, _ = layer(25, 128, 64, 3, 2, torch.float32)
    generator = torch.Generator().manual_seed(3)
    gate_up, down = (torch.randn(s, generator=generator) * 0.1 for s in ((96, 128), (128, 48)))
    personal = Personal(gate_up, down, torch.randn(128, generator=generator), torch.tensor(0.2))
    alone = flex_moe(x_TH, routed, experts, backend="cpu")
    both = flex_moe(x_TH, routed, experts, personal, backend="cpu")
    gate_T1 = torch.sigmoid(x_TH @ personal.gate_weight + personal.gate_bias)[:, None]
    gate, up = (x_TH @ gate_up.t()).chunk(2, dim=1)
    torch.testing.assert_close(both - alone, gate_T1 * ((F.silu(gate) * up) @ down.t()), atol=1e-4, rtol=1e-3)
    router = Router(torch.randn(3, 128, generator=generator), top_k=2)
    assert flex_moe(x_TH, router, experts, personal, backend="cpu").isfinite().all()


@needs_vnni
@pytest.mark.parametrize("T", [9, 70])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bits_do_not_depend_on_the_number_of_threads(allowed, kind, T):
    case = layer(T, 300, 200, 3, 2, torch.bfloat16, (kind, kind))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(results(*case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_vnni
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_is_not_finite_stays_visible_in_its_rows_alone(allowed, kind, bad):
    x_TH, routed, experts, dy_TH = layer(20, 300, 40, 2, 1, torch.bfloat16, (kind, kind))
    clean = results(x_TH, routed, experts, dy_TH)[0]
    with torch.no_grad():
        x_TH[7, 200] = bad
    y_TH = results(x_TH, routed, experts, dy_TH)[0]
    assert not y_TH[7].isfinite().any()
    others = torch.arange(20) != 7
    assert torch.equal(y_TH[others], clean[others])


@needs_vnni
def test_rows_of_zeros_give_zeros(allowed):
    x_TH, routed, experts, dy_TH = layer(20, 128, 64, 2, 1, torch.float32)
    with torch.no_grad():
        x_TH[3] = 0
    y_TH, dx_TH, _ = results(x_TH, routed, experts, dy_TH)
    assert (y_TH[3] == 0).all() and dx_TH.isfinite().all()


def test_the_permission_is_a_bool_and_off_at_first():
    assert not int8_products_allowed()
    with pytest.raises(TypeError, match="allowed must be True or False, got 1"):
        allow_int8_products(1)


@needs_vnni
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("T", [1, 6, 40, 200])
def test_a_shared_expert_is_multiplied_as_a_routed_one_that_every_token_chose(allowed, T, kind):
    generator = torch.Generator().manual_seed(T)
    sizes = (1, 600, 200), (1, 200, 300)
    gate_up, down = (torch.randn(s, generator=generator) * s[-1] ** -0.5 for s in sizes)
    x_TH, dy_TH = (torch.randn(T, 200, generator=generator).bfloat16() for _ in "xy")
    nobody, everyone = torch.full((T, 1), 1), torch.zeros(T, 1, dtype=torch.int64)
    experts, shared = Experts.quantize(gate_up, down, kind), Shared.quantize(gate_up[0], down[0], kind)
    found = []
    for ids, extra in ((nobody, shared), (everyone, None)):
        x = x_TH.clone().requires_grad_()
        y = flex_moe(x, Routed(ids, torch.ones(T, 1)), experts, shared=extra, backend="cpu")
        found.append((y, *torch.autograd.grad(y, x, dy_TH)))
    assert all(torch.equal(got, want) for got, want in zip(*found))
