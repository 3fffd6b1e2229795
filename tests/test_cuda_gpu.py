"""What only a GPU can show of the CUDA kernels; the other test_cuda files run there too.

Letters: T tokens, H hidden, E experts, K chosen, N slots.
"""

from __future__ import annotations

import pytest
import torch

from flex_kernels import Experts, FlexMoE, Router, cuda
from flex_kernels.cuda import ops

pytestmark = pytest.mark.skipif(bool(cuda.status("cuda")), reason=cuda.status("cuda") or "runs")


def random_ids(T: int, K: int, E: int) -> torch.Tensor:
    return torch.randint(0, E + 1, (T, K), device="cuda", dtype=torch.int32)


def test_a_million_tokens_of_eight_are_sorted_stably():
    ids_TK = random_ids(1_000_000, 8, 64)
    offsets_E1, order_N, inverse_N = ops.permute(ids_TK, 64)
    sorted_N, want_N = ids_TK.flatten().sort(stable=True)
    real = int((sorted_N < 64).sum())
    assert torch.equal(order_N[:real].long(), want_N[:real])
    assert (order_N[real:] == -1).all()
    assert int(offsets_E1[-1]) == real
    assert torch.equal(inverse_N[order_N[:real].long()], torch.arange(real, device="cuda", dtype=torch.int32))
    assert int((inverse_N < 0).sum()) == 8_000_000 - real


def test_rows_beyond_two_to_the_31_elements_are_addressed():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    N, H = 2**20 + 3, 2056
    y_NH = torch.zeros(N, H, dtype=torch.bfloat16, device="cuda")
    y_NH[-1], y_NH[1] = 3.0, 5.0
    inverse_TK = torch.tensor([[N - 1, 1], [-1, N - 1]], dtype=torch.int32, device="cuda")
    assert torch.equal(
        ops.combine(y_NH, inverse_TK, None), torch.tensor([[8.0], [3.0]]).cuda().bfloat16().expand(2, H)
    )


@pytest.mark.parametrize("T", (16, 4096))
def test_a_graph_replays_routing_on_new_tokens(T):
    E, K, H = 60, 4, 2048
    x_TH = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    weight_EH = torch.randn(E, H, device="cuda", dtype=torch.bfloat16) / H**0.5
    gate_GH, gate_G = torch.randn(2, H, device="cuda") / H**0.5, torch.zeros(2, device="cuda")
    y_NH = torch.randn(T * K, H, device="cuda", dtype=torch.bfloat16)

    def step():
        ids, weights, gates, _ = ops.route(
            x_TH, weight_EH, None, gate_GH, gate_G, K, True, "softmax", 1.0, False
        )
        offsets, order, inverse = ops.permute(ids, E)
        return ids, weights, gates, offsets, order, inverse, ops.combine(y_NH, inverse.view(T, K), weights)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        x_TH.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.parametrize("T", (16, 4096))
def test_nothing_waits_for_the_device(T):
    x_TH = torch.randn(T, 512, device="cuda", dtype=torch.bfloat16)
    weight_EH, gate_GH = torch.randn(64, 512, device="cuda"), torch.randn(1, 512, device="cuda")
    bias_G, y_NH = torch.zeros(1, device="cuda"), torch.zeros(T * 4, 512, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids, weights, *_ = ops.route(x_TH, weight_EH, None, gate_GH, bias_G, 4, False, "sigmoid", 1.0, True)
        inverse_N = ops.permute(ids, 64)[2]
        ops.combine(y_NH, inverse_N.view(T, 4), weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_the_one_that_runs():
    stream = torch.cuda.Stream()
    ids_TK = torch.zeros(4096, 8, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        ids_TK.fill_(5)
        offsets_E1 = ops.permute(ids_TK, 8)[0]
    stream.synchronize()
    assert offsets_E1.tolist() == [0] * 6 + [32768] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_run_there():
    ids_TK = random_ids(100, 4, 6).to("cuda:1")
    found = ops.permute(ids_TK, 6)
    assert torch.cuda.current_device() == 0
    assert all(t.device == ids_TK.device for t in found)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, ops.permute(ids_TK.to("cuda:0"), 6)))


@pytest.mark.parametrize("T", (0, 1, 1000))
def test_the_module_runs_forward_and_backward_bit_for_bit_twice(T):
    weights = [
        torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.05
        for s in ((60, 256), (60, 192, 256), (60, 256, 96))
    ]
    layer = FlexMoE(Router(weights[0], 4), Experts(*weights[1:]), backend="cuda")
    layer.personalize(3)
    x = torch.randn(T, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run():
        y = layer(x)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.personal.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def small_layer(H: int = 256, E: int = 8, K: int = 4, I: int = 64, device: str = "cuda") -> FlexMoE:
    generator = torch.Generator().manual_seed(0)
    router, gate_up, down = (
        (torch.randn(s, generator=generator) * s[-1] ** -0.5).to(device, torch.bfloat16)
        for s in ((E, H), (E, 2 * I, H), (E, H, I))
    )
    layer = FlexMoE(Router(router, K), Experts(gate_up, down))
    layer.personalize(1)
    return layer


def values_and_gradients(layer: FlexMoE, x_TH: torch.Tensor, backend: str) -> list[torch.Tensor]:
    layer.backend = backend
    x_TH = x_TH.detach().requires_grad_()
    y_TH = layer(x_TH)
    return [y_TH.detach(), *torch.autograd.grad(y_TH.sum(), [x_TH, *layer.personal.parameters()])]


@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_layer_runs_on_the_device_of_its_tensors(backend):
    x_TH = torch.randn(300, 256, dtype=torch.bfloat16)
    found, wanted = (
        values_and_gradients(small_layer(device=d), x_TH.to(d), backend) for d in ("cuda:1", "cuda:0")
    )
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, wanted))


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_the_layer_waits_for_what_its_stream_did_before(backend):
    layer, x_TH = small_layer(), torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    wanted = values_and_gradients(layer, x_TH, backend)
    late_TH, stream = torch.zeros_like(x_TH), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late_TH.copy_(x_TH)
        found = values_and_gradients(layer, late_TH, backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_the_last_of_two_to_the_31_elements_of_rows_is_what_it_is_alone():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    layer = small_layer(H=2048, K=8)
    x_TH = torch.randn(2**17 + 5, 2048, device="cuda", dtype=torch.bfloat16)
    y_TH, dx_TH, *_ = values_and_gradients(layer, x_TH, "cuda")
    alone_TH, dalone_TH, *_ = values_and_gradients(layer, x_TH[-32:], "cuda")
    # Other tiles sum in another order; bfloat16 rounds to 2^-9.
    for many, few in ((y_TH[-32:], alone_TH), (dx_TH[-32:], dalone_TH)):
        assert (many.float() - few.float()).norm() < 0.01 * few.float().norm()
