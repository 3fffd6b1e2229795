"""The fused layer as users call it: values, gradients, and everything torch may wrap around it.

The fused backend here is the one that "auto" picks for CPU tensors; the Triton kernels have tests of their
own.
"""

from dataclasses import replace

import pytest
import torch
from cases import Case, assert_close, make_case, relative_error, with_fixed_routing
from torch.utils.checkpoint import checkpoint

from flex_kernels import Experts, Routed, Router, checkpoint_contexts, flex_moe
from flex_kernels.dispatch import backend_module, resolve_backend


def layer(case: Case, **options) -> torch.Tensor:
    return flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, **options)


def run(case: Case, **options) -> dict[str, torch.Tensor]:
    """The output and every gradient, by name, for a fixed random cotangent."""
    case.requiring()
    y = layer(case, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    named = case.tensors()
    grads = torch.autograd.grad(y, list(named.values()), dy)
    return {"y": y.detach()} | {f"d {n}": g for n, g in zip(named, grads)}


def agree(case: Case, multiple: float = 3.0, **options) -> None:
    exact = run(case.to(torch.float64), mix=options.get("mix", "add"), backend="reference")
    plain = run(case.to(case.x_TH.dtype), mix=options.get("mix", "add"), backend="reference")
    fused = run(case.to(case.x_TH.dtype), **options)
    assert fused.keys() == exact.keys()
    for name, got in fused.items():
        assert_close(got, exact[name], plain[name], multiple, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mix", ["add", "convex"])
@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_every_value_and_gradient_is_as_exact_as_plain_torch(dtype, mix, save):
    agree(with_fixed_routing(make_case(T=33, H=40, E=6, K=3, I=20, dtype=dtype)), mix=mix, save=save)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_every_kind_of_router_has_the_reference_s_gradients(score, normalize, scale):
    agree(make_case(T=19, router={"score": score, "normalize": normalize, "scale": scale}))


@pytest.mark.parametrize("shared", ["gated", "plain", "none"])
@pytest.mark.parametrize("personal", [True, False])
def test_every_combination_of_extra_experts(shared, personal):
    agree(make_case(T=9, shared=shared, personal=personal))


@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1},
        {"T": 2, "E": 60, "K": 6},
        {"T": 300, "H": 7, "I": 5, "E": 3, "K": 3},
        {"T": 65, "H": 129, "I": 33, "E": 17, "K": 1, "personal_width": 1},
    ],
    ids=str,
)
def test_odd_sizes(sizes):
    agree(make_case(**sizes), mix="convex")


def test_all_tokens_on_one_expert_and_skipped_slots():
    case = make_case(T=40, E=5, K=2)
    one = replace(case, router=Routed(torch.full((40, 1), 3), torch.rand(40, 1)))
    agree(one)
    skipping = torch.tensor([[3, 5], [5, 5]]).repeat(20, 1)
    agree(replace(case, router=Routed(skipping, torch.rand(40, 2))), mix="convex")


def test_the_selection_bias_is_respected():
    case = make_case(T=30, router={"score": "sigmoid", "normalize": True})
    bias = torch.tensor([0.0, 5.0, 0.0, 5.0, 0.0])
    biased = replace(case, router=replace(case.router, bias=bias))
    agree(biased)
    chosen_only = replace(case, router=Router(case.router.weight[[1, 3]], 2, True, "sigmoid"))
    chosen_only = replace(
        chosen_only, experts=Experts(case.experts.gate_up[[1, 3]], case.experts.down[[1, 3]])
    )
    assert relative_error(layer(biased), layer(chosen_only)) < 1e-5


@pytest.mark.parametrize("leading", [(0,), (3, 0), (2, 3), (), (2, 1, 2)], ids=str)
def test_leading_dimensions_are_kept(leading):
    case = make_case()
    x = torch.randn(*leading, 24, requires_grad=True)
    y = layer(replace(case, x_TH=x))
    assert y.shape == x.shape
    flat = layer(replace(case, x_TH=x.detach().reshape(-1, 24)))
    assert torch.equal(y.detach().reshape(-1, 24), flat)
    y.sum().backward()
    assert x.grad.shape == x.shape and torch.isfinite(x.grad).all()


def test_no_tokens_give_zero_gradients_of_the_right_shape():
    case = make_case(T=0).requiring()
    layer(case).sum().backward()
    for name, t in case.tensors().items():
        assert t.grad is not None and t.grad.shape == t.shape and not t.grad.any(), name


def test_a_non_contiguous_input_gives_the_same_bits():
    case = make_case(T=24, H=24)
    x = case.x_TH.t()
    assert not x.is_contiguous()
    assert torch.equal(layer(replace(case, x_TH=x)), layer(replace(case, x_TH=x.contiguous())))


def test_strided_expert_weights_are_consumed_as_stored():
    case = make_case()
    wide = torch.randn(5, 24, 24 + 8)
    strided = Experts(wide[:, :, :24], case.experts.down.transpose(1, 2).contiguous().transpose(1, 2))
    dense = Experts(strided.gate_up.contiguous(), strided.down.contiguous())
    got, want = layer(replace(case, experts=strided)), layer(replace(case, experts=dense))
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", list(make_case().tensors()))
def test_each_gradient_is_computed_exactly_when_asked_for(name):
    case = make_case()
    everything = run(case.to(torch.float32))
    case = case.to(torch.float32).requiring(name)
    y = layer(case)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    y.backward(dy)
    for other, t in case.tensors().items():
        assert (t.grad is not None) == (other == name), other
    assert torch.equal(case.tensors()[name].grad, everything[f"d {name}"])


def test_frozen_inputs_give_an_output_without_a_graph():
    assert layer(make_case()).grad_fn is None
    with torch.no_grad():
        assert layer(make_case().requiring()).grad_fn is None


def test_router_logits_are_returned_and_differentiable():
    case = make_case(T=6).requiring("x", "router.weight")
    y, logits = layer(case, return_router_logits=True)
    assert relative_error(logits, case.x_TH.double() @ case.router.weight.double().t()) < 1e-6
    (y.sum() + (logits**2).sum()).backward()
    got = case.router.weight.grad
    exact = case.to(torch.float64).requiring("router.weight")
    y, logits = layer(exact, return_router_logits=True, backend="reference")
    (y.sum() + (logits**2).sum()).backward()
    assert relative_error(got, exact.router.weight.grad) < 1e-5


def test_a_float32_personal_expert_trains_beside_bfloat16_experts():
    case = make_case(dtype=torch.bfloat16)
    own = make_case(dtype=torch.float32).personal
    case = replace(case, personal=own).requiring("personal.gate_up", "personal.gate_weight")
    layer(case).float().sum().backward()
    assert own.gate_up.grad.dtype == torch.float32 and own.gate_up.grad.any()
    assert own.gate_weight.grad.dtype == torch.float32 and own.gate_weight.grad.any()


@pytest.mark.parametrize("T", [0, 7])
def test_wider_extra_experts_give_the_bits_of_their_cast_copies_and_gradients_in_float32(T):
    names = ("personal.gate_up", "personal.down", "shared.gate_up", "shared.down")
    case = make_case(T=T, dtype=torch.bfloat16)

    def in_dtype(dtype):
        both = [
            replace(e, gate_up=e.gate_up.to(dtype, copy=True), down=e.down.to(dtype, copy=True))
            for e in (fine.personal, fine.shared)
        ]
        return replace(case, personal=both[0], shared=both[1]).requiring(*names)

    fine = make_case(T=T, dtype=torch.float32)
    wide, cast = in_dtype(torch.float32), in_dtype(torch.bfloat16)
    y, want = layer(wide), layer(cast)
    assert torch.equal(y, want)
    y.float().square().sum().backward(), want.float().square().sum().backward()
    for name in names:
        got, of_cast = wide.tensors()[name].grad, cast.tensors()[name].grad
        assert got.dtype == torch.float32, name
        # Those of the copies have been rounded to bfloat16.
        torch.testing.assert_close(got, of_cast.float(), rtol=2**-8, atol=1e-4)


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients():
    case = make_case().requiring()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(case)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in case.tensors().values())
    assert relative_error(y, layer(case)) < 0.05


@pytest.mark.parametrize("save", ["recompute", "preact"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_gives_the_eager_values_and_gradients(save, dynamic):
    torch._dynamo.reset()
    eager, compiled = make_case(), make_case()
    traced = torch.compile(
        lambda c: layer(c, save=save, mix="convex"), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    want = run(eager, save=save, mix="convex")
    y = traced(compiled.requiring())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    named = compiled.tensors()
    for name, grad in zip(named, torch.autograd.grad(y, list(named.values()), dy)):
        # Of x, eager calls round the sum of two gradients once; a graph adds what the ops return.
        error = relative_error(grad, want[f"d {name}"])
        assert error <= (1e-7 if name == "x" else 0), f"{name}: {error}"
    assert torch.equal(y, want["y"])


def test_compile_serves_another_number_of_tokens_without_a_graph_break():
    torch._dynamo.reset()
    traced = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (7, 12, 3):
        case = make_case(T=T, seed=T)
        assert torch.equal(traced(case), layer(case))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_compiled_ids_outside_the_experts_are_skipped_and_never_wrap(dtype):
    """Nothing can be raised inside a graph, and an int64 id of 2^32 + 1 must not become expert 1."""
    torch._dynamo.reset()
    case = make_case(T=3, E=5, K=2)
    far = [2**32 + 1, -(2**32) + 2, 2**31, 6] if dtype == torch.int64 else [2**31 - 1, -(2**31), -1, 6]
    ids = torch.tensor([[far[0], 4], [far[1], far[2]], [0, far[3]]], dtype=dtype)
    skipping = torch.tensor([[5, 4], [5, 5], [0, 5]], dtype=dtype)
    weights = torch.rand(3, 2)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = layer(replace(case, router=Routed(skipping, weights)))
    assert torch.equal(traced(replace(case, router=Routed(ids, weights))), want)


def test_torch_finds_nothing_wrong_with_the_ops():
    """Schema, fake shapes, registered gradient; for the experts also both passes through AOTAutograd, whose
    check adds outputs up and so cannot take the integer ids of the router."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, requires_grad=True)

    x, ids = random(5, 8), torch.tensor([[0, 3], [1, 2], [3, 0], [2, 2], [4, 1]], dtype=torch.int32)
    route = (x, random(4, 8), None, random(1, 8), random(1), 2, True, "softmax", 1.5, True, "cpu")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.flex_kernels.route.default, route, test_utils=checks)
    weights = (random(5, 2), random(4, 12, 8), random(4, 8, 6), None, None, random(12, 8), random(8, 6))
    experts = (x, ids, *weights, random(5), *(None,) * 5, "add", False, False, "cpu")
    torch.library.opcheck(torch.ops.flex_kernels.experts.default, experts)


def test_calls_with_and_without_a_graph_agree_with_the_op_itself():
    """Eager calls record their gradient around the op, tracers find one registered on it: the same one."""
    case = make_case(personal=False, shared="none").requiring()
    ids = torch.tensor([[0, 1]] * case.x_TH.shape[0], dtype=torch.int32)
    weights = torch.rand(ids.shape, requires_grad=True)
    tensors = (case.x_TH, ids, weights, case.experts.gate_up, case.experts.down)
    leaves = [case.x_TH, weights, case.experts.gate_up, case.experts.down]
    routed = replace(case, router=Routed(ids, weights))
    op = torch.ops.flex_kernels.experts.default
    found = []
    for y in (op(*tensors, *(None,) * 10, "add", False, True, "cpu")[0], layer(routed, save="recompute")):
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    with torch.no_grad():
        found.append([layer(routed)])
    for got, want in (*zip(found[1], found[0]), (found[2][0], found[0][0])):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_inductor_compiles_the_layer_between_its_own_kernels(kind):
    torch._dynamo.reset()
    case = make_case(T=33).requiring("x", "personal.gate_up", "personal.gate_weight")
    if kind:
        case = replace(case, experts=Experts.quantize(case.experts.gate_up, case.experts.down, kind))

    def block(x):
        return torch.nn.functional.gelu(layer(replace(case, x_TH=torch.tanh(x)))) * 2

    leaves = [case.x_TH, case.personal.gate_up, case.personal.gate_weight]
    found = []
    for f in (torch.compile(block, fullgraph=True), block):
        y = f(case.x_TH)
        found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    want = run(make_case())
    case = make_case().requiring()
    y = checkpoint(lambda x: layer(replace(case, x_TH=x)), case.x_TH, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float())
    for name, t in case.tensors().items():
        assert torch.equal(t.grad, want[f"d {name}"]), name


def test_replay_under_checkpoint_contexts_keeps_the_routing_of_the_first_pass(monkeypatch):
    """The replayed input is disturbed far enough that a second routing would choose other experts."""
    case = make_case(T=64, E=8, K=2).requiring("personal.gate_up")
    calls = []

    def disturbed(x):
        calls.append(len(calls))
        return layer(replace(case, x_TH=x + (0.0 if len(calls) == 1 else 3.0)))

    routed = []
    module = backend_module(resolve_backend("auto", torch.device("cpu"), torch.float32))
    original = module.route
    monkeypatch.setattr(module, "route", lambda *a: routed.append(original(*a)) or routed[-1])
    x = case.x_TH.detach().requires_grad_()
    y = checkpoint(disturbed, x, use_reentrant=False, context_fn=checkpoint_contexts)
    y.sum().backward()
    assert calls == [0, 1], "the layer was not replayed"
    assert len(routed) == 1, "replay routed again"


def test_two_runs_give_the_same_bits_whatever_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(make_case(T=200, H=64, E=8, K=3, I=48)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert relative_error(other[name], value) < 1e-5, name
    again = run(make_case(T=200, H=64, E=8, K=3, I=48))
    twice = run(make_case(T=200, H=64, E=8, K=3, I=48))
    assert all(torch.equal(again[n], twice[n]) for n in again)
