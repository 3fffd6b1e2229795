"""The row kernels of the CPU backend in plain torch: the same names and results as
:mod:`flex_kernels.cpu.native`.

Used when the native extension is not built. Slower and with more temporaries, never different in meaning.
Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates, I expert width, N = T*K rows in
expert order, n rows of one block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def empty_like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype)


def give_back_pages() -> int:
    return 0


def choose(
    logits_TR: Tensor,
    experts: int,
    bias_E: Tensor | None,
    top_k: int,
    normalize: bool,
    score: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Top-k of the first ``experts`` columns: (ids_TK int32, weights_TK float32); ties go to the lowest
    index.
    """
    logits_TE = logits_TR[:, :experts]
    p_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    choice_TE = p_TE if bias_E is None else p_TE + bias_E.float()
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = p_TE.gather(1, ids_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK.int(), weights_TK * scale


def open_gates(logits_TR: Tensor, experts: int, bias_G: Tensor) -> Tensor:
    """sigmoid of the columns after ``experts``, plus a bias each: [G, T] float32."""
    return torch.sigmoid(logits_TR[:, experts:] + bias_G.float()).t().contiguous()


def sort_rows(
    ids_TK: Tensor, weights_TK: Tensor, closed_T: Tensor | None, experts: int
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Stable counting sort of the slots by expert: (E + 1 offsets, order [N] int32, tokens [N] int32, scale
    [N] float32).

    ``order[offsets[e]:offsets[e + 1]]`` are the flat slots t*K + k that chose e, ``tokens`` their t, and
    ``scale`` their weights, times ``closed_T`` of the token where given. Ids outside [0, E) are left out:
    they take no row, and only rows before ``offsets[E]`` are in use.
    """
    flat_N = ids_TK.reshape(-1).long()
    flat_N = torch.where((flat_N < 0) | (flat_N >= experts), experts, flat_N)
    counts_E = torch.bincount(flat_N, minlength=experts + 1)[:experts]
    order_N = flat_N.sort(stable=True).indices
    tokens_N = order_N.div(max(1, ids_TK.shape[1]), rounding_mode="floor").int()
    scale_TK = weights_TK if closed_T is None else weights_TK * closed_T[:, None]
    return [0, *counts_E.cumsum(0).tolist()], order_N.int(), tokens_N, scale_TK.reshape(-1)[order_N]


def unsort_rows(values_N: Tensor, order_N: Tensor, used: int, shape: torch.Size) -> Tensor:
    """The first ``used`` values at the flat places of [*shape] that ``order_N`` gives them; 0 elsewhere."""
    out = torch.zeros(shape)
    out.view(-1)[order_N[:used]] = values_N[:used]
    return out


def gather_rows(source_TH: Tensor, tokens_n: Tensor, out_nH: Tensor) -> None:
    torch.index_select(source_TH, 0, tokens_n, out=out_nH)


def swiglu(z_n2I: Tensor, out_nI: Tensor) -> None:
    """out = silu(gate) * up, computed in float32."""
    gate_nI, up_nI = z_n2I.float().chunk(2, dim=-1)
    out_nI.copy_(F.silu(gate_nI) * up_nI)


def swiglu_backward(
    z_n2I: Tensor, da_nI: Tensor, scale_n: Tensor, dz_n2I: Tensor, dscale_n: Tensor, scaled_nI: Tensor | None
) -> None:
    """With a = silu(gate) * up and y = scale * down(a), given da = dy @ down:

    dscale = <da, a> a row; dz = scale * da * da/dz; scaled = scale * a, when asked for. ``dz_n2I`` may be
    ``z_n2I``.
    """
    gate_nI, up_nI = z_n2I.float().chunk(2, dim=-1)
    da_nI, scale_n1 = da_nI.float(), scale_n[:, None]
    sig_nI = torch.sigmoid(gate_nI)
    silu_nI = gate_nI * sig_nI
    a_nI = silu_nI * up_nI
    dscale_n.copy_((da_nI * a_nI).sum(-1))
    if scaled_nI is not None:
        scaled_nI.copy_(scale_n1 * a_nI)
    da_nI = scale_n1 * da_nI
    dz_n2I.copy_(torch.cat([da_nI * up_nI * sig_nI * (1 + gate_nI - silu_nI), da_nI * silu_nI], dim=-1))


def scatter_add(rows_nH: Tensor, tokens_n: Tensor, scale_n: Tensor | None, out_TH: Tensor) -> None:
    """out[tokens[n]] += scale[n] * rows[n] in float32, in the order of n."""
    rows_nH = rows_nH.float()
    out_TH.index_add_(0, tokens_n, rows_nH if scale_n is None else rows_nH * scale_n[:, None])
