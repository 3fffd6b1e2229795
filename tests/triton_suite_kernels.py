"""Each Triton kernel alone, against float64 products written out with loops; run by
test_triton_interpreter.py.

Letters: T tokens, H hidden, E experts, K chosen, I expert width, N = T*K rows in expert order.
"""

from dataclasses import replace

import pytest
import torch
from cases import assert_close
from triton_device import DEVICE, DTYPES, poisoned_memory

from flex_kernels import Router, reference
from flex_kernels.triton.combine import combine
from flex_kernels.triton.down_backward import down_backward
from flex_kernels.triton.grouped_gemm import grouped_gemm
from flex_kernels.triton.groups import copy_rows, dense, grouped, permute
from flex_kernels.triton.launch import described_rows
from flex_kernels.triton.route import route
from flex_kernels.triton.route_backward import route_backward
from flex_kernels.triton.score_grads import score_grads
from flex_kernels.triton.tiles import Tile, descriptor
from flex_kernels.triton.up_swiglu import up_swiglu
from flex_kernels.triton.weight_grad import weight_grad

pytestmark = pytest.mark.usefixtures(poisoned_memory.__name__)
POINTERS = Tile(16, 32, 32, group=2)
PERSISTENT = replace(POINTERS, per_sm=2)
DESCRIPTORS = replace(POINTERS, tma=True)
COPIED = replace(DESCRIPTORS, copy_rows=True)
TILES = {"pointers": POINTERS, "persistent": PERSISTENT, "descriptors": DESCRIPTORS, "copied": COPIED}
each_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.25).to(
        DEVICE, dtype
    )


class Rows:
    """T tokens of H features sent to K of E experts, of which number 2 gets none; id E is a skipped slot."""

    def __init__(self, T=23, H=48, E=5, I=40, K=2, dtype=torch.float32, skip=False):
        self.T, self.H, self.E, self.I, self.K, self.dtype = T, H, E, I, K, dtype
        generator = torch.Generator().manual_seed(3)
        others = [e for e in range(E + skip) if e != 2]
        self.ids_TK = (
            torch.tensor(others)[torch.rand(T, len(others), generator=generator).topk(K, dim=1).indices]
            .int()
            .to(DEVICE)
        )
        self.offsets_E1, self.order_N, self.inverse_N = permute(self.ids_TK, E)
        self.groups = grouped(self.offsets_E1, self.order_N, K, POINTERS.m)
        self.real = int(self.offsets_E1[-1])
        self.token_R = self.order_N[: self.real].long() // K
        self.expert_R = self.ids_TK.flatten()[self.order_N[: self.real].long()].long()
        self.x = normal(T, H, dtype=dtype)
        self.gate_up = normal(E, 2 * I, H, seed=1, dtype=dtype)
        self.down = normal(E, H, I, seed=2, dtype=dtype)

    def times(self, rows_R, w):
        """Row by row: rows[r] @ w[expert of r]^T."""
        return torch.stack([w[e] @ row for row, e in zip(rows_R, self.expert_R)])


def test_permute_sorts_slots_stably_and_puts_skipped_ones_last():
    ids_TK = torch.tensor([[2, 0], [4, 2], [0, 4], [3, 2]], dtype=torch.int32, device=DEVICE)
    offsets, order, inverse = permute(ids_TK, 4)
    assert offsets.tolist() == [0, 2, 2, 5, 6]
    assert order.tolist()[:6] == [1, 4, 0, 3, 7, 6]
    assert inverse.tolist() == [2, 0, -1, 3, 1, -1, 5, 4]
    assert {offsets.dtype, order.dtype, inverse.dtype} == {torch.int32}


def test_the_tile_table_never_crosses_from_one_expert_to_the_next():
    offsets = torch.tensor([0, 5, 5, 37, 38], dtype=torch.int32, device=DEVICE)
    groups = grouped(offsets, torch.arange(40, dtype=torch.int32, device=DEVICE), 2, 16)
    count = int(groups.tile_count_1)
    assert count == 4 <= groups.tile_bound == 40 // 16 + 4
    assert groups.tile_expert_M[:count].tolist() == [0, 2, 2, 3]
    assert groups.tile_row_M[:count].tolist() == [0, 5, 21, 37]


@pytest.mark.parametrize(("E", "N"), [(60, 7), (1, 300), (7, 1)])
def test_the_bound_of_the_tile_table_holds_for_the_most_uneven_loads(E, N):
    for counts in (
        [N] + [0] * (E - 1),
        [1] * min(E, N - 1) + [0] * (E - min(E, N - 1) - 1) + [N - min(E, N - 1)],
    ):
        counts = counts[:E] if sum(counts[:E]) == N else [N] + [0] * (E - 1)
        offsets = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
        groups = grouped(offsets, torch.arange(N, dtype=torch.int32, device=DEVICE), 1, 16)
        assert int(groups.tile_count_1) == sum(-(-c // 16) for c in counts) <= groups.tile_bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_tile
@pytest.mark.parametrize("skip", [False, True])
def test_up_swiglu_gathers_each_experts_rows(dtype, tile, skip):
    r = Rows(dtype=dtype, skip=skip)
    act, preact = up_swiglu(r.x, r.gate_up, r.groups, tile, True, True)
    exact_z = r.times(r.x.double()[r.token_R], r.gate_up.double())
    plain_z = r.times(r.x[r.token_R], r.gate_up)
    assert_close(preact[: r.real], exact_z, plain_z, 3, "Z")
    exact, plain = (torch.nn.functional.silu(z[:, : r.I]) * z[:, r.I :] for z in (exact_z, plain_z))
    assert_close(act[: r.real], exact, plain, 3, "A")


def test_up_swiglu_writes_only_what_is_wanted():
    r = Rows()
    act, preact = up_swiglu(r.x, r.gate_up, r.groups, POINTERS, True, True)
    only_act, no_preact = up_swiglu(r.x, r.gate_up, r.groups, POINTERS, True, False)
    no_act, only_preact = up_swiglu(r.x, r.gate_up, r.groups, POINTERS, False, True)
    assert torch.equal(act, only_act) and torch.equal(preact, only_preact)
    assert no_act.numel() == no_preact.numel() == 0


@pytest.mark.parametrize("skip", [False, True])
def test_copied_rows_are_the_tokens_in_expert_order(skip):
    r = Rows(H=300, skip=skip)
    copied = copy_rows(r.x, r.groups)
    assert copied.shape == (r.T * r.K, 300)
    assert torch.equal(copied[: r.real], r.x[r.token_R])


def test_rows_come_through_a_descriptor_where_no_gather_is_needed():
    r = Rows()
    assert described_rows(r.x, r.groups, DESCRIPTORS) is None
    assert described_rows(r.x, dense(r.T, 16), POINTERS) is None
    assert described_rows(r.x, dense(r.T, 16), DESCRIPTORS).base is r.x
    assert described_rows(r.x, r.groups, COPIED).shape == [r.T * r.K, r.H]
    odd = normal(r.T, r.H + 1)
    assert described_rows(odd, r.groups, COPIED) is None, "rows are not multiples of 16 bytes"


@each_tile
@pytest.mark.parametrize(("H", "I"), [(33, 7), (64, 32), (17, 65), (40, 72)])
def test_a_dense_expert_owns_every_token_at_any_size(H, I, tile):
    x, gate_up = normal(19, H), normal(1, 2 * I, H, seed=1)
    act, _ = up_swiglu(x, gate_up, dense(19, 16), tile, True, False)
    z_TI, u_TI = (x.double() @ gate_up[0].double().T).chunk(2, 1)
    plain_z, plain_u = (x @ gate_up[0].T).chunk(2, 1)
    assert_close(
        act, torch.nn.functional.silu(z_TI) * u_TI, torch.nn.functional.silu(plain_z) * plain_u, 3, "A"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_tile
def test_grouped_gemm_takes_weights_stored_either_way(dtype, tile):
    r = Rows(dtype=dtype, skip=True)
    act, preact = normal(r.T * r.K, r.I, dtype=dtype), normal(r.T * r.K, 2 * r.I, dtype=dtype)
    for a, w, out_first in ((act, r.down, True), (preact, r.gate_up, False)):
        got = grouped_gemm(a, w, out_first, r.groups, tile)
        by_row = w if out_first else w.transpose(1, 2)
        exact = r.times(a.double()[: r.real], by_row.double())
        assert_close(got[: r.real], exact, r.times(a[: r.real], by_row), 3, f"out_first={out_first}")


def test_a_descriptor_is_refused_where_the_copy_engine_cannot_address_the_weights():
    assert descriptor(normal(2, 16, 8), (1, 16, 8)) is not None
    assert descriptor(normal(2, 16, 7), (1, 16, 8)) is None, "rows are not multiples of 16 bytes"
    assert descriptor(normal(2, 16, 8).transpose(1, 2), (1, 8, 16)) is None, "the last dimension is not dense"
    assert descriptor(normal(2, 16, 9)[:, :, 1:], (1, 16, 8)) is None, "the start is not aligned"
    assert descriptor(normal(0, 16, 8), (1, 16, 8)) is None, "there is nothing to describe"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_tile
@pytest.mark.parametrize("damped", [False, True])
def test_down_backward_has_the_gradients_of_autograd(dtype, tile, damped):
    r = Rows(dtype=dtype, skip=True)
    dy, z = normal(r.T, r.H, seed=9, dtype=dtype), normal(r.T * r.K, 2 * r.I, dtype=dtype)
    score = torch.rand(r.T, r.K, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gate = torch.rand(r.T, generator=torch.Generator().manual_seed(2)).to(DEVICE) if damped else None

    def autograd(kind):
        z_ = z[: r.real].to(kind).requires_grad_()
        c_ = score.flatten()[r.order_N[: r.real].long()].to(kind)
        c_ = (c_ * (1 - gate[r.token_R].to(kind)) if damped else c_).requires_grad_()
        act = torch.nn.functional.silu(z_[:, : r.I]) * z_[:, r.I :]
        out = c_[:, None] * r.times(act, r.down.to(kind))
        return *torch.autograd.grad(out, (z_, c_), dy[r.token_R].to(kind)), (c_[:, None] * act).detach()

    got_dz, got_act, got_parts = down_backward(dy, r.down, z, r.groups, tile, score, gate, True, True, True)
    assert got_parts.shape == (2, r.T * r.K), "40 columns in tiles of 32"
    found = {"dZ": got_dz, "dS": got_parts.sum(0), "c A": got_act}
    for (name, got), exact, plain in zip(found.items(), autograd(torch.float64), autograd(dtype)):
        assert_close(got[: r.real], exact, plain, 3, name)


@each_tile
@pytest.mark.parametrize(("H", "I"), [(33, 7), (64, 32), (40, 72)])
def test_down_backward_of_a_dense_expert_has_the_gradients_of_autograd(H, I, tile):
    dy, z, down = normal(19, H), normal(19, 2 * I), normal(1, H, I)
    gate = torch.rand(19, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def autograd(kind):
        z_, g_ = (t.to(kind).requires_grad_() for t in (z, gate))
        act = torch.nn.functional.silu(z_[:, :I]) * z_[:, I:]
        return torch.autograd.grad(g_[:, None] * (act @ down[0].to(kind).T), (z_, g_), dy.to(kind))

    got_dz, _, got_parts = down_backward(dy, down, z, dense(19, 16), tile, gate, None, True, False, True)
    found = {"dZ": got_dz, "dS": got_parts.sum(0)}
    for (name, got), exact, plain in zip(found.items(), autograd(torch.float64), autograd(z.dtype)):
        assert_close(got, exact, plain, 3, name)


@pytest.mark.parametrize("mix", ["add", "convex"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_is_the_layers_last_equation(mix, dtype):
    r = Rows(H=70, skip=True, dtype=dtype)
    y, shared, personal = (normal(n, 70, seed=n, dtype=dtype) for n in (r.T * r.K, r.T, r.T))
    w, g, s = normal(r.T, r.K), torch.sigmoid(normal(r.T)), torch.sigmoid(normal(r.T, seed=1))
    inverse_TK = r.inverse_N.view(r.T, r.K)
    got = combine(y, inverse_TK, w, personal, g, shared, s, mix)
    want = torch.zeros(r.T, 70, dtype=torch.float64, device=DEVICE)
    for t in range(r.T):
        for k in range(r.K):
            if inverse_TK[t, k] >= 0:
                want[t] += w[t, k].double() * y[inverse_TK[t, k]].double()
    want += s[:, None].double() * shared.double()
    want = (want if mix == "add" else (1 - g[:, None].double()) * want) + g[
        :, None
    ].double() * personal.double()
    assert_close(got, want, want.to(dtype), 3, "y")


def test_combine_without_factors_adds_rows_up():
    y = normal(4, 16)
    inverse_TK = torch.tensor([[1, 3], [-1, 0]], dtype=torch.int32, device=DEVICE)
    extra = normal(2, 16)
    got = combine(y, inverse_TK, None, extra, None, None, None, "add")
    torch.testing.assert_close(got, torch.stack([y[1] + y[3], y[0]]) + extra)


@pytest.mark.parametrize("mix", ["add", "convex"])
@pytest.mark.parametrize("gated", [False, True])
def test_score_grads_follow_the_equations(mix, gated):
    r = Rows(T=70, skip=True)
    inverse_TK = r.inverse_N.view(r.T, r.K)
    routed, own, common = normal(3, r.T * r.K), normal(2, r.T), normal(4, r.T)
    w, g, s = normal(r.T, r.K), torch.sigmoid(normal(r.T)), torch.sigmoid(normal(r.T, seed=1))
    got = score_grads(routed, inverse_TK, w, own, g, common, s if gated else None, mix, True, True, gated)
    ds_TK = torch.where(inverse_TK >= 0, routed.double().sum(0)[inverse_TK.long()], 0.0)
    rest = (ds_TK * w).sum(1) + common.double().sum(0) * (s if gated else 1.0)
    damp = 1 - g.double() if mix == "convex" else torch.ones_like(g, dtype=torch.float64)
    dg = own.double().sum(0) - (rest if mix == "convex" else 0.0)
    wanted = [damp[:, None] * ds_TK, dg] + ([damp * common.double().sum(0)] if gated else [])
    for mine, want in zip(got, wanted):
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)


def test_the_gate_of_a_convex_mix_takes_from_the_routed_sum_without_a_personal_expert():
    r = Rows(T=70, skip=True)
    inverse_TK = r.inverse_N.view(r.T, r.K)
    routed, w, g = normal(3, r.T * r.K), normal(r.T, r.K), torch.sigmoid(normal(r.T))
    _, got, _ = score_grads(routed, inverse_TK, w, None, g, None, None, "convex", False, True, False)
    ds_TK = torch.where(inverse_TK >= 0, routed.double().sum(0)[inverse_TK.long()], 0.0)
    torch.testing.assert_close(got.double(), -(ds_TK * w).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_grad_sums_over_each_experts_rows(dtype):
    r = Rows(dtype=dtype, skip=True)
    dz = normal(r.T * r.K, 2 * r.I, dtype=dtype)
    got = weight_grad(dz, False, r.x, True, r.groups)
    exact, plain = (
        torch.stack(
            [
                dz[: r.real][r.expert_R == e].to(kind).T @ r.x[r.token_R][r.expert_R == e].to(kind)
                for e in range(r.E)
            ]
        )
        for kind in (torch.float64, dtype)
    )
    assert_close(got, exact, plain, 3, "dW")
    assert (got[2] == 0).all(), "expert 2 has no rows"


def routed(x, router, **options):
    none = torch.empty(0, x.shape[1], device=DEVICE), torch.empty(0, device=DEVICE)
    settings = (router.top_k, router.normalize, router.score, router.scale)
    return route(x, router.weight, router.bias, *none, *settings, options.get("want_logits", False))


@pytest.mark.parametrize(
    "router",
    [
        Router(normal(60, 33), 6),
        Router(normal(16, 33), 16, normalize=True),
        Router(normal(1, 33), 1, scale=2.5),
        Router(normal(9, 33), 4, normalize=True, score="sigmoid", scale=1.5, bias=normal(9)),
    ],
    ids=["60-6", "all-of-16", "one", "biased-sigmoid"],
)
def test_route_chooses_and_weighs_like_the_reference(router):
    x = normal(21, 33)
    ids, weights, _, logits = routed(x, router, want_logits=True)
    want_ids, want_weights, want_logits = reference.route(x, router)
    assert torch.equal(ids.long(), want_ids)
    torch.testing.assert_close(weights, want_weights)
    torch.testing.assert_close(logits, want_logits)


def test_ties_go_to_the_lowest_index():
    router = Router(torch.zeros(11, 16, device=DEVICE), 4)
    ids, weights, _, _ = routed(normal(3, 16), router)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 11))


def test_a_nan_input_shows_in_the_weights_and_keeps_ids_in_range():
    x = normal(3, 16)
    x[1] = float("nan")
    ids, weights, _, _ = routed(x, Router(normal(5, 16), 3))
    assert ids.min() >= 0 and ids.max() < 5 and all(len(set(row)) == 3 for row in ids.tolist())
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gates", [1, 2])
def test_gates_are_sigmoids_with_or_without_a_router(gates):
    x, w, b = normal(20, 40), normal(gates, 40), normal(gates)
    for weight, k in ((torch.empty(0, 40, device=DEVICE), 0), (normal(5, 40), 2)):
        _, _, got, _ = route(x, weight, None, w, b, k, False, "softmax", 1.0, False)
        torch.testing.assert_close(
            got.double(), torch.sigmoid(w.double() @ x.double().T + b.double()[:, None])
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("score", "normalize", "E", "K", "G"),
    [
        ("softmax", False, 60, 4, 2),
        ("softmax", True, 9, 9, 1),
        ("sigmoid", True, 7, 2, 0),
        ("sigmoid", False, 5, 3, 1),
        ("softmax", False, 0, 0, 2),
    ],
)
@pytest.mark.parametrize("has_other", [False, True])
def test_route_backward_has_the_gradients_of_autograd(has_other, dtype, score, normalize, E, K, G):
    T, H, scale = 37, 72, 1.5
    x, weight, gate_weight = normal(T, H, dtype=dtype), normal(E, H, seed=1, dtype=dtype), normal(G, H)
    dw, dlogits = normal(T, K, seed=2), normal(T, E, seed=3) if E == 60 else normal(0, E)
    dgates = normal(G, T, seed=4)
    gates = torch.sigmoid(gate_weight @ x.float().T)
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(5))
    ids = scores.topk(K, dim=1).indices.int().to(DEVICE)
    other = normal(T, H, seed=6, dtype=dtype) if has_other else None

    def autograd(kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, weight, gate_weight)]
        bias = torch.zeros(G, dtype=kind, device=DEVICE).requires_grad_()
        logits = leaves[0] @ leaves[1].T
        s = (logits.softmax(-1) if score == "softmax" else logits.sigmoid()).gather(1, ids.long())
        w = scale * (s / s.sum(-1, keepdim=True) if normalize else s)
        g = torch.sigmoid(leaves[2] @ leaves[0].T + bias[:, None])
        loss = (w * dw.to(kind)).sum() + (g * dgates.to(kind)).sum()
        if dlogits.numel():
            loss = loss + (logits * dlogits.to(kind)).sum()
        if has_other:
            loss = loss + (leaves[0] * other.to(kind)).sum()
        return torch.autograd.grad(loss, (*leaves, bias))

    saved = x, weight, gate_weight, ids, dw, gates
    got = route_backward(dw, dgates, dlogits, *saved, normalize, score, scale, [True] * 4, other)
    names = ("dx", "d weight", "d gate weight", "d gate bias")
    for name, mine, exact, plain in zip(names, got, autograd(torch.float64), autograd(dtype)):
        assert mine.shape == exact.shape, name
        if mine.numel():
            assert_close(mine, exact, plain, 3, name)


def test_route_backward_computes_only_what_is_needed():
    x, weight, gate_weight = normal(5, 16), normal(4, 16), normal(1, 16)
    ids = torch.tensor([[0, 1]] * 5, dtype=torch.int32, device=DEVICE)
    saved = x, weight, gate_weight, ids, normal(5, 2), torch.sigmoid(normal(1, 5))
    grads = normal(5, 2, seed=1), normal(1, 5, seed=2), normal(0, 4)
    every = route_backward(*grads, *saved, False, "softmax", 1.0, [True] * 4)
    for i in range(4):
        found = route_backward(*grads, *saved, False, "softmax", 1.0, [j == i for j in range(4)])
        assert torch.equal(found[i], every[i])
        assert not any(found[j].numel() for j in range(4) if j != i)


def test_the_gradient_of_z_may_take_the_place_of_z():
    r = Rows(skip=True)
    dy, z = normal(r.T, r.H, seed=9), normal(r.T * r.K, 2 * r.I)
    rest = r.groups, POINTERS, torch.rand(r.T, r.K).to(DEVICE), None, True, True, True
    want = down_backward(dy, r.down, z, *rest)
    got = down_backward(dy, r.down, z, *rest, overwrite=True)
    assert got[0].data_ptr() == z.data_ptr()
    assert all(torch.equal(a[..., : r.real, :], b[..., : r.real, :]) for a, b in zip(got[:2], want[:2]))
    assert torch.equal(got[2][:, : r.real], want[2][:, : r.real])
