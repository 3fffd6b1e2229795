"""The least time a layer can take on a chip, from operations and bytes and the rates of the chip.

Letters: T tokens, H hidden, E experts, K chosen, I expert width, N = T*K rows, Is shared width.

    python -m benchmarks.roofline            prints ESTIMATES from the makers' published peak rates
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2


@dataclass(frozen=True)
class Chip:
    """Rates of a chip: dense bf16 matrix FLOP/s and bytes/s of device memory."""

    name: str
    flops: float
    bandwidth: float


# From the makers' data sheets (dense bf16, no sparsity): nothing here was measured.
PUBLISHED = (
    Chip("A100 SXM 80GB", 312e12, 2.039e12),
    Chip("H100 SXM", 989e12, 3.35e12),
    Chip("H200 SXM", 989e12, 4.8e12),
)


@dataclass(frozen=True)
class Layer:
    """A model's MoE layer. ``Is`` is the width of its shared expert, 0 for none."""

    name: str
    H: int
    I: int
    E: int
    K: int
    Is: int = 0


LAYERS = (
    Layer("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4, 5632),
    Layer("DeepSeek-MoE-16B", 2048, 1408, 64, 6, 2816),
    Layer("OLMoE", 2048, 1024, 64, 8),
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Layer("Mixtral-8x7B", 4096, 14336, 8, 2),
)


def forward_flops(layer: Layer, tokens: int, personal: int = 0) -> int:
    """Useful operations of the forward pass: three products of 2 H I a row, in every expert a token passes
    through."""
    return 6 * layer.H * tokens * (layer.K * layer.I + layer.Is + personal)


def backward_flops(layer: Layer, tokens: int, personal: int = 0) -> int:
    """Useful operations of the backward pass with frozen experts: dX alone; the personal expert also has
    dW."""
    return forward_flops(layer, tokens, personal) + 6 * layer.H * tokens * personal


def touched_experts(layer: Layer, tokens: int) -> float:
    """How many experts get a token, on average over balanced random routing."""
    return layer.E * (1 - (1 - layer.K / layer.E) ** tokens)


def forward_bytes(layer: Layer, tokens: int) -> float:
    """Bytes that must cross the memory bus once: x, y and the weights of the experts in use."""
    weights = 3 * layer.H * (touched_experts(layer, tokens) * layer.I + layer.Is)
    return BYTES * (2 * tokens * layer.H + weights)


def floor_seconds(layer: Layer, tokens: int, chip: Chip, backward: bool = False) -> float:
    """The larger of arithmetic time and memory time. With ``backward``, forward and backward together,
    nothing recomputed, the weights read in both."""
    flops, moved = forward_flops(layer, tokens), forward_bytes(layer, tokens)
    if backward:
        flops += backward_flops(layer, tokens)
        moved += moved + BYTES * tokens * layer.H
    return max(flops / chip.flops, moved / chip.bandwidth)


def main() -> None:
    print("ESTIMATES from published peak rates; real chips reach less, and nothing below was measured.\n")
    print(f"{'layer':20} {'T':>6} {'chip':>14} {'fwd us':>9} {'fwd+bwd us':>11} {'bound by':>10}")
    for layer in LAYERS:
        for tokens in (16, 128, 1024, 8192, 32768):
            for chip in PUBLISHED:
                fwd, both = (floor_seconds(layer, tokens, chip, b) * 1e6 for b in (False, True))
                compute = forward_flops(layer, tokens) / chip.flops * 1e6
                bound = "arithmetic" if fwd == compute else "memory"
                print(f"{layer.name:20} {tokens:6} {chip.name:>14} {fwd:9.1f} {both:11.1f} {bound:>10}")


if __name__ == "__main__":
    main()
