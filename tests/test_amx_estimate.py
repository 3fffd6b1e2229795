"""The arithmetic of the AMX estimate, by hand on a layer of one expert and with round rates."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import amx_estimate
from benchmarks.amx_estimate import QWEN, Loops, Machine, Parts, kernels
from benchmarks.roofline import Layer, forward_flops

ONE = Layer("one expert", H=64, I=32, E=1, K=1)
ROUND = Machine(cores=1, tile_flops=1024.0, bandwidth=1000.0, efficiency=1.0)  # one cycle a second
LOOPS = Loops(
    step_of_four=64.0, step_of_two=50.0, call_of_four=800.0, call_of_two=400.0, copy=10.0, nf4=(20.0, 30.0)
)


def test_the_clock_is_that_of_the_peak():
    assert ROUND.clock == 1.0
    assert Machine().clock == pytest.approx(3.15e12 / 1024)


def test_chances_of_rows_are_binomial():
    layer = Layer("four of which two", 32, 32, 4, 2)
    found = amx_estimate.row_probabilities(layer, 6)
    assert found == pytest.approx({n: math.comb(6, n) / 64 for n in range(7)})
    assert amx_estimate.row_probabilities(ONE, 5) == {5: 1.0}
    many = amx_estimate.row_probabilities(QWEN, 8192)
    assert sum(n * p for n, p in many.items()) == pytest.approx(8192 * 4 / 60)


@pytest.mark.parametrize(
    "tokens, products, copied",
    [
        # up: 2 strips x 2 steps, down: 2 strips x 1 step, sums in registers and no weight copied
        (16, 6 * 50, 0),
        (32, 6 * 64, 0),
        # beyond, eight steps make a call; 12 tiles of weights are copied once for every block of 256 rows
        (33, 6 * (100 + 50), 12 * 10),
        (256, 6 * 8 * 100, 12 * 10),
        (257, 6 * (8 * 100 + 50), 24 * 10),
    ],
)
def test_forward_adds_up_steps_and_copies(tokens, products, copied):
    found = kernels(ONE, tokens, "forward", machine=ROUND, loops=LOOPS)
    row_tiles = -(-tokens // 16)
    assert found.products == products
    # x: 2 tiles of 32 columns; hidden: 2 tiles of 16 columns; output: 4
    assert found.around == copied + row_tiles * (2 * 64 + 2 * LOOPS.swiglu + 4 * LOOPS.add_output)


def test_tiles_short_of_their_peak_take_longer_only_where_they_are_the_bound():
    half = Machine(cores=1, tile_flops=1024.0, bandwidth=1000.0, efficiency=0.5)
    four, two = (kernels(ONE, n, "forward", machine=half, loops=LOOPS).products for n in (32, 16))
    assert (four, two) == (6 * 4 * 16 / 0.5, 6 * 2 * 16 / 0.5)
    slow = Loops(step_of_two=90.0)
    assert kernels(ONE, 16, "forward", machine=half, loops=slow).products == 6 * 90


def test_codes_are_decoded_for_any_number_of_rows_and_take_their_own_bytes():
    plain, codes = (kernels(ONE, 16, "forward", weights, ROUND, LOOPS) for weights in ("bf16", "nf4"))
    assert codes.around - plain.around == 12 * 20
    assert plain.memory == pytest.approx((3 * 64 * 32 * 2 + 16 * 64 * 12) / 1000)
    assert plain.memory - codes.memory == pytest.approx(3 * 64 * 32 * (2 - 4.25 / 8) / 1000)


def test_recomputing_reads_gate_up_again_where_rows_are_many():
    weights = 3 * 64 * 32 * 2
    few, many = (amx_estimate.memory_bytes(n, ONE, "bf16", "again") for n in (32, 33))
    assert (few, many) == (weights, weights + 2 * 64 * 32 * 2)
    assert amx_estimate.memory_bytes(0, ONE, "bf16", "again") == 0


def test_backward_does_the_multiplications_of_forward_and_recomputing_two_thirds_more():
    loops = Loops(step_of_four=64.0, call_of_four=512.0)
    found = {
        part: kernels(ONE, 256, part, machine=ROUND, loops=loops).products
        for part in ("forward", "backward", "again")
    }
    assert found["forward"] == found["backward"] == 0.6 * found["again"]


def test_products_are_never_shorter_than_the_peak_allows():
    ideal = Machine(efficiency=1.0)
    for tokens in (64, 1024, 8192):
        least = forward_flops(QWEN, tokens) / (ideal.cores * ideal.tile_flops)
        assert kernels(QWEN, tokens, "forward", machine=ideal).products >= least


def test_the_range_runs_from_all_hidden_to_nothing_hidden():
    parts = Parts(products=2.0, around=1.0, memory=4.0)
    assert (parts.least, parts.middle, parts.most) == (4.0, 5.5, 7.0)
    both = parts + Parts(memory=1.0)
    assert (both.products, both.around, both.memory) == (2.0, 1.0, 5.0)


def test_the_table_says_that_it_is_an_estimate(capsys):
    amx_estimate.main()
    said = capsys.readouterr().out
    assert said.startswith("ESTIMATE: nothing below was measured")
    assert said.count("| bf16 |") == 15 and said.count("| int8 |") == said.count("| nf4 |") == 3
