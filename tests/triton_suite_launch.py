"""Triton's own way from a call to a driver that has no device; run by test_triton_launch.py.

What the interpreter leaves out: binding and specialising arguments, compiling for sm_90, the launcher in C,
tensor maps. Tensors are the CPU's, and no kernel runs: outputs hold anything.

Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flex_kernels.quantize import empty
from flex_kernels.triton import codegen, codes, direct, experts_backward, experts_forward, tiles, tune
from flex_kernels.triton.route import route
from flex_kernels.triton.route_backward import route_backward

LOG = Path(os.environ["CUDA_DRIVER_LOG"])
BFLOAT16 = 9


class WithoutDevice(CudaDriver):
    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: (9, 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    driver.set_active(WithoutDevice())
    for module in (tiles, tune, codes):
        monkeypatch.setattr(module, "capability_of", lambda device: 90)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tune, "cache_file", lambda device: Path("/none/plans.json"))
    tune.plan_for.cache_clear()
    yield
    tune.plan_for.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """(launch as codegen records it, compiled kernel) of all that is launched, by Triton's own way."""
    monkeypatch.setattr(direct, "KNOWN_LAUNCHER", False)
    found = []
    real = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = real(self, *args, grid=grid, warmup=warmup, **kwargs)
        given = {name: value for name, value in kwargs.items() if name in codegen.OPTIONS}
        arguments = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k not in given}
        found.append((codegen.Launch(self, arguments, given), kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def log():
    return [json.loads(line) for line in LOG.read_text().splitlines()]


def weights(E, H, I, kind):
    """(gate_up, down, their scales) of the routed experts."""
    if kind == "plain":
        return torch.zeros(E, 2 * I, H).bfloat16(), torch.zeros(E, H, I).bfloat16(), None, None
    gate_up, down = empty((E, 2 * I, H), kind), empty((E, H, I), kind)
    return gate_up.codes, down.codes, gate_up.scales, down.scales


def both_ways(T, kind="plain", H=64, I=72, E=4, K=2):
    """The layer with a personal expert in float32, forward, then backward with pre-activations again."""
    x_TH = torch.zeros(T, H).bfloat16()
    ids_TK, weights_TK = torch.rand(T, E).topk(K).indices.int(), torch.rand(T, K)
    own = torch.zeros(2 * I, H), torch.zeros(H, I), torch.rand(T)
    inputs = x_TH, ids_TK, weights_TK, *weights(E, H, I, kind), *own, *(None,) * 5
    y_TH, *preacts = experts_forward(*inputs, "convex", False)
    needs = [True, True, False, False, True, True, True, False, False, False]
    return experts_backward(y_TH, *inputs, *preacts, "convex", needs)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_every_launch_of_a_layer_is_taken_by_the_driver(launches, kind):
    before = len(log())
    both_ways(512, kind)
    seen = log()[before:]
    assert sum("launched" in line for line in seen) == len(launches)
    maps = [line for line in seen if "map" in line]
    assert {line["type"] for line in maps} == {BFLOAT16}
    # An expert's gate and up rows come as one box of 128 bytes a row, the least that all swizzles take.
    assert [64, 128, 2, 1] in [line["map"] for line in maps]
    shared = {line["launched"]: line["shared"] for line in seen if "launched" in line}
    assert shared["up_swiglu_kernel"] > 48 * 1024


def test_the_compiled_kernels_are_those_that_the_tests_of_generated_code_look_at(launches):
    both_ways(512)
    x_TH, router, gates = torch.zeros(512, 64).bfloat16(), torch.zeros(4, 64).bfloat16(), torch.zeros(1, 64)
    ids, chosen, opened, _ = route(
        x_TH, router, None, gates, torch.zeros(1), 2, True, "softmax", 1.0, want_logits=False
    )
    saved = x_TH, router, gates, ids, chosen, opened
    needs = [True, False, True, True]
    route_backward(chosen, opened, torch.empty(0, 4), *saved, True, "softmax", 1.0, needs)
    names = {recorded.kernel.fn.__name__.removesuffix("_kernel") for recorded, _ in launches}
    assert names == {
        *("tile_table", "up_swiglu", "grouped_gemm", "combine", "down_backward", "score_grads"),
        *("route", "route_backward"),
    }
    for recorded, compiled in launches:
        looked_at = ASTSource(recorded.kernel, *codegen.specialisation(recorded))
        assert compiled.src.signature == looked_at.signature, recorded.kernel
        assert compiled.src.constants == looked_at.constants, recorded.kernel
        attributes = {place: found for place, found in compiled.src.attrs.items() if found}
        assert attributes == looked_at.attrs, recorded.kernel
        assert compiled.metadata.num_warps == recorded.options.get("num_warps", 4)
        assert compiled.metadata.num_stages == recorded.options.get("num_stages", 3)


@pytest.mark.skipif(not direct.KNOWN_LAUNCHER, reason="launches by Triton's own way alone")
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_launch_seen_before_reaches_the_driver_as_by_tritons_own_way(kind, monkeypatch):
    def launched(known):
        monkeypatch.setattr(direct, "KNOWN_LAUNCHER", known)
        before = len(log())
        both_ways(512, kind)
        return [line for line in log()[before:] if "launched" in line]

    own = launched(False)
    direct.FORMS.clear()
    first, again = launched(True), launched(True)
    assert len(direct.FORMS) > 5
    assert own == first == again and len(own) > 10


def test_another_number_of_tokens_loads_no_other_kernel(launches):
    both_ways(512)
    loaded = sum("loaded" in line for line in log())
    both_ways(509)
    assert sum("loaded" in line for line in log()) == loaded


def test_the_driver_refuses_what_no_copy_engine_takes():
    utils = driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor", None) or utils.fill_tma_descriptor_tiled
    t = torch.zeros(64, 64).bfloat16()
    # Arguments: address, swizzle of 128 bytes, bytes and type of an element, box, sizes, strides, padding.
    fill(t.data_ptr(), 3, 2, BFLOAT16, [64, 64], [64, 64], [64, 1], 0)
    for address, box in ((t.data_ptr() + 2, [64, 64]), (t.data_ptr(), [64, 128]), (t.data_ptr(), [512, 64])):
        with pytest.raises(RuntimeError, match="tensor map"):
            fill(address, 3, 2, BFLOAT16, box, [64, 64], [64, 1], 0)
