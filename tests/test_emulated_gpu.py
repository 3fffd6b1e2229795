"""The Triton kernels' own code for sm_80 and sm_90 on an emulated GPU: its values, and what that GPU forbids.

Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import assert_close, make_case, with_fixed_routing

pytest.importorskip("triton", reason="triton is not installed")

from ptx_emulator import program
from ptx_emulator.gpu import emulated_gpu
from ptx_emulator.program import PtxError
from ptx_emulator.transfers import TRITON_FENCES_COPIES
from triton.runtime.errors import OutOfResources

from flex_kernels import Experts, Routed, flex_moe
from flex_kernels.triton import codegen, tiles
from flex_kernels.triton.grouped_gemm import grouped_gemm
from flex_kernels.triton.groups import Groups, dense
from flex_kernels.triton.route import route
from flex_kernels.triton.route_backward import route_backward
from flex_kernels.triton.tune import plan_for
from flex_kernels.triton.up_swiglu import up_swiglu

HERE = Path(__file__).parent
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("suite", "capability", "some"),
    [
        ("triton_suite_kernels.py", 80, ""),
        ("triton_suite_kernels.py", 90, ""),
        ("triton_suite_layer.py", 90, ""),
        ("triton_suite_layer.py", 80, "exact_as_plain or odd_sizes or extra_experts"),
        ("triton_suite_codes.py", 90, "bit_for_bit or exact_as_plain or odd_sizes or shared"),
        ("triton_suite_codes.py", 80, "bit_for_bit or exact_as_plain"),
        # Its routing kernels are compiled for the host.
        ("cuda_suite_layer.py", 90, ""),
    ],
)
def test_the_suite_passes_on_an_emulated_gpu(suite, capability, some):
    paths = filter(None, (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"FLEX_EMULATED_GPU": str(capability), "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptx_emulator.plugin"]
    command += ["-W", "ignore", "--timeout", "600", *(("-k", some) if some else ()), str(HERE / suite)]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def run(case, **options):
    case.requiring()
    y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    named = {n: t for n, t in case.tensors().items() if t.requires_grad}
    return {"y": y.detach()} | dict(zip(named, torch.autograd.grad(y, list(named.values()), dy.to(y.dtype))))


def agree(case, capability, mix="add", save="recompute", multiprocessors=4):
    """The case on the emulated GPU against float64; returns the GPU."""
    exact = run(case.to(torch.float64), mix=mix, backend="reference")
    plain = run(case.to(case.x_TH.dtype), mix=mix, backend="reference")
    with emulated_gpu(capability, multiprocessors) as gpu:
        got = run(case.to(case.x_TH.dtype), mix=mix, backend="triton", save=save)
    for name, value in got.items():
        assert_close(value, exact[name], plain[name], 3.0, name)
    assert not gpu.hazards and "wgmma of registers" not in instructions(gpu)
    return gpu


def instructions(gpu):
    """The kinds of instructions in all kernels that the GPU ran."""
    text = "\n".join(compiled.asm["ptx"] for compiled in gpu.compiled.values())
    names = {"wgmma": r"wgmma\.mma_async", "tensor copy": r"cp\.async\.bulk\.tensor", "mma": r"mma\.sync"}
    names["wgmma of registers"] = codegen.PTX_PATTERNS["register_wgmma"]
    return {name for name, pattern in names.items() if re.search(pattern, text)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("capability", "T", "m", "wanted"),
    [
        (80, 12, 16, {"mma"}),
        (80, 300, 128, {"mma"}),
        (90, 12, 16, {"mma"}),
        (90, 70, 32, {"mma"}),
        (90, 150, 64, {"wgmma", "tensor copy"}),
        # Several tiles a program of a persistent grid, whose loop over tiles is flattened.
        (90, 1100, 128, {"wgmma", "tensor copy"}),
    ],
)
def test_every_pinned_plan_is_as_exact_as_plain_torch(capability, T, m, wanted, dtype):
    assert tiles.pinned_plan(capability, 2, rows=2 * T, experts=5).m == m
    case = with_fixed_routing(make_case(T=T, H=136, E=5, K=2, I=72, dtype=dtype))
    gpu = agree(case, capability, "convex" if T % 4 else "add", "preact" if T < 100 else "recompute")
    assert wanted <= instructions(gpu)


@pytest.mark.parametrize("T", [150, 600])
def test_rows_copied_into_expert_order_make_no_difference(T, monkeypatch):
    def copying(*sizes):
        plan = plan_for(*sizes)
        up, back = (replace(tile, copy_rows=True) for tile in (plan.up, plan.down_backward))
        return replace(plan, up=up, down_backward=back)

    monkeypatch.setattr("flex_kernels.triton.experts.plan_for", copying)
    case = with_fixed_routing(make_case(T=T, H=136, E=5, K=2, I=72, dtype=torch.bfloat16))
    gpu = agree(case, 90)
    assert gpu.launched.count("copy_rows_kernel") == 3, "forward, z again, the output's gradient"
    threads_copied = {
        compiled.name
        for compiled in gpu.compiled.values()
        if re.search(codegen.PTX_PATTERNS["cp_async"], compiled.asm["ptx"])
    }
    assert not threads_copied & {"up_swiglu_kernel", "down_backward_kernel"}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(("capability", "T"), [(80, 200), (90, 12), (90, 150), (90, 600)])
def test_quantised_experts_at_every_kind_of_plan(capability, T, kind):
    case = with_fixed_routing(make_case(T=T, H=136, E=5, K=2, I=72, dtype=torch.bfloat16))
    held = Experts.quantize(case.experts.gate_up.detach(), case.experts.down.detach(), kind)
    agree(replace(case, experts=held), capability)


def test_experts_without_rows_beside_one_with_all_of_them():
    case = make_case(T=500, H=72, E=6, K=1, I=40, dtype=torch.bfloat16)
    routed = Routed(torch.full((500, 1), 4), torch.rand(500, 1).bfloat16())
    agree(replace(case, router=routed), 90)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_router_s_gradients_with_many_tokens(capability):
    """From 4096 tokens on programs own more of them; with few they are in the suite of kernels."""
    T, H, E, K = 4100, 72, 12, 3
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(T, H, generator=generator).bfloat16()
    weight_EH = (torch.randn(E, H, generator=generator) / 4).bfloat16()
    gates_GH, bias_G = torch.randn(2, H, generator=generator), torch.zeros(2)
    dw_TK, dg_GT = torch.randn(T, K, generator=generator), torch.randn(2, T, generator=generator)
    other_TH = torch.randn(T, H, generator=generator).bfloat16()

    x, gates = (t.double().requires_grad_() for t in (x_TH, gates_GH))
    chosen = (x @ weight_EH.double().T).softmax(1).topk(K, dim=1).values
    outputs = chosen / chosen.sum(1, keepdim=True), (x @ gates.T).sigmoid().T
    exact = torch.autograd.grad(outputs, [x, gates], [dw_TK.double(), dg_GT.double()])
    with emulated_gpu(capability) as gpu:
        ids, weights, opened, _ = route(
            x_TH, weight_EH, None, gates_GH, bias_G, K, True, "softmax", 1.0, False
        )
        got = route_backward(
            *(dw_TK, dg_GT, torch.empty(0, E), x_TH, weight_EH, gates_GH, ids, weights),
            *(opened, True, "softmax", 1.0, [True, False, True, False], other_TH),
        )
    assert not gpu.hazards
    for mine, want in zip((got[0], got[2]), (exact[0] + other_TH, exact[1])):
        assert ((mine.double() - want).norm() / want.norm()) < 6e-3


def product(change=None, capability=90, gathered=False):
    """One expert's product with a pinned plan, the kernel's PTX changed before it runs: (result, what it
    should be, GPU). ``gathered``: rows come by the threads' own copies, not by a tensor map."""
    plan = tiles.plain_plans(capability)[128]
    order, table = torch.arange(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    offsets = torch.tensor([0, 128], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    x_NH = torch.randn(128, 640, generator=generator).bfloat16()
    w_1CH = torch.randn(1, 192, 640, generator=generator).bfloat16()

    def parse(text):
        changed = change(text) if change else text
        assert change is None or changed != text
        return program.parse(changed)

    with pytest.MonkeyPatch.context() as patch, emulated_gpu(capability) as gpu:
        patch.setattr("ptx_emulator.gpu.parse", parse)
        if gathered:
            rows = Groups(128, 1, plan.m, 1, order, offsets, table, table, table + 1)
            y_NC = up_swiglu(x_NH, w_1CH, rows, plan.up, False, True)[1]
        else:
            y_NC = grouped_gemm(x_NH, w_1CH, True, dense(128, plan.m), plan.down)
    return y_NC, x_NH.double() @ w_1CH[0].double().T, gpu


def without(pattern):
    return lambda text: re.sub(pattern, "", text)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_a_product_is_right_as_compiled(capability, gathered):
    y_NC, wanted, gpu = product(None, capability, gathered)
    assert not gpu.hazards
    assert ((y_NC.double() - wanted).norm() / wanted.norm()) < 3e-3


@pytest.mark.parametrize(
    ("capability", "pattern", "error"),
    [
        (80, r"cp\.async\.wait_group\s+\d+;", "asynchronous copy is still writing"),
        (80, r"bar\.sync\s+0;", "without a barrier"),
        (
            90,
            r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;",
            "asynchronous copy is still writing",
        ),
        (90, r"@%p\d+ mbarrier\.init[^;]*;", "no mbarrier"),
        (90, r"@%p\d+ cp\.async\.bulk[^;]*;", "copies that nobody started"),
    ],
)
def test_the_emulated_gpu_misses_each_instruction_that_a_right_program_needs(capability, pattern, error):
    with pytest.raises(PtxError, match=error):
        product(without(pattern), capability)


@pytest.mark.skipif(not TRITON_FENCES_COPIES, reason="this Triton leaves the fence out")
def test_what_threads_copied_is_multiplied_behind_a_barrier():
    with pytest.raises(PtxError, match="without a barrier"):
        product(without(r"bar\.sync\s+0;"), gathered=True)


@pytest.mark.skipif(not TRITON_FENCES_COPIES, reason="this Triton leaves the fence out")
def test_what_threads_wrote_is_fenced_before_tensor_cores_read_it():
    with pytest.raises(PtxError, match=r"without fence\.proxy\.async"):
        product(without(r"fence\.proxy\.async[^;]*;"), gathered=True)


def test_a_buffer_is_not_filled_again_while_a_product_reads_it():
    with pytest.raises(PtxError, match="still reads"):
        product(lambda text: re.sub(r"wgmma\.wait_group\.sync\.aligned 1;", "", text))


def test_accumulators_read_before_their_product_is_there_are_reported():
    gpu = product(without(r"wgmma\.wait_group\.sync\.aligned 0;"))[2]
    assert gpu.hazards["grouped_gemm_kernel"]


def test_a_tile_that_takes_too_much_shared_memory_is_refused_as_on_a_gpu():
    with emulated_gpu(90), pytest.raises(OutOfResources, match="shared memory"):
        plan = replace(tiles.HOPPER[128].up, n=256)
        up_swiglu(
            torch.zeros(8, 64).bfloat16(),
            torch.zeros(1, 512, 64).bfloat16(),
            dense(8, 128),
            plan,
            True,
            False,
        )


def test_an_address_outside_of_every_tensor_is_an_error():
    def further(text):
        return re.sub(r"(st\.global\.v4\.b32 \[ %rd\d+) \+ 0", r"\1 + 268435456", text)

    with pytest.raises(PtxError, match="outside of every tensor"):
        product(further)


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(PtxError, match="not known"):
        product(lambda text: text.replace("bar.sync", "frobnicate.sync", 1))
