"""The CUDA routing kernels on tensors: route, permute, combine. Sources: csrc/cuda.

Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates, N = T*K rows in expert order,
R columns of the thin product, M row tiles.

Outputs are allocated by torch; nothing waits for the device, and only torch's allocator is asked for memory,
so every function can run on any stream of any device and be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from flex_kernels.row_order import part_sizes, parts_of

# The product is fused into the routing kernel up to this many tokens, while all its rows stay below this many
# bytes: each token reads them all from L2. Both are estimates, to be set by measurement.
FUSED_TOKENS = 64
FUSED_BYTES = 1 << 20

# Steps between the three 16-bit parts of a float32 value: the rounding error of one part, so that the next
# part is of the same magnitude (csrc/cuda/split_rows.cu).
PART_SCALE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PARTS = 3

# Each is opened by a lane of a warp (csrc/cuda/route.cu).
MAX_GATES = 32


def current_stream(device_index: int) -> int:
    """The stream as an integer, without the object around it that torch.cuda.current_stream makes."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def part_addresses(packed: Tensor, sizes: tuple[int, ...]) -> list[int]:
    """Where the parts of an int32 array begin."""
    first = packed.data_ptr()
    return [first + 4 * before for before in accumulate(sizes[:-1], initial=0)]


class RoutingKernels:
    """The kernels of one native module on torch tensors.

    Args:
        native: ``flex_kernels._cuda_ops``, or the same sources built for the host by the tests.
    """

    def __init__(self, native: ModuleType):
        self.native = native
        self.codes = {
            torch.float32: native.FLOAT32,
            torch.bfloat16: native.BFLOAT16,
            torch.float16: native.FLOAT16,
        }

    def launch(self, kernel: str, device: torch.device, *arguments: object) -> None:
        """Enqueue ``kernel`` on the current stream of ``device``.

        Raises:
            RuntimeError: the launch failed; names the kernel and CUDA's reason.
        """
        function = getattr(self.native, kernel)
        if device.type != "cuda":
            error = function(0, 0, *arguments)
        elif device.index == torch.cuda.current_device():
            error = function(device.index, current_stream(device.index), *arguments)
        else:
            with torch.cuda.device(device):
                error = function(device.index, current_stream(device.index), *arguments)
        if error:
            reason = self.native.error_string(error)
            raise RuntimeError(f"CUDA kernel {kernel} on {device} failed: {reason} (error {error})")

    def check(
        self, name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
    ) -> None:
        fits = t.shape == shape and t.dtype in dtypes and t.is_contiguous()
        if fits and t.device == like.device and t.device.type == self.native.DEVICE_TYPE:
            return
        if t.device.type != self.native.DEVICE_TYPE or t.device != like.device:
            wanted = like.device if like.device.type == self.native.DEVICE_TYPE else self.native.DEVICE_TYPE
            raise ValueError(f"{name} is on {t.device}, this kernel wants it on {wanted}")
        layout = "" if t.is_contiguous() else " with strides " + str(list(t.stride()))
        dtype = str(t.dtype).removeprefix("torch.")
        accepted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"{name} must be contiguous {list(shape)} {accepted}, got {list(t.shape)} {dtype}{layout}"
        )

    def check_routing(self, experts: int, top_k: int, gates: int) -> None:
        if experts > self.native.MAX_EXPERTS:
            raise ValueError(
                f"{experts} experts exceed the {self.native.MAX_EXPERTS} that the CUDA kernels take"
            )
        if not 0 <= top_k <= min(experts, self.native.MAX_TOP_K):
            limit = min(experts, self.native.MAX_TOP_K)
            raise ValueError(f"top_k={top_k} is not between 0 and {limit} (of {experts} experts)")
        if gates > MAX_GATES:
            raise ValueError(f"{gates} gates exceed the {MAX_GATES} that the CUDA kernels take")

    def route(
        self,
        x_TH: Tensor,
        weight_EH: Tensor,
        bias_E: Tensor | None,
        gate_weight_GH: Tensor,
        gate_bias_G: Tensor,
        top_k: int,
        normalize: bool,
        score: str,
        scale: float,
        want_logits: bool,
        histogram_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Router and gates: (ids_TK int32, weights_TK, gates_GT, logits_TE or [0, E], all float32).

        Args:
            x_TH: float32, bfloat16 or float16, contiguous.
            weight_EH: any float dtype; E may be 0 (gates alone, top_k = 0). Products accumulate in float32,
                and a float32 row counts in full precision.
            bias_E: added to the scores for the choice only, or None.
            gate_weight_GH, gate_bias_G: float32, any strides; G may be 0.
            top_k, normalize, score, scale: as in :class:`flex_kernels.Router`.
            histogram_E: int32 on x's device, or None; the tokens of each expert are added to it.

        A NaN score ranks above every number, as in ``torch.sort``, and so shows in the weights.

        Raises:
            ValueError: E > 512, G > 32, top_k > 32 or > E, or a tensor that does not fit.
        """
        (T, H), E, G = x_TH.shape, weight_EH.shape[0], gate_weight_GH.shape[0]
        self.check_routing(E, top_k, G)
        self.check("x", x_TH, (T, H), tuple(self.codes), x_TH)
        # A gate may be a column or a row of another tensor.
        gate_weight_GH, gate_bias_G = gate_weight_GH.contiguous(), gate_bias_G.contiguous()
        self.check("gate_weight", gate_weight_GH, (G, H), (torch.float32,), x_TH)
        self.check("gate_bias", gate_bias_G, (G,), (torch.float32,), x_TH)
        if histogram_E is not None:
            self.check("histogram", histogram_E, (E,), (torch.int32,), x_TH)
        f32, device = torch.float32, x_TH.device
        ids_TK = torch.empty(T, top_k, dtype=torch.int32, device=device)
        weights_TK = torch.empty(T, top_k, dtype=f32, device=device)
        gates_GT = torch.empty(G, T, dtype=f32, device=device)
        logits_TE = torch.empty(T if want_logits else 0, E, dtype=f32, device=device)
        if not T or not (E or G):
            return ids_TK, weights_TK, gates_GT, logits_TE
        weight_EH = weight_EH.to(x_TH.dtype if weight_EH.dtype == x_TH.dtype else f32).contiguous()
        self.check("router.weight", weight_EH, (E, H), (x_TH.dtype, f32), x_TH)
        if bias_E is not None:
            bias_E = bias_E.float().contiguous()
            self.check("router.bias", bias_E, (E,), (f32,), x_TH)
        settings = self.native.Routing(E, top_k, G, normalize, score == "sigmoid", scale)
        output = self.native.RoutingOutput(
            address(ids_TK),
            address(weights_TK),
            address(gates_GT),
            address(logits_TE) if want_logits else 0,
            address(histogram_E),
        )
        if fits_fused(x_TH, weight_EH, gate_weight_GH):
            self.launch(
                "route_fused",
                device,
                address(x_TH),
                self.codes[x_TH.dtype],
                address(weight_EH),
                self.codes[weight_EH.dtype],
                address(bias_E),
                address(gate_weight_GH),
                address(gate_bias_G),
                T,
                H,
                settings,
                output,
            )
        else:
            logits_TR, parts, gate_parts, part_scale = self.thin_product(x_TH, weight_EH, gate_weight_GH)
            self.launch(
                "route",
                device,
                address(logits_TR),
                logits_TR.stride(0),
                parts,
                gate_parts,
                part_scale,
                address(bias_E),
                address(gate_bias_G),
                T,
                settings,
                output,
            )
        return ids_TK, weights_TK, gates_GT, logits_TE

    def thin_product(
        self, x_TH: Tensor, weight_EH: Tensor, gate_weight_GH: Tensor
    ) -> tuple[Tensor, int, int, float]:
        """x [Wr; w_g; w_s]^T as ONE product: (logits_TR float32, router parts, gate parts, part scale).

        16-bit x meets float32 rows as three 16-bit parts each, so that x is read once and the tensor cores
        do the work; the kernel ``route`` adds the parts.
        """
        E, G = weight_EH.shape[0], gate_weight_GH.shape[0]
        if x_TH.dtype == torch.float32:
            rows_RH = torch.cat([weight_EH, gate_weight_GH]) if G else weight_EH
            return x_TH @ rows_RH.t(), 1, 1, 1.0
        parts = 1 if weight_EH.dtype == x_TH.dtype else PARTS
        if parts == 1 and not G:
            return product_float32(x_TH, weight_EH), 1, 1, 1.0
        part_scale = PART_SCALE[x_TH.dtype]
        # A multiple of 8 keeps the rows of the result aligned for cuBLAS.
        R = -(-(parts * E + PARTS * G) // 8) * 8
        rows_RH = x_TH.new_empty(R, x_TH.shape[1])
        self.launch(
            "split_rows",
            x_TH.device,
            address(weight_EH),
            self.codes[weight_EH.dtype],
            address(gate_weight_GH),
            address(rows_RH),
            self.codes[x_TH.dtype],
            E,
            G,
            x_TH.shape[1],
            R,
            part_scale,
        )
        return product_float32(x_TH, rows_RH), parts, PARTS, part_scale

    def permute(self, ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """(offsets_E1, order_N, inverse_N) of :class:`flex_kernels.row_order.RowOrder`."""
        found = parts_of(self.sort_rows(ids_TK, experts, 0), part_sizes(ids_TK.numel(), experts, 0))
        return found.offsets_E1, found.order_N, found.inverse_N

    def sort_rows(self, ids_TK: Tensor, experts: int, block_rows: int) -> Tensor:
        """Stable sort of the slots by expert, and with ``block_rows`` > 0 the table of row tiles.

        Args:
            ids_TK: int32, contiguous, any shape; an id outside [0, experts) marks a slot to skip.
            experts: E, from 1 to 512.
            block_rows: rows a tile, or 0 for no table.

        Returns:
            A :class:`flex_kernels.row_order.RowOrder` in one piece. ``order`` is -1 past offsets[E]; unused
            tiles have expert -1 and row 0.

        One launch up to 2048 slots, two above. Deterministic.

        Raises:
            ValueError: E or ids do not fit, or there are 2^31 slots or more.
        """
        N, device = ids_TK.numel(), ids_TK.device
        self.check("ids", ids_TK, tuple(ids_TK.shape), (torch.int32,), ids_TK)
        if not 1 <= experts <= self.native.MAX_EXPERTS:
            raise ValueError(f"experts={experts} is not between 1 and {self.native.MAX_EXPERTS}")
        if N >= 2**31:
            raise ValueError(f"ids holds {N} slots; rows are numbered in int32: split the batch")
        if block_rows < 0:
            raise ValueError(f"block_rows={block_rows} is negative")
        sizes = part_sizes(N, experts, block_rows)
        packed = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        inverse, order, tile_expert, tile_row, offsets, tile_count = part_addresses(packed, sizes)
        chunks = self.native.permute_chunks(N)
        counts_CE1 = None
        if chunks:
            counts_CE1 = torch.empty(chunks * (experts + 1), dtype=torch.int32, device=device)
        self.launch(
            "permute",
            device,
            address(ids_TK),
            N,
            experts,
            address(counts_CE1),
            offsets,
            order,
            inverse,
            *((tile_expert, tile_row, tile_count) if block_rows else (0, 0, 0)),
            sizes[2],
            block_rows,
        )
        return packed

    def combine(
        self,
        y_NH: Tensor,
        inverse_TK: Tensor,
        weights_TK: Tensor | None,
        personal_TH: Tensor | None = None,
        gate_T: Tensor | None = None,
        shared_TH: Tensor | None = None,
        shared_gate_T: Tensor | None = None,
        mix: str = "add",
    ) -> Tensor:
        """y [T, H] in y_NH's dtype: (1 or 1 - g) (sum_k w_k y[inverse_k] + g_s shared) + g personal.

        A factor that is None is 1, a part that is None is absent. With all factors None this is the sum that
        turns gradients of rows into gradients of tokens. Sums run in float32, in the order of k, then
        shared, then personal.

        Args:
            y_NH: float32, bfloat16 or float16, rows in expert order; rows that no slot points to are not
            read. inverse_TK: int32, the row of each slot, negative for none.
            weights_TK: float32, or None.
            personal_TH, shared_TH: in y_NH's dtype, or None.
            gate_T, shared_gate_T: float32, or None.
            mix: "add" or "convex" (1 - g on all but personal).

        Raises:
            ValueError: a tensor does not fit; all must be contiguous.
        """
        if inverse_TK.ndim != 2 or y_NH.ndim != 2:
            raise ValueError(
                f"inverse must be [T, K] and y [N, H], got {list(inverse_TK.shape)} and {list(y_NH.shape)}"
            )
        if mix not in ("add", "convex"):
            raise ValueError(f"mix={mix!r} is not one of 'add', 'convex'")
        (T, K), (N, H) = inverse_TK.shape, y_NH.shape
        self.check("y", y_NH, (N, H), tuple(self.codes), y_NH)
        self.check("inverse", inverse_TK, (T, K), (torch.int32,), y_NH)
        for name, t, shape, dtype in (
            ("weights", weights_TK, (T, K), torch.float32),
            ("personal", personal_TH, (T, H), y_NH.dtype),
            ("gate", gate_T, (T,), torch.float32),
            ("shared", shared_TH, (T, H), y_NH.dtype),
            ("shared_gate", shared_gate_T, (T,), torch.float32),
        ):
            if t is not None:
                self.check(name, t, shape, (dtype,), y_NH)
        out_TH = y_NH.new_empty(T, H)
        self.launch(
            "combine",
            y_NH.device,
            address(y_NH),
            address(inverse_TK),
            address(weights_TK),
            address(personal_TH),
            address(gate_T),
            address(shared_TH),
            address(shared_gate_T),
            address(out_TH),
            T,
            H,
            K,
            mix == "convex",
            self.codes[y_NH.dtype],
        )
        return out_TH


def fits_fused(x_TH: Tensor, weight_EH: Tensor, gate_weight_GH: Tensor) -> bool:
    """Whether the kernel with the product inside serves these: few tokens, small rows, 16-byte accesses."""
    tensors = (x_TH, weight_EH, gate_weight_GH)
    return (
        x_TH.shape[0] <= FUSED_TOKENS
        and weight_EH.nbytes + gate_weight_GH.nbytes <= FUSED_BYTES
        and x_TH.shape[1] * x_TH.element_size() % 16 == 0
        and all(address(t) % 16 == 0 for t in tensors)
    )


def product_float32(x_TH: Tensor, rows_RH: Tensor) -> Tensor:
    """x @ rows^T of 16-bit operands with float32 accumulation and result, [T, R]."""
    if x_TH.is_cuda:
        return torch.mm(x_TH, rows_RH.t(), out_dtype=torch.float32)
    return x_TH.float() @ rows_RH.float().t()


@lru_cache(maxsize=1)
def kernels() -> RoutingKernels:
    """The kernels of the built extension.

    Raises:
        ImportError: it is not built; :func:`flex_kernels.cuda.status` says what is missing.
    """
    return RoutingKernels(importlib.import_module("flex_kernels._cuda_ops"))


def route(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:meth:`RoutingKernels.route` of the built extension."""
    return kernels().route(*args, **kwargs)


def permute(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`RoutingKernels.permute` of the built extension."""
    return kernels().permute(ids_TK, experts)


def combine(*args, **kwargs) -> Tensor:
    """:meth:`RoutingKernels.combine` of the built extension."""
    return kernels().combine(*args, **kwargs)
