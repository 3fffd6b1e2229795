"""From a dense Llama to a Mixtral, layer by layer.

Two streams of hidden states run side by side through the calibration text: the dense model's and the
converted one's. At every layer the neurons are split, the router is fitted to predict each group's
contribution, and down_proj is refitted so that the converted stream comes back to the dense one, the errors
of earlier layers included.

Letters: B sequences, L tokens a sequence, T = B*L tokens, H hidden, M neurons, S shared, E experts, N
neurons an expert, K chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .neurons import cluster_neurons, random_partition, shared_neurons
from .ridge import RidgeSums
from .tied import TiedMoE

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Progress = Callable[[str, float], None]
SLICE_TOKENS = 2048
CLUSTER_TOKENS = 2048


@dataclass(frozen=True)
class Recipe:
    """Every choice of the conversion. The dense neurons minus ``shared`` split evenly into ``experts``.

    Args:
        experts, chosen: E and K.
        shared: neurons copied into every expert.
        partition: how the others are grouped: "coactivation", or the control "random".
        router: "ridge", or the control "uniform" (zeros: always the first experts).
        refit: whether down_proj is fitted anew.
        router_strength, refit_strength: ridge penalties, relative to the mean of the Gram matrix's diagonal.
        logit_scale: factor on the router; small, so that the chosen experts' weights are nearly equal.
        sequences, length: text for the layers' fits, in sequences and tokens a sequence.
        steps, rows, learning_rate: updates of the recovery, sequences an update, Adam's peak rate. The
            recovery uses steps * rows further sequences: on text that the fits saw, they look better than
            they are.
        seed: of the clustering and of the choice of tasks.
    """

    experts: int = 4
    chosen: int = 2
    shared: int = 1024
    partition: str = "coactivation"
    router: str = "ridge"
    refit: bool = True
    router_strength: float = 1e-2
    refit_strength: float = 0.3
    logit_scale: float = 0.1
    sequences: int = 64
    length: int = 256
    steps: int = 30
    rows: int = 4
    learning_rate: float = 3e-4
    seed: int = 0

    def check(self, neurons: int) -> None:
        if self.experts < 1:
            raise ValueError(f"experts={self.experts} must be at least 1")
        if not 1 <= self.chosen <= self.experts:
            raise ValueError(f"chosen={self.chosen} is outside 1..{self.experts}, the number of experts")
        if not 0 <= self.shared < neurons or (neurons - self.shared) % self.experts:
            raise ValueError(
                f"shared={self.shared} leaves {neurons - self.shared} of {neurons} neurons, "
                f"which do not split into experts={self.experts} equal groups"
            )
        if self.partition not in ("coactivation", "random"):
            raise ValueError(f"partition={self.partition!r}: expected 'coactivation' or 'random'")
        if self.router not in ("ridge", "uniform"):
            raise ValueError(f"router={self.router!r}: expected 'ridge' or 'uniform'")


def convert_layers(
    dense: LlamaForCausalLM,
    ids_BL: Tensor,
    recipe: Recipe,
    progress: Progress | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """The dense model with every MLP replaced by a fitted ``TiedMoE``.

    Args:
        dense: float32 Llama; left as it is.
        ids_BL: calibration tokens, int64.
        compute_dtype: of the matrix products that the calibration text runs through; sums and residuals stay
            float32.

    Returns: the converted model (float32) and for each layer: the share of tokens that the least and the
        most used expert gets, how much of the routed contribution (squared norm) the router's choice and the
        best choice keep, and the relative error of the residual stream after the layer.

    Raises:
        ValueError: the recipe does not fit the model, or activations are not finite.
    """
    recipe.check(dense.config.intermediate_size)
    moe = copy.deepcopy(dense)
    dense_BLH = dense.model.embed_tokens(ids_BL).float()
    moe_BLH = dense_BLH.clone()
    rotary = dense.model.rotary_emb(dense_BLH, torch.arange(ids_BL.shape[1])[None])
    rotary = tuple(part.to(compute_dtype) for part in rotary)
    rows = max(1, SLICE_TOKENS // ids_BL.shape[1])
    slices = [slice(i, i + rows) for i in range(0, ids_BL.shape[0], rows)]
    reports = []
    with torch.no_grad():
        for number, (layer, moe_layer) in enumerate(zip(dense.model.layers, moe.model.layers, strict=True)):
            fast = copy.deepcopy(layer).to(compute_dtype)
            fit = LayerFit(layer.mlp, recipe)
            for part in slices:
                for stream_BLH in (dense_BLH, moe_BLH):
                    x = layer.input_layernorm(stream_BLH[part]).to(compute_dtype)
                    stream_BLH[part] += fast.self_attn(x, position_embeddings=rotary, attention_mask=None)[0]
                x = layer.post_attention_layernorm(dense_BLH[part]).to(compute_dtype)
                dense_BLH[part] += fast.mlp(x)
                x = layer.post_attention_layernorm(moe_BLH[part]).to(compute_dtype)
                fit.add(
                    x.flatten(0, 1),
                    (dense_BLH[part] - moe_BLH[part]).flatten(0, 1),
                    dense_BLH[part].flatten(0, 1),
                )
            moe_layer.mlp, y_TH, report = fit.solve()
            moe_BLH += y_TH.view_as(moe_BLH)
            error_BL = (moe_BLH - dense_BLH).square().sum(-1) / dense_BLH.square().sum(-1)
            report["stream_error"] = float(error_BL.mean().sqrt())
            reports.append(report)
            if progress:
                progress("converting layers", (number + 1) / len(moe.model.layers))
    return moe, reports


def split_without_fitting(dense: LlamaForCausalLM, recipe: Recipe) -> LlamaForCausalLM:
    """The dense model with its neurons split at random, all experts always chosen: the same function."""
    recipe.check(dense.config.intermediate_size)
    moe = copy.deepcopy(dense)
    for layer in moe.model.layers:
        gate_MH, up_MH, down_HM = dense_weights(layer.mlp)
        choice_M = random_partition(gate_MH.shape[0] - recipe.shared, recipe.experts, recipe.seed)
        order_M = torch.cat([torch.arange(recipe.shared), recipe.shared + choice_M.argsort(stable=True)])
        router_EH = torch.zeros(recipe.experts, gate_MH.shape[1])
        layer.mlp = TiedMoE(
            gate_MH[order_M],
            up_MH[order_M],
            down_HM[:, order_M],
            router_EH,
            recipe.shared,
            chosen=recipe.experts,
        )
    return moe.requires_grad_(False)


def dense_weights(mlp: Any) -> tuple[Tensor, Tensor, Tensor]:
    """gate_MH, up_MH, down_HM of a Llama MLP."""
    return mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data


class LayerFit:
    """Splits one MLP and fits its router and down_proj to what calibration shows."""

    def __init__(self, mlp: Any, recipe: Recipe):
        self.recipe = recipe
        self.gate_MH, self.up_MH, self.down_HM = dense_weights(mlp)
        self.slices: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, x_TH: Tensor, target_TH: Tensor, stream_TH: Tensor) -> None:
        """One slice: the layer's input, the output it should give, the residual stream this is added to."""
        gate_MH, up_MH = self.gate_MH.to(x_TH.dtype), self.up_MH.to(x_TH.dtype)
        a_TM = silu(linear(x_TH, gate_MH)) * linear(x_TH, up_MH)
        # RMSNorm divides what follows by the stream's size, so that is the scale on which an error counts.
        weight_T = 1 / stream_TH.square().mean(1).clamp_min(1e-12)
        self.slices.append((x_TH, a_TM, target_TH, weight_T))

    def partition(self) -> Tensor:
        """Order of the neurons [M]: shared first, then expert by expert."""
        recipe = self.recipe
        size_M = self.down_HM.norm(dim=0)
        step = max(1, sum(x.shape[0] for x, *_ in self.slices) // CLUSTER_TOKENS)
        contribution_TM = torch.cat(
            [
                (a[::step].float() * size_M).abs() * weight[::step].sqrt()[:, None]
                for _, a, _, weight in self.slices
            ]
        )
        if not contribution_TM.isfinite().all():
            raise ValueError("the calibration data produced non-finite activations")
        shared_S = shared_neurons(contribution_TM, recipe.shared)
        keep_M = torch.ones(size_M.shape[0], dtype=torch.bool)
        keep_M[shared_S] = False
        routed_R = keep_M.nonzero()[:, 0]
        if recipe.partition == "random":
            choice_R = random_partition(len(routed_R), recipe.experts, recipe.seed)
        else:
            choice_R = cluster_neurons(contribution_TM[:, routed_R].T, recipe.experts, recipe.seed)
        return torch.cat([shared_S, routed_R[choice_R.argsort(stable=True)]])

    def solve(self) -> tuple[TiedMoE, Tensor, dict[str, float]]:
        """The fitted block, its output on all slices [T, H] in float32, and the report."""
        recipe, order_M = self.recipe, self.partition()
        hidden, neurons = self.down_HM.shape
        E, S = recipe.experts, recipe.shared
        down_HM = self.down_HM[:, order_M].clone()
        fast_down_HM = down_HM.to(self.slices[0][0].dtype)
        sums = RidgeSums(hidden, E)
        norms = []
        for i, (x_TH, a_TM, target_TH, weight_T) in enumerate(self.slices):
            a_TM = a_TM[:, order_M]
            self.slices[i] = (x_TH, a_TM, target_TH, weight_T)
            parts = zip(a_TM[:, S:].chunk(E, 1), fast_down_HM[:, S:].chunk(E, 1), strict=True)
            norms.append(torch.stack([linear(a, down).float().norm(dim=1) for a, down in parts], 1))
            mean_T1 = norms[-1].mean(1, keepdim=True).clamp_min(1e-9)
            sums.add(x_TH, norms[-1] / mean_T1 - 1)
        router_EH = torch.zeros(E, hidden)
        if recipe.router == "ridge":
            router_EH = sums.solve(recipe.router_strength).T.contiguous() * recipe.logit_scale
        block = TiedMoE(
            self.gate_MH[order_M].clone(), self.up_MH[order_M].clone(), down_HM, router_EH, S, recipe.chosen
        )
        block.requires_grad_(False)
        if recipe.refit:
            sums = RidgeSums(neurons, hidden)
        features, routes = [], []
        for x_TH, a_TM, target_TH, weight_T in self.slices:
            routes.append(block.route(x_TH.float()))
            features.append(block.mask(a_TM, routes[-1]))
            if recipe.refit:
                sums.add(features[-1], target_TH - linear(features[-1], fast_down_HM).float(), weight_T)
        if recipe.refit:
            block.down_HM.add_(sums.solve(recipe.refit_strength).T)
        down_HM = block.down_HM.to(fast_down_HM.dtype)
        y_TH = torch.cat([linear(f_TM, down_HM).float() for f_TM in features])
        return block, y_TH, self.report(torch.cat(norms), torch.cat(routes))

    def report(self, norm_TE: Tensor, route_TE: Tensor) -> dict[str, float]:
        power_TE = norm_TE.square()
        load_E = (route_TE > 0).float().mean(0)
        best_T = power_TE.topk(self.recipe.chosen, dim=1).values.sum(1)
        return {
            "least_used": float(load_E.min()),
            "most_used": float(load_E.max()),
            "kept": float(((power_TE * (route_TE > 0)).sum(1) / power_TE.sum(1)).mean()),
            "kept_at_best": float((best_T / power_TE.sum(1)).mean()),
        }
