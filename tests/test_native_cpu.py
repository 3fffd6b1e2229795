"""The native CPU kernels one by one, on every instruction set of this machine, against plain torch in
float64.

Letters: T tokens, H hidden, E experts, K chosen, I expert width, N = T*K rows, n rows of one block.
"""

from array import array

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close

native = pytest.importorskip("flex_kernels.cpu.native", reason="the native extension is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=native.isas())
def isa(request):
    """Runs the test on one instruction set, then goes back to the best."""
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(ValueError, match="isa='sse9'"):
        native.set_isa("sse9")
    assert native.isa() == native.isas()[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 37])
def test_swiglu_rounds_once(isa, dtype, width):
    z = normal(5, 2 * width, dtype=dtype) * 3
    out = torch.empty(5, width, dtype=dtype)
    native.swiglu(z, out)
    gate, up = z.double().chunk(2, dim=-1)
    exact = F.silu(gate) * up
    assert_close(out, exact, exact.to(dtype), 1.0, "swiglu")


def test_swiglu_of_extreme_gates_saturates_without_overflow(isa):
    z = torch.tensor([[-1e30, -200.0, -0.0, 200.0, 1e30, 1.0, 1.0, 1.0, 1.0, 1.0]])
    out = torch.empty(1, 5)
    native.swiglu(z, out)
    torch.testing.assert_close(out[0, 1:4], torch.tensor([0.0, 0.0, 200.0]), atol=1e-30, rtol=1e-6)
    assert out[0, 4] == 1e30 and abs(out[0, 0]) < 1e-6


def test_what_is_not_a_number_stays_visible(isa):
    for dtype in DTYPES:
        out = torch.empty(1, 20, dtype=dtype)
        z = torch.ones(1, 40, dtype=dtype)
        z[0, 3] = z[0, 39] = float("nan")
        native.swiglu(z, out)
        assert torch.isnan(out).nonzero()[:, 1].tolist() == [3, 19]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_swiglu_backward_is_the_gradient_of_swiglu(isa, dtype, in_place):
    n, width = 6, 21
    z, da, scale = normal(n, 2 * width, dtype=dtype), normal(n, width, dtype=dtype, seed=1), torch.rand(n)
    leaf = z.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    a = F.silu(gate) * up
    (dz_exact,) = torch.autograd.grad(a, leaf, da.double() * scale.double()[:, None])
    z_in = z.clone()
    dz = z_in if in_place else torch.empty_like(z)
    dscale, scaled = torch.empty(n), torch.empty(n, width, dtype=dtype)
    native.swiglu_backward(z_in, da, scale, dz, dscale, scaled)
    for name, got, exact in [
        ("dz", dz, dz_exact),
        ("dscale", dscale, (da.double() * a).sum(-1)),
        ("scaled", scaled, scale.double()[:, None] * a),
    ]:
        assert_close(got, exact.detach(), exact.detach().to(got.dtype), 2.0, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_add_sums_every_row_of_a_token_in_float32(isa, dtype):
    rows, tokens = normal(4, 300, dtype=dtype), torch.tensor([2, 0, 2, 2], dtype=torch.int32)
    scale, out = torch.tensor([0.5, 2.0, -1.0, 3.0]), torch.ones(3, 300)
    native.scatter_add(rows, tokens, scale, out)
    exact = torch.ones(3, 300, dtype=torch.float64)
    exact.index_add_(0, tokens.long(), rows.double() * scale.double()[:, None])
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=1e-6)
    assert (out[1] == 1).all()


@pytest.fixture
def weight_gradient(isa):
    """native.weight_gradient and a scratch for it, where the instruction set has it."""
    if not native.has_weight_gradient():
        pytest.skip(f"{isa} leaves gradients of weights to torch")
    scratch = native.Scratch(1, native.BLOCK_ROWS)

    def call(left, right, out, accumulate=False):
        native.weight_gradient(left, right, out, accumulate, scratch)
        return out

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, A, B", [(1, 1, 1), (2, 3, 40), (31, 16, 33), (33, 17, 31), (300, 129, 70), (7, 300, 577)]
)
def test_weight_gradients_are_sums_of_float32(weight_gradient, dtype, n, A, B):
    left, right = normal(n, A, dtype=dtype), normal(n, B, dtype=dtype, seed=1)
    exact = left.double().t() @ right.double()
    # Each of n products and sums rounds to 2^-24 of what has been summed so far.
    bound = n * 2.0**-23 * (left.double().abs().t() @ right.double().abs()).max().item()
    out = weight_gradient(left, right, torch.full((A, B), float("nan")))
    torch.testing.assert_close(out.double(), exact, atol=bound, rtol=0)
    again = weight_gradient(left, right, out.clone(), accumulate=True)
    torch.testing.assert_close(again.double(), 2 * exact, atol=2 * bound, rtol=0)


def test_weight_gradients_of_no_rows(weight_gradient):
    left, right = torch.empty(0, 5), torch.empty(0, 6)
    assert weight_gradient(left, right, torch.full((5, 6), 3.0)).eq(0).all()
    assert weight_gradient(left, right, torch.full((5, 6), 3.0), accumulate=True).eq(3).all()


def test_weight_gradients_do_not_depend_on_the_number_of_threads(weight_gradient):
    left, right = normal(70, 300, dtype=torch.bfloat16), normal(70, 600, dtype=torch.bfloat16, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            scratch, out = native.Scratch(1, native.BLOCK_ROWS), torch.empty(300, 600)
            native.weight_gradient(left, right, out, False, scratch)
            found.append(out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, found[0]) for out in found)


def test_gather_rows_copies_bits():
    source = normal(5, 33, dtype=torch.bfloat16)
    tokens = torch.tensor([4, 4, 0], dtype=torch.int32)
    out = torch.empty(3, 33, dtype=torch.bfloat16)
    native.gather_rows(source, tokens, out)
    assert torch.equal(out, source[tokens.long()])


def test_a_tensor_of_the_wrong_shape_dtype_or_layout_never_reaches_a_kernel():
    z, out = torch.zeros(4, 6), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"z must be a dense \[4, 6\]"):
        native.swiglu(torch.zeros(4, 8), out)
    with pytest.raises(ValueError, match="out must be a dense"):
        native.swiglu(z, torch.zeros(3, 4).t())
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        native.swiglu(z.double(), out.double())
    with pytest.raises(ValueError, match="tokens must be a dense"):
        native.gather_rows(z, torch.zeros(2, dtype=torch.int64), torch.empty(2, 6))


def test_segments_are_laid_out_from_their_blocks():
    plain = [1000, 10, 64, 0, 0, 0, 0, 2000, 20, 32, 0, 0, 0, 0, 5]  # both weights and the width
    plain += [3000, 4, 4000, 4, 0, 0, 5000, 4, 6000, 2, 0, 0]  # tokens, scale, no preact, dscale, hidden
    plain += [0] * 10
    codes = [1100, 11, 64, 1500, 7, 3, 2, 2100, 21, 32, 2500, 8, 1, 2, 6]
    codes += [3100, 4, 4100, 4, 4500, 24, 5100, 4, 6100, 2, 7100, 2]
    codes += [8000, 128, 8500, 64, 9000, 4, 9500, 8, 9900, 3]
    blocks = array("q", plain + codes)
    # block, expert, first row, rows, elements of hidden rows before
    pieces = array("q", [1, 2, 10, 4, 0, 0, 1, 5, 3, 24, 1, 0, 20, 1, 39])
    table = native.lay_out_segments(blocks, pieces).tolist()
    # Of the rooms of a batch; seven rows and three inverses are before the third segment.
    first, third = [8000, 9000, 8500, 9500, 9900], [8896, 9028, 8948, 9556, 9912]
    assert table == [
        [1122, 64, 1514, 3, 2, 2142, 32, 2516, 1, 2, 6, 4, 3140, 4140, 6100, 4740, 5140, 7100, *first],
        [1010, 64, 0, 0, 0, 2020, 32, 0, 0, 0, 5, 3, 3020, 4020, 6048, 0, 5020, 0, 0, 0, 0, 0, 0],
        [1100, 64, 1500, 3, 2, 2100, 32, 2500, 1, 2, 6, 1, 3180, 4180, 6178, 4980, 5180, 7178, *third],
    ]
    with pytest.raises(ValueError, match="pieces and blocks must be of 5 and 37 words each, got 15 and 36"):
        native.lay_out_segments(blocks[:36], pieces)
