"""The feed-forward block between dense and Mixtral: all neurons once, a router that masks groups of them.

Experts that share neurons would compute those once per chosen expert. As long as the shared neurons are
equal in all experts, and the k weights of a token sum to 1, the layer equals this one, at a dense layer's
cost:

    y = W_S a_S + sum_{e chosen} k w_e W_e a_e,      a = silu(G x) * (U x)

so fitting and distillation happen in this form and ``expert_tensors`` writes Mixtral's at the end.

Letters: T tokens, H hidden, M neurons, S shared neurons (first in M), E experts, N routed neurons an expert,
K chosen, I = S + N expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class TiedMoE(nn.Module):
    """Drop-in for a Llama MLP. Neurons are ordered shared first, then expert by expert.

    Args:
        gate_MH, up_MH, down_HM: the dense block's weights in that order, float32.
        router_EH: router without bias.
        shared: S.
        chosen: K.
    """

    def __init__(
        self, gate_MH: Tensor, up_MH: Tensor, down_HM: Tensor, router_EH: Tensor, shared: int, chosen: int
    ):
        super().__init__()
        self.gate_MH = nn.Parameter(gate_MH)
        self.up_MH = nn.Parameter(up_MH)
        self.down_HM = nn.Parameter(down_HM)
        self.router_EH = nn.Parameter(router_EH)
        self.shared = shared
        self.chosen = chosen

    @property
    def experts(self) -> int:
        return self.router_EH.shape[0]

    @property
    def width(self) -> int:
        """I, neurons of one expert."""
        return self.shared + (self.gate_MH.shape[0] - self.shared) // self.experts

    def route(self, x_TH: Tensor) -> Tensor:
        """k * w_e of the chosen experts, 0 elsewhere: [T, E], float32, each row summing to K."""
        p_TE = linear(x_TH, self.router_EH).float().softmax(-1)
        s_TK, ids_TK = p_TE.topk(self.chosen, dim=-1)
        s_TK = self.chosen * s_TK / s_TK.sum(-1, keepdim=True)
        return torch.zeros_like(p_TE).scatter(1, ids_TK, s_TK)

    def activations(self, x_TH: Tensor) -> Tensor:
        """a [T, M] before any masking."""
        return silu(linear(x_TH, self.gate_MH)) * linear(x_TH, self.up_MH)

    def features(self, x_TH: Tensor) -> Tensor:
        """Activations after routing [T, M]: what down_proj sees."""
        return self.mask(self.activations(x_TH), self.route(x_TH))

    def mask(self, a_TM: Tensor, weight_TE: Tensor) -> Tensor:
        a_TEN = a_TM[:, self.shared :].unflatten(1, (self.experts, -1)) * weight_TE[:, :, None].to(a_TM.dtype)
        return torch.cat([a_TM[:, : self.shared], a_TEN.flatten(1)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        return linear(self.features(x_TH), self.down_HM).view_as(x)

    def expert_tensors(self) -> tuple[Tensor, Tensor]:
        """Mixtral's tensors: gate_up [E, 2I, H], gate rows first, and down [E, H, I]."""

        def per_expert(weight_MH: Tensor) -> Tensor:
            shared_ESH = weight_MH[: self.shared].expand(self.experts, -1, -1)
            routed_ENH = weight_MH[self.shared :].unflatten(0, (self.experts, -1))
            return torch.cat([shared_ESH, routed_ENH], dim=1)

        scale_M = torch.ones(self.down_HM.shape[1])
        scale_M[self.shared :] = self.chosen
        gate_up = torch.cat([per_expert(self.gate_MH), per_expert(self.up_MH)], dim=1)
        down = per_expert((self.down_HM * scale_M).T).transpose(1, 2)
        return gate_up.contiguous(), down.contiguous()
