"""An ESTIMATE of the AMX kernels' times on two cores. Nothing was measured: they have never run on AMX.

Adds up cycles of the compiled loops and bytes of memory, by the rates measured on a prototype of such a
machine. Two ends of a range: memory and tiles wait for each other in full, or one hides in the other. Not in
it: routing, starting threads, weights read again that the last-level cache does not hold, and sums of tokens
that leave it.

Letters: T tokens, H hidden, E experts, K chosen, I expert width, n rows of one expert.

    python -m benchmarks.amx_estimate
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from benchmarks.roofline import Layer

ROW_TILE, PAIR, STEP, DEPTH, BLOCK_ROWS = 16, 32, 32, 256, 256  # as in csrc/cpu/tile_products.h
TILE_PRODUCT = 16  # cycles of one TDPBF16PS where they follow each other; 52 until its sum is there
THIN_ROWS = 32  # up to here backward's second reading of gate_up comes from the last-level cache (fused.py)
STORED_BITS = {"bf16": 16.0, "int8": 8.0, "nf4": 4.25}


@dataclass(frozen=True)
class Machine:
    """Two cores with AMX. Defaults: the measured prototype that the target table comes with (issue 3)."""

    cores: int = 2
    tile_flops: float = 3.15e12  # FLOP/s a core
    bandwidth: float = 30.6e9  # bytes/s of DRAM, all cores together
    # Of the peak of the tiles, what a 2 x 2 kernel reaches from the second-level cache: 44 to 60 %.
    efficiency: float = 0.52

    @property
    def clock(self) -> float:
        """Hz that the peak stands for: a tile product is 16 x 16 x 32 multiply-adds."""
        return self.tile_flops / (2 * ROW_TILE * ROW_TILE * STEP / TILE_PRODUCT)


@dataclass(frozen=True)
class Loops:
    """Cycles of the loops that GCC 12 makes of the kernels, by llvm-mca 22, with all lines in the first-level
    cache.

    The first four: model sapphirerapids. It knows no tile instructions, so loads, stores and shuffles stand
    in for them at rates taken as known: a load of a tile 8 cycles, a store 16, a product 16 and 52 until its
    sum is there. The others: model icelake-server, where 512-bit arithmetic has a server's ports.
    """

    step_of_four: float = 64.6  # a step of 2 x 2 tiles: bound by the products
    step_of_two: float = 52.9  # 2 x 1 or 1 x 2 tiles: bound by the wait for a sum
    call_of_four: float = 584.0  # eight steps with sums loaded before and stored after
    call_of_two: float = 513.0
    copy: float = 37.0  # a tile of weights [16, 32] into a strip
    interleave: float = 44.0  # the same in pairs of rows
    int8: tuple[float, float] = (70.0, 101.0)  # both from codes
    nf4: tuple[float, float] = (72.0, 94.0)
    transpose: float = 64.0  # a tile of x [16, 32]: bound by its 64 shuffles
    pack: float = 37.0  # a tile of dy or dz, copied
    swiglu: float = 354.0  # [16, 16] hidden values: bound by the divisions
    preact: float = 166.0  # [16, 16] of gate and of up, turned and written
    swiglu_backward: float = 795.0  # the same bound
    turn_z: float = 128.0  # [16, 16] of gate and of up recomputed: bound by shuffles
    add_output: float = 120.0  # [16, 16] sums of `down`, turned and added to the output
    add_dx: float = 65.0

    def strip(self, weights: str, paired: bool) -> float:
        """Cycles to bring a weight tile into a strip."""
        cycles = {"bf16": (self.copy, self.interleave), "int8": self.int8, "nf4": self.nf4}[weights]
        return cycles[paired]


@dataclass(frozen=True)
class Parts:
    """Seconds that all cores are busy with: products of tiles, everything else in the kernels, memory."""

    products: float = 0.0
    around: float = 0.0
    memory: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.products + other.products, self.around + other.around, self.memory + other.memory)

    @property
    def tiles(self) -> float:
        return self.products + self.around

    @property
    def least(self) -> float:
        """One hides in the other."""
        return max(self.tiles, self.memory)

    @property
    def most(self) -> float:
        """Neither hides."""
        return self.tiles + self.memory

    @property
    def middle(self) -> float:
        return (self.least + self.most) / 2


def row_probabilities(layer: Layer, tokens: int) -> dict[int, float]:
    """How many rows an expert gets when each token chooses K of E at random: a binomial distribution."""
    p = layer.K / layer.E

    def log_choose(n: int) -> float:
        return math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)

    if p == 1:
        return {tokens: 1.0}
    found = {
        n: math.exp(log_choose(n) + n * math.log(p) + (tokens - n) * math.log1p(-p))
        for n in range(tokens + 1)
    }
    return {n: chance for n, chance in found.items() if chance > 1e-12}


def blocks(rows: int) -> list[int]:
    """Rows of the blocks that a strip is packed for once each."""
    return [min(BLOCK_ROWS, rows - start) for start in range(0, rows, BLOCK_ROWS)]


def product_cycles(
    rows: int, strips: int, depth: int, direct: bool, loops: Loops, efficiency: float
) -> float:
    """Cycles in products of ``rows`` rows with ``strips`` strips of 32, reduced over ``depth``. ``direct``:
    sums stay in registers where 32 rows are all."""
    steps = math.ceil(depth / STEP)
    total = 0.0
    for block in blocks(rows):
        in_registers = direct and block <= PAIR
        full, rest = divmod(math.ceil(block / ROW_TILE), 2)
        for pairs, tiles, step, call in (
            (full, 4, loops.step_of_four, loops.call_of_four),
            (rest, 2, loops.step_of_two, loops.call_of_two),
        ):
            # What the second-level cache costs beyond the loop itself was measured as a share of the peak.
            static = step if in_registers else call / (DEPTH / STEP)
            total += pairs * strips * steps * max(static, tiles * TILE_PRODUCT / efficiency)
    return total


def expert_cycles(
    rows: int, layer: Layer, weights: str, loops: Loops, efficiency: float, part: str
) -> tuple[float, float]:
    """(products, everything else) of one expert in ``part``: "forward", "preact" (forward that keeps z),
    "backward" (z kept) or "again" (z recomputed)."""
    H, I = layer.H, layer.I
    tiles = math.ceil(rows / ROW_TILE)
    passes = len(blocks(rows))
    weight_tiles = math.ceil(H / STEP) * math.ceil(I / ROW_TILE)  # of one of gate, up and down
    plain = weights == "bf16"

    def run(strips: int, depth: int, direct: bool) -> float:
        return product_cycles(rows, strips, depth, direct, loops, efficiency)

    def strip(matrices: int, paired: bool) -> float:
        if plain and not paired and rows <= PAIR:
            return 0.0
        return passes * matrices * weight_tiles * loops.strip(weights, paired)

    hidden, out = tiles * I / ROW_TILE, tiles * H / ROW_TILE  # tiles of 16 x 16
    of_x = tiles * H / STEP  # tiles of x, transposed for each task of up to 1,024 columns, half in backward
    up = run(2 * I // PAIR, H, plain)
    if part in ("forward", "preact"):
        around = strip(3, False) + math.ceil(I / 1024) * of_x * loops.transpose
        around += (
            hidden * (loops.swiglu + (loops.preact if part == "preact" else 0.0)) + out * loops.add_output
        )
        return up + run(H // PAIR, I, plain), around
    products = run(I // PAIR, H, False) + run(H // PAIR, 2 * I, False)
    around = strip(3, True) + hidden * loops.swiglu_backward + out * loops.add_dx
    around += (math.ceil(I / 512) * of_x + math.ceil(H / 512) * tiles * 2 * I / STEP) * loops.pack
    if part == "again":
        products += up
        around += strip(2, False) + math.ceil(I / 512) * of_x * loops.transpose + hidden * loops.turn_z
    return products, around


def memory_bytes(rows: int, layer: Layer, weights: str, part: str) -> float:
    """Bytes of one expert's weights that come from DRAM in ``part``, all of them once a reading."""
    if rows == 0:
        return 0.0
    readings = 5 / 3 if part == "again" and rows > THIN_ROWS else 1.0
    return readings * 3 * layer.H * layer.I * STORED_BITS[weights] / 8


def kernels(
    layer: Layer,
    tokens: int,
    part: str,
    weights: str = "bf16",
    machine: Machine | None = None,
    loops: Loops | None = None,
) -> Parts:
    """The estimate of one part for all experts, rows in bf16. Of activations, what must cross the bus once:
    x or dy and x, the float32 sums and the result, and z where it is kept."""
    machine, loops = machine or Machine(), loops or Loops()
    products = around = moved = 0.0
    for rows, chance in row_probabilities(layer, tokens).items():
        a, b = expert_cycles(rows, layer, weights, loops, machine.efficiency, part)
        products, around = products + chance * a, around + chance * b
        moved += chance * memory_bytes(rows, layer, weights, part)
    activations = tokens * layer.H * (12 if part in ("forward", "preact") else 14)
    if part in ("preact", "backward"):
        activations += tokens * layer.K * 2 * layer.I * 2
    busy = machine.cores * machine.clock
    return Parts(
        layer.E * products / busy,
        layer.E * around / busy,
        (layer.E * moved + activations) / machine.bandwidth,
    )


QWEN = Layer("Qwen1.5-MoE-A2.7B, routed experts", 2048, 1408, 60, 4)
# Milliseconds, forward and forward + backward, of the better of eager and grouped_mm and of the prototype,
# and the least ratios to reach: all from issue 3, which has no times for T=256.
TRANSFORMERS = {64: (60, 158), 1024: (129, 324), 2048: (170, 506), 8192: (540, 1895)}
PROTOTYPE = {64: (34, 71), 1024: (49, 117), 2048: (73, 169), 8192: (263, 581)}
MUST = {64: (1.7, 2.2), 256: (1.9, 2.2), 1024: (2.6, 2.7), 2048: (2.3, 2.9), 8192: (2.0, 3.2)}
MUST_CODES = {"int8": (2.7, 3.3), "nf4": (2.3, 2.9)}


def line(weights: str, tokens: int, what: str, parts: Parts, both: bool) -> str:
    ms = [1e3 * x for x in (parts.memory, parts.products, parts.around, parts.least, parts.most)]
    text = f"| {weights} | {tokens} | {what} | " + " | ".join(f"{x:.0f}" for x in ms[:3])
    text += f" | {ms[3]:.0f} to {ms[4]:.0f} | "
    if tokens in TRANSFORMERS:
        reference = TRANSFORMERS[tokens][both]
        ratios = [reference / t for t in (ms[4], ms[3], 1e3 * parts.middle)]
        text += "{:.2f} to {:.2f}; {:.2f}".format(*ratios)
    must = MUST_CODES[weights] if weights in MUST_CODES else MUST[tokens]
    prototype = PROTOTYPE[tokens][both] if weights == "bf16" and tokens in PROTOTYPE else ""
    return f"{text} | {must[both]} | {prototype} |"


def main() -> None:
    print("ESTIMATE: nothing below was measured on these kernels.")
    print("Milliseconds on 2 cores; ratios to transformers' times (issue 3): longest, shortest and")
    print("middle time.\n")
    print("| weights | T | | memory | products | other work | time | ratio; middle | must | prototype |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for weights, many in (("bf16", list(MUST)), ("int8", [64]), ("nf4", [64])):
        for tokens in many:
            forward, keeping, backward, again = (
                kernels(QWEN, tokens, part, weights) for part in ("forward", "preact", "backward", "again")
            )
            print(line(weights, tokens, "forward", forward, False))
            print(line(weights, tokens, "+ backward, preact", keeping + backward, True))
            print(line(weights, tokens, "+ backward, recompute", forward + again, True))
    print("\nForward, T=1024, NF4 against bf16, and the products at 44 and 60 % of the peak, ms:")
    for weights in ("bf16", "nf4"):
        found = [
            kernels(QWEN, 1024, "forward", weights, replace(Machine(), efficiency=e)) for e in (0.44, 0.60)
        ]
        print(f"  {weights}: " + ", ".join(f"{1e3 * p.least:.0f} to {1e3 * p.most:.0f}" for p in found))


if __name__ == "__main__":
    main()
