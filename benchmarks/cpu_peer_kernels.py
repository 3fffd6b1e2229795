"""Routed experts, forward and with backward, in every implementation that ``benchmarks.cpu_peers`` compares.

Letters: T tokens, H hidden, K chosen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import Layer
from benchmarks.timing import cpu_info
from flex_kernels import Experts, Routed, flex_moe
from flex_kernels.types import Save


@dataclass(frozen=True)
class Problem:
    """Tokens whose routing is decided, and the gradient of their output."""

    x_TH: Tensor
    ids_TK: Tensor  # int32
    weights_TK: Tensor  # float32
    dy_TH: Tensor


def make_problem(layer: Layer, tokens: int) -> Problem:
    generator = torch.Generator().manual_seed(tokens)
    x_TH, dy_TH = (torch.randn(tokens, layer.shape.H, generator=generator).bfloat16() for _ in "xy")
    weights_TK, ids_TK = F.linear(x_TH, layer.router).float().softmax(-1).topk(layer.shape.K)
    if layer.shape.normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Problem(x_TH, ids_TK.int(), weights_TK, dy_TH)


@dataclass(frozen=True)
class Kernel:
    """``forward`` gives y [T, H]; ``step``, where there is a backward, (y, dx [T, H], dweights [T, K])."""

    forward: Callable[[Problem], Tensor]
    step: Callable[[Problem], tuple[Tensor, ...]] | None = None

    def run(self, mode: str) -> Callable[[Problem], tuple[Tensor, ...]] | None:
        return self.step if mode == "backward" else lambda p: (self.forward(p),)


def differentiable(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Kernel:
    """The kernel of ``call(x_TH, ids_TK, weights_TK)``, which autograd knows."""

    @torch.no_grad()
    def forward(p: Problem) -> Tensor:
        return call(p.x_TH, p.ids_TK, p.weights_TK)

    def step(p: Problem) -> tuple[Tensor, ...]:
        x_TH, weights_TK = p.x_TH.detach().requires_grad_(), p.weights_TK.detach().requires_grad_()
        y_TH = call(x_TH, p.ids_TK, weights_TK)
        y_TH.backward(p.dy_TH)
        assert x_TH.grad is not None and weights_TK.grad is not None
        return y_TH.detach(), x_TH.grad, weights_TK.grad

    return Kernel(forward, step)


def flex(layer: Layer, keep: Save) -> Kernel:
    experts = Experts(layer.gate_up, layer.down)
    return differentiable(lambda x, ids, w: flex_moe(x, Routed(ids, w), experts, save=keep, backend="cpu"))


def stock(layer: Layer, implementation: str) -> Kernel:
    """transformers' experts over the same weights; ``implementation``: "eager" or "grouped_mm"."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    s = layer.shape
    config = Qwen2MoeConfig(
        hidden_size=s.H, num_experts=s.E, num_experts_per_tok=s.K, moe_intermediate_size=s.I
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen2MoeExperts(config)
    experts.load_state_dict({"gate_up_proj": layer.gate_up, "down_proj": layer.down}, assign=True)
    experts.requires_grad_(False)
    return differentiable(lambda x, ids, w: experts(x, ids.long(), w.to(x.dtype)))


def vllm_library(folder: Path, flags: set[str]) -> Path:
    """The file that vllm itself would load on a processor with these ``flags``; ``_C`` if there is but one.

    Raises:
        FileNotFoundError: the folder holds no such file.
    """
    best = "_C" if "avx512_bf16" in flags else "_C_AVX512" if "avx512f" in flags else "_C_AVX2"
    for name in (best, "_C"):
        for file in sorted(folder.glob(f"{name}.*so")):
            return file
    raise FileNotFoundError(f"vllm has no compiled library {best} for this processor in its package")


def vllm_ops() -> Any:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'vllm'")
    torch.ops.load_library(
        str(vllm_library(Path(spec.origin).parent, set(cpu_info().get("flags", "").split())))
    )
    return torch.ops._C


def vllm(layer: Layer, isa: str) -> Kernel:
    """``isa``: "vec", vector instructions of any processor, or "amx"."""
    ops = vllm_ops()
    packed = []
    for weight in (layer.gate_up, layer.down):
        packed.append(torch.empty_like(weight))
        ops.prepack_moe_weight(weight, packed[-1], isa)

    def forward(p: Problem) -> Tensor:
        y_TH = torch.empty_like(p.x_TH)
        ops.cpu_fused_moe(y_TH, p.x_TH, *packed, None, None, p.weights_TK, p.ids_TK, False, "silu", isa)
        return y_TH

    return Kernel(forward)


def vllm_fused_experts(layer: Layer) -> Kernel:
    ops = vllm_ops()
    gate_up, down = (ops.convert_weight_packed(weight) for weight in (layer.gate_up, layer.down))

    def forward(p: Problem) -> Tensor:
        y_TH = torch.empty_like(p.x_TH)
        # Method 0 is "not quantised": no scale, zero point, block size, bias, alpha or limit; weights packed.
        ops.fused_experts_cpu(y_TH, p.x_TH, gate_up, down, p.weights_TK, p.ids_TK, 0, *[None] * 10, True)
        return y_TH

    return Kernel(forward)


def kt_kernel(layer: Layer, most: int) -> Kernel:
    """``most``: the largest number of tokens of a call; buffers are made for it."""
    from kt_kernel import AMXSFTMoEWrapper
    from kt_kernel.sft.base import KExpertsSFTBuffer

    s = layer.shape
    KExpertsSFTBuffer.clear_cache()  # one for all layers, kept by number of tokens alone: another shape fails
    moe = AMXSFTMoEWrapper(
        layer_idx=0,
        num_experts=s.E,
        num_experts_per_tok=s.K,
        hidden_size=s.H,
        moe_intermediate_size=s.I,
        num_gpu_experts=0,
        cpuinfer_threads=torch.get_num_threads(),
        threadpool_count=1,
        weight_path="",
        chunked_prefill_size=most,
        method="AMXBF16_SFT_SkipLoRA",
    )
    gate, up = layer.gate_up.chunk(2, dim=1)
    moe.load_weights_from_tensors(gate, up, layer.down, torch.arange(s.E))

    def forward(p: Problem) -> Tensor:
        return moe.forward(p.x_TH, p.ids_TK, p.weights_TK, save_for_backward=False)

    def step(p: Problem) -> tuple[Tensor, ...]:
        y_TH = moe.forward(p.x_TH, p.ids_TK, p.weights_TK, save_for_backward=True)
        return y_TH, *moe.backward(p.dy_TH)

    return Kernel(forward, step)


Build = Callable[[Layer, int], Kernel]
OURS: dict[str, Build] = {
    "flex recompute": lambda layer, most: flex(layer, "recompute"),
    "flex preact": lambda layer, most: flex(layer, "preact"),
    "transformers eager": lambda layer, most: stock(layer, "eager"),
    "transformers grouped_mm": lambda layer, most: stock(layer, "grouped_mm"),
}
PEERS: dict[str, Build] = {
    "vllm vec": lambda layer, most: vllm(layer, "vec"),
    "vllm amx": lambda layer, most: vllm(layer, "amx"),
    "vllm fused_experts": lambda layer, most: vllm_fused_experts(layer),
    "kt-kernel": kt_kernel,
}
MODULES = {name: "kt_kernel" if name == "kt-kernel" else "vllm" for name in PEERS}
