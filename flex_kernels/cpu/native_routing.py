"""The native routing kernels on tensors: checks what the extension takes on trust, then hands over addresses
and sizes.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates, R = E + G columns, N = T*K rows in
expert order.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from flex_kernels.cpu.binding import DTYPES, _cpu_ops, address, dtype_code


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
    tokens, columns = logits_TR.shape
    if not 1 <= top_k <= experts <= columns:
        raise ValueError(
            f"top_k={top_k} must be in 1..{experts}, the experts of logits {list(logits_TR.shape)}"
        )
    ids_TK = torch.empty(tokens, top_k, dtype=torch.int32)
    weights_TK = torch.empty(tokens, top_k)
    bias_E = None if bias_E is None else bias_E.float().contiguous()
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, 2, experts)
    _cpu_ops.choose(
        address("logits", logits_TR, torch.float32, (tokens, columns)),
        columns,
        address("bias", bias_E, torch.float32, (experts,)),
        tokens,
        experts,
        top_k,
        normalize,
        score == "sigmoid",
        scale,
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    return ids_TK, weights_TK


def open_gates(logits_TR: Tensor, experts: int, bias_G: Tensor) -> Tensor:
    """sigmoid of the columns after ``experts``, plus a bias each: [G, T] float32."""
    tokens, columns = logits_TR.shape
    count = columns - experts
    gates_GT = torch.empty(count, tokens)
    bias_G = bias_G.float().contiguous()
    _cpu_ops.open_gates(
        address("logits", logits_TR, torch.float32, (tokens, columns)),
        columns,
        experts,
        address("bias", bias_G, torch.float32, (count,)),
        tokens,
        count,
        gates_GT.data_ptr(),
        torch.get_num_threads(),
    )
    return gates_GT


def router_product(x_TH: Tensor, weight_EH: Tensor, gate_weight_GH: Tensor) -> Tensor:
    """x @ rows^T for the rows of a router, then of gates, which are float32: [T, R] float32."""
    out_TR = torch.empty(x_TH.shape[0], weight_EH.shape[0] + gate_weight_GH.shape[0])
    _cpu_ops.router_product(
        dtype_code("x", x_TH),
        address("x", x_TH, x_TH.dtype, tuple(x_TH.shape)),
        *x_TH.shape,
        *router_rows(x_TH, weight_EH, gate_weight_GH),
        out_TR.data_ptr(),
        torch.get_num_threads(),
    )
    return out_TR


def router_input_gradient(
    d_TR: Tensor, weight_EH: Tensor, gate_weight_GH: Tensor, other_TH: Tensor | None, dx_TH: Tensor
) -> None:
    """dx = d @ rows, plus ``other_TH``; the rows as of :func:`router_product`."""
    shape = tuple(dx_TH.shape)
    rows = weight_EH.shape[0] + gate_weight_GH.shape[0]
    _cpu_ops.router_input_gradient(
        dtype_code("dx", dx_TH),
        address("d", d_TR, torch.float32, (shape[0], rows)),
        *shape,
        *router_rows(dx_TH, weight_EH, gate_weight_GH),
        address("other", other_TH, dx_TH.dtype, shape),
        address("dx", dx_TH, dx_TH.dtype, shape),
        torch.get_num_threads(),
    )


def router_rows_gradient(d_TR: Tensor, columns: range, x_TH: Tensor) -> Tensor:
    """d[:, columns]^T @ x in float32."""
    (tokens, hidden), all_columns = x_TH.shape, d_TR.shape[1]
    if columns.step != 1 or not 0 <= columns.start <= columns.stop <= all_columns:
        raise ValueError(f"columns must be neighbours within [0, {all_columns}], got {columns}")
    out = torch.empty(len(columns), hidden)
    _cpu_ops.router_rows_gradient(
        dtype_code("x", x_TH),
        address("d", d_TR, torch.float32, (tokens, all_columns)) + columns.start * d_TR.element_size(),
        all_columns,
        address("x", x_TH, x_TH.dtype, (tokens, hidden)),
        tokens,
        hidden,
        len(columns),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def router_rows(like_TH: Tensor, weight_EH: Tensor, gate_weight_GH: Tensor) -> tuple[int, int, int, int, int]:
    """Rows that tensors like ``like_TH`` meet, as ``RouterRows`` in csrc/cpu/kernels.h."""
    hidden = like_TH.shape[1]
    wide = torch.float32 if weight_EH.dtype == torch.float32 else like_TH.dtype
    return (
        DTYPES[wide],
        address("router weight", weight_EH, wide, (weight_EH.shape[0], hidden)),
        weight_EH.shape[0],
        address("gate weight", gate_weight_GH, torch.float32, (gate_weight_GH.shape[0], hidden)),
        gate_weight_GH.shape[0],
    )


def choose_backward(
    logits_TR: Tensor,
    ids_TK: Tensor,
    grad_weights_TK: Tensor,
    added_TE: Tensor | None,
    experts: int,
    normalize: bool,
    score: str,
    scale: float,
) -> None:
    """The first ``experts`` logits become their gradients: of what :func:`choose` made of them, and
    ``added_TE``.
    """
    (tokens, columns), (_, top_k) = logits_TR.shape, ids_TK.shape
    if not 1 <= experts <= columns:
        raise ValueError(f"experts={experts} must be in 1..{columns}, the columns of the logits")
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, top_k)
    _cpu_ops.choose_backward(
        address("logits", logits_TR, torch.float32, (tokens, columns)),
        columns,
        address("ids", ids_TK, torch.int32, (tokens, top_k)),
        address("grad_weights", grad_weights_TK, torch.float32, (tokens, top_k)),
        address("grad_logits", added_TE, torch.float32, (tokens, experts)),
        tokens,
        experts,
        top_k,
        normalize,
        score == "sigmoid",
        scale,
        scratch.data_ptr(),
        threads,
    )


def open_gates_backward(gates_GT: Tensor, grad_gates_GT: Tensor, logits_TR: Tensor) -> Tensor:
    """The last G columns of ``logits_TR`` become the gradients of what :func:`open_gates` made of them;
    returns those of the biases, [G] float32.
    """
    (count, tokens), columns = gates_GT.shape, logits_TR.shape[1]
    if count > columns:
        raise ValueError(f"{count} gates are more than the columns of logits {list(logits_TR.shape)}")
    start = (columns - count) * logits_TR.element_size()
    totals_G = torch.empty(count)
    _cpu_ops.open_gates_backward(
        address("gates", gates_GT, torch.float32, (count, tokens)),
        address("grad_gates", grad_gates_GT, torch.float32, (count, tokens)),
        tokens,
        count,
        address("logits", logits_TR, torch.float32, (tokens, columns)) + start,
        columns,
        totals_G.data_ptr(),
    )
    return totals_G


def sort_rows(
    ids_TK: Tensor, weights_TK: Tensor, closed_T: Tensor | None, experts: int
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Stable counting sort of the slots by expert: (E + 1 offsets, order [N] int32, tokens [N] int32, scale
    [N] float32).

    ``order[offsets[e]:offsets[e + 1]]`` are the flat slots t*K + k that chose e, ``tokens`` their t, and
    ``scale`` their weights, times ``closed_T`` of the token where given. Ids outside [0, E) are left out:
    they take no row, and rows from ``offsets[E]`` on are zero.
    """
    ids_TK = ids_TK.int().contiguous()
    (tokens, top_k), slots = ids_TK.shape, ids_TK.numel()
    if slots >= 2**31:
        raise ValueError(
            f"ids {list(ids_TK.shape)} has {slots} slots; at most {2**31 - 1} can be sorted at a time"
        )
    offsets = array("i", bytes(4 * (experts + 1)))
    order_N, tokens_N = torch.empty(2, slots, dtype=torch.int32).unbind()
    scale_N = torch.empty(slots)
    _cpu_ops.sort_rows(
        ids_TK.data_ptr(),
        address("weights", weights_TK, torch.float32, (tokens, top_k)),
        address("closed", closed_T, torch.float32, (tokens,)),
        tokens,
        top_k,
        experts,
        offsets.buffer_info()[0],
        order_N.data_ptr(),
        tokens_N.data_ptr(),
        scale_N.data_ptr(),
    )
    return offsets.tolist(), order_N, tokens_N, scale_N


def unsort_rows(values_N: Tensor, order_N: Tensor, used: int, shape: torch.Size) -> Tensor:
    """The first ``used`` values at the flat places of [*shape] that ``order_N`` gives them; 0 elsewhere."""
    out = torch.empty(shape)
    slots = out.numel()
    if not 0 <= used <= slots:
        raise ValueError(f"used={used} must be in 0..{slots}")
    _cpu_ops.unsort_rows(
        address("values", values_N, torch.float32, (slots,)),
        address("order", order_N, torch.int32, (slots,)),
        used,
        slots,
        out.data_ptr(),
    )
    return out
