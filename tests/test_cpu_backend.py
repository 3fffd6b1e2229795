"""The cpu backend: every instruction set, dtype, mix and memory mode against the float64 reference.

Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import Case, assert_close, make_case, with_fixed_routing

from flex_kernels import Experts, Routed, cpu, flex_moe
from flex_kernels.cpu import blocks, experts, fallback, fused, ops
from flex_kernels.cpu.plan import Block, Group

ISAS = ops.kernels.isas() if ops.kernels is not fallback else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*ISAS, "fallback"])
def engine(request, monkeypatch):
    """Each instruction set of this machine in turn, and a machine without the extension."""
    if request.param == "fallback":
        monkeypatch.setattr(ops, "kernels", fallback)
        monkeypatch.setattr(ops, "warn_if_missing", lambda: None)
        yield request.param
    else:
        ops.kernels.set_isa(request.param)
        yield request.param
        ops.kernels.set_isa("auto")


def run(case: Case, *names: str, backend: str = "cpu", **options) -> dict[str, torch.Tensor]:
    """The output and the gradients of the named tensors (all without names) for a fixed cotangent."""
    case.requiring(*names)
    y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, backend=backend, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    named = {n: t for n, t in case.tensors().items() if t.requires_grad}
    found = {"y": y.detach()} | dict(zip(named, torch.autograd.grad(y, list(named.values()), dy)))
    if "personal.gate_bias" in found:
        # A single number has no norm to average its rounding over: the bias counts as one more gate weight.
        bias = found.pop("personal.gate_bias")
        found["personal.gate_weight"] = torch.cat([found["personal.gate_weight"], bias[None]])
    return found


def agree(case: Case, *names: str, multiple: float = 3.0, **options) -> None:
    mix = options.get("mix", "add")
    exact = run(case.to(torch.float64), *names, backend="reference", mix=mix)
    plain = run(case.to(case.x_TH.dtype), *names, backend="reference", mix=mix)
    found = run(case.to(case.x_TH.dtype), *names, **options)
    assert found.keys() == exact.keys()
    for name, got in found.items():
        assert_close(got, exact[name], plain[name], multiple, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", ["add", "convex"])
@pytest.mark.parametrize("save", ["recompute", "preact"])
def test_values_and_all_gradients_match_the_reference(engine, dtype, mix, save):
    case = make_case(T=41, H=72, E=5, K=2, I=37, personal_width=19, shared_width=70, dtype=dtype)
    agree(with_fixed_routing(case), mix=mix, save=save)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_odd_sizes_and_many_rows_an_expert(engine, dtype):
    # 430 rows for two experts: more than one block of rows; 129 columns: one more than a block; odd
    # reductions.
    agree(with_fixed_routing(make_case(T=215, H=129, E=2, K=2, I=131, dtype=dtype)), mix="convex")


def test_a_long_reduction_goes_in_blocks(engine):
    for dtype in (torch.float32, torch.bfloat16):
        agree(with_fixed_routing(make_case(T=14, H=1601, E=2, K=1, I=3, dtype=dtype)))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shared", ["gated", "plain", "none"])
def test_every_router_and_shared_expert(score, normalize, shared):
    router = {"score": score, "normalize": normalize, "scale": 2.5, "bias": torch.linspace(-0.1, 0.1, 60)}
    case = make_case(T=23, E=60, K=6, shared=shared, router=router)
    agree(case, mix="convex")


@pytest.mark.parametrize("T, E, K", [(0, 4, 2), (1, 4, 1), (3, 8, 8), (2, 60, 6)])
def test_few_tokens(engine, T, E, K):
    agree(make_case(T=T, E=E, K=K), mix="convex", save="preact")


def one_expert_each(counts: list[int], H: int, I: int) -> Case:
    """Routed experts alone; expert e serves ``counts[e]`` tokens, which lie apart from each other."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))][:, None]
    case = make_case(T=len(ids), H=H, E=len(counts), K=1, I=I, personal=False, shared="none")
    weights = torch.rand(shuffled.shape, generator=torch.Generator().manual_seed(2))
    return replace(case, router=Routed(shuffled, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", ["recompute", "preact"])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "generic"])
def test_every_number_of_rows_around_the_kernels_limits(isa, save, dtype):
    thin, block = ops.kernels.THIN_ROWS, ops.kernels.BLOCK_ROWS
    ops.kernels.set_isa(isa)
    try:
        case = one_expert_each([*range(1, 30), block - 1, block, block + 1], H=101, I=67)
        assert 1 < thin < 29
        # float64 copies of the rounded case, so that both sides see the same numbers.
        agree(case.to(dtype), "x", "router.weights", save=save)
    finally:
        ops.kernels.set_isa("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H, I", [(6301, 3), (3, 3203)])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "generic"])
def test_a_reduction_longer_than_its_scratch_goes_in_blocks(isa, H, I, dtype):
    ops.kernels.set_isa(isa)
    try:
        agree(one_expert_each([ops.kernels.THIN_ROWS, 1, 40], H, I).to(dtype), "x", "router.weights")
    finally:
        ops.kernels.set_isa("auto")


def test_all_tokens_on_one_expert_and_skipped_slots(engine):
    case = make_case(T=30, E=6, K=3)
    ids = torch.full((30, 3), 4)
    ids[:, 1] = 6
    routed = replace(case, router=Routed(ids, torch.rand(30, 3, generator=torch.Generator().manual_seed(2))))
    agree(routed)
    found = run(routed.to(torch.float32), "router.weights")
    assert (found["router.weights"][:, 1] == 0).all() and (found["router.weights"][:, 0] != 0).all()


@pytest.mark.parametrize(
    "names", [("x",), ("personal.gate_up",), ("personal.gate_weight",), ("shared.down",)]
)
@pytest.mark.parametrize("mix", ["add", "convex"])
def test_gradients_are_right_when_only_some_are_asked_for(names, mix):
    agree(make_case(T=12), *names, mix=mix)


def test_frozen_experts_get_no_buffer_of_their_size():
    case = make_case(T=8, H=64, E=64, K=1, I=64).requiring("x", "personal.gate_up", "personal.down")
    y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, backend="cpu")
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        y.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < case.experts.down.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "generic"])
@pytest.mark.parametrize("T, I", [(70, 70), (9, 1200)], ids=["many rows", "few rows"])
def test_results_do_not_depend_on_the_number_of_threads(isa, dtype, T, I):
    case = make_case(T=T, H=300, E=4, K=2, I=I, dtype=dtype)
    before = torch.get_num_threads()
    ops.kernels.set_isa(isa)
    try:
        torch.set_num_threads(1)
        one = run(case.to(dtype), "x", "personal.gate_weight", mix="convex")
        torch.set_num_threads(3)
        three = run(case.to(dtype), "x", "personal.gate_weight", mix="convex")
    finally:
        torch.set_num_threads(before)
        ops.kernels.set_isa("auto")
    assert all(torch.equal(one[name], three[name]) for name in ("y", "x"))
    assert torch.equal(one["personal.gate_weight"], three["personal.gate_weight"])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("H", [17, 300, 1030])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "generic"])
def test_few_rows_an_expert_beside_many_for_any_number_of_threads(isa, H, dtype):
    # Two batches, in which threads begin with routed experts and with the other two at once.
    case = with_fixed_routing(make_case(T=290, H=H, E=40, K=2, I=70, dtype=dtype)).to(dtype)
    ungated = replace(case, personal=None, shared=replace(case.shared, gate_weight=None))
    before, found = torch.get_num_threads(), []
    ops.kernels.set_isa(isa)
    try:
        agree(case, mix="convex", save="preact")
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            found.append(run(ungated, "x", "router.weights", save="preact"))
    finally:
        torch.set_num_threads(before)
        ops.kernels.set_isa("auto")
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_several_python_threads_may_call_at_once(engine, dtype):
    cases = [make_case(T=40, H=70, E=3, K=2, I=45, dtype=dtype, seed=seed) for seed in range(4)]
    alone = [run(case.to(dtype), "x", "router.weight") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: run(case.to(dtype), "x", "router.weight"), cases * 3))
    for i, found in enumerate(together):
        assert all(torch.equal(found[name], alone[i % 4][name]) for name in found)


def test_weights_that_are_not_row_contiguous_are_still_right():
    case = with_fixed_routing(make_case(T=20, H=40, I=24))
    transposed = Experts(
        case.experts.gate_up.transpose(1, 2).contiguous().transpose(1, 2),
        case.experts.down.transpose(1, 2).contiguous().transpose(1, 2),
    )
    got = run(replace(case, experts=transposed).to(torch.float32), "x")
    want = run(case.to(torch.float32), "x", backend="reference")
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-4)


def test_weights_with_padded_rows_are_read_as_stored():
    case = with_fixed_routing(make_case(T=20, H=40, I=24))
    padded = torch.full((5, 48, 64), float("nan"))
    padded[:, :, :40] = case.experts.gate_up
    views = replace(case, experts=Experts(padded[:, :, :40], case.experts.down))
    y = flex_moe(views.x_TH, views.router, views.experts, backend="cpu")
    want = flex_moe(case.x_TH, case.router, case.experts, backend="reference")
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)


def group_of(rows: int, width: int, hidden: int = 8, **more) -> Group:
    weights = torch.zeros(1, 2 * width, hidden), torch.zeros(1, hidden, width)
    return Block(*weights, torch.arange(rows, dtype=torch.int32), torch.ones(rows), **more).group()


def test_batches_cover_every_row_once_within_the_budget():
    groups = [group_of(n, w) for n, w in [(5000, 16), (3, 16), (0, 16), (700, 64), (1, 8)]]
    work = fused.batches(groups)
    for group in groups:
        rows = [r for b in work for s in b if s.group is group for r in range(s.start, s.end)]
        assert rows == list(range(group.tokens_n.shape[0]))
    total = sum(g.tokens_n.shape[0] * fused.room(g.width) for g in groups)
    assert fused.widest_batch(work) <= max(total // fused.PARTS, fused.FEWEST_ROWS * 64)
    for batch in work:
        assert [s.at for s in batch] == [sum(p.elements for p in batch[:i]) for i in range(len(batch))]


def test_small_calls_are_one_batch_and_large_ones_at_least_eight(monkeypatch):
    few = fused.FEWEST_ROWS
    groups = [group_of(few, 1000) for _ in range(4)]
    assert len(fused.batches(groups)) == 4
    monkeypatch.setattr(fused, "FEWEST_ELEMENTS", 4 * few * fused.room(1000))
    assert len(fused.batches(groups)) == 1
    assert len(fused.batches([group_of(few * 40, 1000) for _ in range(4)])) >= 8


def routed_groups(counts: list[int], width: int, **more) -> list[Group]:
    """Groups of one block: expert e serves ``counts[e]`` rows."""
    experts = len(counts)
    weights = torch.zeros(experts, 2 * width, 8), torch.zeros(experts, 8, width)
    block = Block(*weights, torch.zeros(sum(counts), dtype=torch.int32), torch.ones(sum(counts)), **more)
    firsts = [sum(counts[:e]) for e in range(experts)]
    return [Group(block, e, first, rows, width) for e, (first, rows) in enumerate(zip(firsts, counts))]


@pytest.mark.parametrize("tokens, count", [(64, 1), (128, 1), (200, 2), (640, 5)])
def test_experts_of_few_rows_share_batches_with_those_of_many(tokens, count):
    routed = routed_groups([1, 9, 30, 2, 17, 8, 25, 4] * 3, 32)
    trained = group_of(tokens, 16, everyone=True, ddown_EHI=torch.zeros(1, 8, 16))
    shared = group_of(tokens, 64, everyone=True)
    work = fused.batches([*routed, shared, trained])
    assert len(work) == count
    for group in (*routed, shared, trained):
        pieces = [s for b in work for s in b if s.group is group]
        assert [r for s in pieces for r in range(s.start, s.end)] == list(range(group.rows))
        assert len(pieces) == (count if group is shared else 1)
    for batch in work:
        assert [s.at for s in batch] == [sum(p.elements for p in batch[:i]) for i in range(len(batch))]
        # Behind the others, where the kernels look for them.
        assert [s.group.block.everyone for s in batch] == sorted(s.group.block.everyone for s in batch)
        assert sum(not s.group.block.everyone for s in batch) >= len(routed) // count - 2
    rows = [sum(s.rows for s in b if not s.group.block.everyone) for b in work]
    assert max(rows) - min(rows) <= 2 * 30


def test_experts_of_many_rows_stay_apart():
    shared = group_of(200, 64, everyone=True)
    few, many = ops.kernels.FEW_ROWS, ops.kernels.FEW_ROWS + 1
    assert fused.tokens_to_mix([*routed_groups([few] * 3 + [many] * 2, 16), shared]) == 200
    for groups in (
        [*routed_groups([few] * 2 + [many] * 2, 16), shared],
        [*routed_groups([few] * 3 + [fused.MIXED_TOKENS + 1], 16), shared],
        routed_groups([few] * 3, 16),
        [shared],
        [*routed_groups([few] * 3, 16), group_of(few, 64, everyone=True)],
        [*routed_groups([few] * 3, 16), group_of(fused.WEIGHT_ROWS + 1, 64, everyone=True)],
        [],
    ):
        assert fused.tokens_to_mix(groups) == 0
    # Weights that are read twice decide, and wide elements.
    mixture = [*routed_groups([2, 2], 16), shared]
    assert len(fused.batches(mixture)) == 2
    assert len(fused.batches(mixture, itemsize=4)) > 2
    assert [len(b) for b in fused.batches(mixture, most_bytes=1)][:2] == [1, 1]


def test_weights_that_backward_reads_twice_share_a_batch_only_within_the_limit():
    groups = [group_of(2, 16) for _ in range(5)]
    size = fused.bytes_read_twice(groups[0])
    assert size == 4 * 3 * 16 * 8
    assert [len(b) for b in fused.batches(groups, most_bytes=2 * size)] == [2, 2, 1]
    assert [len(b) for b in fused.batches(groups, most_bytes=1)] == [1] * 5
    many = group_of(ops.kernels.FEW_ROWS + 1, 16)
    kept = group_of(2, 16, preact_N2I=torch.zeros(2, 32))
    assert fused.bytes_read_twice(many) == fused.bytes_read_twice(kept) == 0
    assert len(fused.batches([kept, many], most_bytes=1)) == 1


def test_a_weight_gradient_over_many_rows_is_summed_in_pieces(monkeypatch):
    for module in (fused, blocks, experts):
        monkeypatch.setattr(module, "WEIGHT_ROWS", 16)
    agree(make_case(T=50), "personal.gate_up", "personal.down", "experts.down", "shared.gate_up")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_float32_weights_keep_float32s_digits(engine, dtype):
    if not ops.fused() or not ops.kernels.has_weight_gradient():
        pytest.skip(f"{engine} leaves gradients of weights to torch")
    case = make_case(T=50, H=64, I=48).to(dtype)
    wide = {name: getattr(case.personal, name).float() for name in ("gate_up", "down")}
    found = run(replace(case, personal=replace(case.personal, **wide)), "personal.gate_up", "personal.down")
    for name in ("personal.gate_up", "personal.down"):
        assert found[name].dtype == torch.float32
        rounded = found[name].to(dtype).float() == found[name]
        assert rounded.float().mean() < 0.05


def test_a_missing_extension_is_announced_once_and_described(monkeypatch):
    monkeypatch.setattr(ops, "kernels", fallback)
    ops.warn_if_missing.cache_clear()
    case = make_case()
    with pytest.warns(RuntimeWarning, match="native extension .* is missing.*build_ext"):
        flex_moe(case.x_TH, case.router, case.experts, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flex_moe(case.x_TH, case.router, case.experts, backend="cpu")
    assert "native extension is missing" in cpu.describe()
    ops.warn_if_missing.cache_clear()


def test_the_backend_says_what_it_uses_and_where_it_runs():
    assert cpu.status("cpu") == ""
    assert "not on cuda" in cpu.status("cuda")
    assert f"{torch.get_num_threads()} threads" in cpu.describe()
