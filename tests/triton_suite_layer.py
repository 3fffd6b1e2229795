"""The whole layer on the Triton backend against the float64 reference; run by test_triton_interpreter.py.

On a machine with a GPU the kernels are compiled and run there; elsewhere Triton's interpreter runs them on
the CPU. It multiplies bfloat16 wrongly, so that type is left to the GPU.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from cases import LargestTensor, assert_close, make_case, with_fixed_routing
from triton_device import DEVICE, DTYPES, poisoned_memory, to_device

from flex_kernels import FlexMoE, Routed, backends, checkpoint_contexts, flex_moe
from flex_kernels.triton import experts, experts_backward, tiles

pytestmark = pytest.mark.usefixtures(poisoned_memory.__name__)
__all__ = ["poisoned_memory"]


def run(case, **options):
    case.requiring()
    y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    named = case.tensors()
    grads = torch.autograd.grad(y, list(named.values()), dy.to(y.device, y.dtype))
    return {"y": y.detach()} | {f"d {n}": g for n, g in zip(named, grads)}


def run_forward(case, backend="triton", **options):
    parts = case.router, case.experts, case.personal, case.shared
    return flex_moe(case.x_TH, *parts, backend=backend, **options)


def agree(case, mix="add", multiple=3.0, **options):
    case = to_device(case)
    exact = run(case.to(torch.float64), mix=mix, backend="reference")
    plain = run(case.to(case.x_TH.dtype), mix=mix, backend="reference")
    fused = run(case.to(case.x_TH.dtype), mix=mix, backend="triton", **options)
    for name, got in fused.items():
        assert_close(got, exact[name], plain[name], multiple, name)


def relative_distance(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mix", "save"), [("add", "recompute"), ("convex", "preact")])
def test_every_value_and_gradient_is_as_exact_as_plain_torch(dtype, mix, save):
    agree(with_fixed_routing(make_case(T=21, H=40, E=6, K=3, I=36, dtype=dtype)), mix, save=save)


@pytest.mark.parametrize(
    ("score", "normalize", "scale"), [("softmax", True, 1.0), ("sigmoid", True, 2.5), ("sigmoid", False, 1.0)]
)
def test_every_kind_of_router_has_the_reference_s_gradients(score, normalize, scale):
    agree(make_case(T=19, router={"score": score, "normalize": normalize, "scale": scale}))


@pytest.mark.parametrize(
    ("shared", "personal"), [("plain", True), ("plain", False), ("none", True), ("none", False)]
)
@pytest.mark.parametrize("mix", ["add", "convex"])
def test_every_combination_of_extra_experts(shared, personal, mix):
    agree(make_case(T=9, shared=shared, personal=personal), mix)


@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1},
        {"T": 2, "E": 60, "K": 6},
        {"T": 35, "H": 7, "I": 5, "E": 3, "K": 3},
        {"T": 17, "H": 65, "I": 33, "E": 7, "K": 1, "personal_width": 1},
    ],
    ids=str,
)
def test_odd_sizes(sizes):
    agree(make_case(**sizes), "convex")


def test_all_tokens_on_one_expert():
    case = make_case(T=20, E=5)
    agree(replace(case, router=Routed(torch.full((20, 1), 3), torch.rand(20, 1))))


@pytest.mark.parametrize("mix", ["add", "convex"])
def test_slots_that_another_rank_serves_are_skipped(mix):
    case = make_case(T=20, E=5)
    some = torch.tensor([[3, 5], [5, 5], [0, 1], [5, 4]]).repeat(5, 1)
    agree(replace(case, router=Routed(some, torch.rand(20, 2))), mix)


def test_a_layer_whose_every_slot_is_skipped_leaves_the_extra_experts():
    case = to_device(make_case(T=6, E=5))
    case = replace(case, router=Routed(torch.full((6, 2), 5, device=DEVICE), torch.rand(6, 2, device=DEVICE)))
    agree(case)


def test_no_tokens_give_zero_gradients_of_every_weight():
    got = run(to_device(make_case(T=0)), backend="triton")
    assert got["y"].shape == (0, 24)
    assert all((g == 0).all() for g in got.values())


def test_the_logits_are_the_reference_s():
    case = to_device(make_case(T=18))
    args = (case.x_TH, case.router, case.experts, case.personal, case.shared)
    _, want = flex_moe(*args, backend="reference", return_router_logits=True)
    _, got = flex_moe(*args, backend="triton", return_router_logits=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_wider_extra_experts_have_gradients_in_their_own_dtype(save):
    case = to_device(make_case(dtype=torch.float16))
    wide, half = to_device(make_case(dtype=torch.float32)), case.to(torch.float16)
    wide = replace(case, personal=wide.personal, shared=wide.shared)
    got = run(wide, save=save, backend="triton")
    want = run(half, save=save, backend="triton")
    assert relative_distance(got["y"], want["y"]) < 1e-2
    for name in ("personal.gate_up", "personal.down", "shared.gate_up", "shared.down"):
        assert got[f"d {name}"].dtype == torch.float32
        assert relative_distance(got[f"d {name}"], want[f"d {name}"]) < 2e-2, name


def test_weights_are_read_with_the_strides_they_are_stored_with():
    case = to_device(make_case(T=11))
    stored = replace(
        case.experts,
        gate_up=case.experts.gate_up.transpose(1, 2).contiguous().transpose(1, 2),
        down=torch.stack([case.experts.down, case.experts.down], 1)[:, 1],
    )
    assert not stored.gate_up.is_contiguous() and not stored.down.is_contiguous()
    agree(replace(case, experts=stored))


def test_two_runs_agree_bit_for_bit():
    case = to_device(make_case(T=17, E=4, K=3))
    first, second = run(case, backend="triton"), run(case, backend="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("train", [False, True])
def test_frozen_experts_get_no_buffer_of_their_size(train):
    case = to_device(make_case(T=3, H=32, E=40, K=2, I=32, personal=False, shared="none"))
    ids, weights = torch.tensor([[0, 1]] * 3).int().to(DEVICE), torch.rand(3, 2).to(DEVICE)
    none = torch.empty(0, device=DEVICE)
    needs = [True, True, train, False] + [False] * 6
    with LargestTensor() as seen:
        experts_backward(
            *(torch.ones_like(case.x_TH), case.x_TH, ids, weights, case.experts.gate_up, case.experts.down),
            *(*(None,) * 10, none, none, none, none.int(), "add", needs),
        )
    assert (seen.numel >= case.experts.gate_up.numel()) == train


def test_frozen_weights_may_be_freed_and_gathered_again_between_forward_and_backward():
    """As FSDP2 does: the graph must hold the weights themselves, not copies, and read them where they are."""
    case = to_device(make_case(T=9)).requiring("x", "personal.gate_weight")
    frozen = [case.router.weight, case.experts.gate_up, case.experts.down, case.shared.gate_up]
    owned = {t.untyped_storage().data_ptr() for t in (*frozen, *case.tensors().values())}
    saved = []

    def pack(t):
        saved.append(t.untyped_storage())
        return t

    def grads(free):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, backend="triton")
        if free:
            for t in frozen:
                values, size = t.clone(), t.untyped_storage().nbytes()
                t.untyped_storage().resize_(0)
                t.untyped_storage().resize_(size)
                with torch.autograd._unsafe_preserve_version_counter(t):
                    t.copy_(values)
        return torch.autograd.grad(y.sum(), [case.x_TH, case.personal.gate_weight])

    want = grads(free=False)
    others = [s.nbytes() for s in saved if s.data_ptr() not in owned]
    assert max(others) < min(t.nbytes for t in frozen[1:]), "a copy of a frozen weight was saved"
    assert all(torch.equal(a, b) for a, b in zip(want, grads(free=True)))


def test_a_checkpointed_layer_has_the_same_gradients():
    case = to_device(make_case(T=13)).requiring("x", "personal.gate_weight")
    args = (case.router, case.experts, case.personal, case.shared)
    leaves = [case.x_TH, case.personal.gate_weight]
    plain = torch.autograd.grad(flex_moe(case.x_TH, *args, backend="triton").sum(), leaves)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: flex_moe(x, *args, backend="triton"),
        case.x_TH,
        use_reentrant=False,
        context_fn=checkpoint_contexts,
    )
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), leaves), plain))


@pytest.mark.parametrize("looked_at", ["first pass", "replay"])
def test_a_replay_keeps_what_the_first_pass_did_whichever_is_looked_at(looked_at):
    """A mode sends a pass through the ops; a checkpoint compares what the two passes saved."""
    case = to_device(make_case(T=9))
    x_TH = case.x_TH.detach().requires_grad_()

    def layer(x_TH):
        return run_forward(replace(case, x_TH=x_TH))

    with LargestTensor() if looked_at == "first pass" else nullcontext():
        y = torch.utils.checkpoint.checkpoint(layer, x_TH, use_reentrant=False)
    with LargestTensor() if looked_at == "replay" else nullcontext():
        (got,) = torch.autograd.grad(y.sum(), x_TH)
    assert torch.equal(got, torch.autograd.grad(layer(x_TH).sum(), x_TH)[0])


@pytest.mark.parametrize("rows", [16, 64])
def test_a_plan_of_other_tiles_since_the_forward_pass_has_its_own_table(rows, monkeypatch):
    case = to_device(make_case(T=70, E=3, K=2, shared="none")).requiring()
    exact = case.to(torch.float64).requiring()
    want = torch.autograd.grad(run_forward(exact, backend="reference").sum(), list(exact.tensors().values()))
    y = run_forward(case)
    monkeypatch.setattr(experts, "plan_for", lambda *_: tiles.FLOAT32[rows])
    found = torch.autograd.grad(y.sum(), list(case.tensors().values()))
    for name, got, exactly in zip(case.tensors(), found, want, strict=True):
        assert relative_distance(got, exactly) < 2e-6, name


def test_backends_says_what_runs_the_kernels():
    status = backends()["triton"]
    assert "triton" in status.detail.lower() or "cuda" in status.detail.lower()


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are captured on a GPU")
def test_the_layer_can_be_captured_in_a_cuda_graph():
    case = to_device(make_case(T=64, H=64, I=64, E=8, dtype=torch.bfloat16))
    args = (case.x_TH, case.router, case.experts, case.personal, case.shared)
    want = flex_moe(*args, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flex_moe(*args, backend="triton")
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are captured on a GPU")
def test_a_module_whose_passes_are_graphs_trains_as_without():
    case = to_device(make_case(T=64, H=64, I=64, E=8, dtype=torch.bfloat16))
    layer = FlexMoE(case.router, case.experts, case.shared, backend="triton")
    layer.personalize(3)
    trained = list(layer.personal.parameters())
    x_TH = case.x_TH.detach().requires_grad_()
    want = torch.autograd.grad(layer(x_TH).square().sum(), [x_TH, *trained])
    graphed = torch.cuda.make_graphed_callables(layer, (torch.randn_like(x_TH).requires_grad_(),))
    for _ in range(2):
        got = torch.autograd.grad(graphed(x_TH).square().sum(), [x_TH, *trained])
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter's kernels cannot be traced")
def test_torch_compile_sees_one_graph():
    case = to_device(make_case(T=64, H=64, I=64, E=8))
    args = (case.x_TH, case.router, case.experts, case.personal, case.shared)
    compiled = torch.compile(lambda x: flex_moe(x, *args[1:], backend="triton"), fullgraph=True)
    torch.testing.assert_close(compiled(case.x_TH), flex_moe(*args, backend="triton"))
