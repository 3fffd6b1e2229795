"""The cpu backend on random layers: sizes, dtypes, instruction sets, memory modes and kinds of weights.

    python tests/test_cpu_random.py 5000       as many cases as you like, from another seed each time

Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

import random
import sys
from dataclasses import replace

import pytest
import torch
from cases import make_case, with_fixed_routing
from test_cpu_backend import DTYPES, ISAS, agree

from flex_kernels import Experts, Routed
from flex_kernels.cpu import fused, ops
from flex_kernels.quantize import quantize

BATCHES, CASES = 10, 100


def size(draw: random.Random, most: int) -> int:
    """Often next to a multiple of a vector or block, where kernels change their way."""
    edge = draw.choice([16, 32, 64, 128]) * draw.randint(1, 4) + draw.randint(-1, 1)
    return min(most, draw.choice([edge, draw.randint(1, most)]))


def check(seed: int) -> None:
    """One random layer, forward and backward, against the float64 reference."""
    draw = random.Random(seed)
    E = draw.choice([1, 2, 5, 9])
    sizes = {"T": draw.choice([0, 1, size(draw, 90)]), "H": size(draw, 140), "I": size(draw, 140), "E": E}
    sizes |= {
        "K": draw.randint(1, min(E, 4)),
        "personal_width": size(draw, 40),
        "shared_width": size(draw, 40),
    }
    case = make_case(
        **sizes,
        dtype=draw.choice(DTYPES),
        seed=seed,
        personal=draw.random() < 0.5,
        shared=draw.choice(["gated", "plain", "none"]),
    )
    case = with_fixed_routing(case)
    assert isinstance(case.router, Routed)
    if draw.random() < 0.3:
        # One expert gets every token, or some slots go nowhere.
        ids = torch.full_like(case.router.ids, draw.randrange(E + 1))
        case = replace(
            case, router=replace(case.router, ids=torch.where(torch.rand(ids.shape) < 0.7, ids, E))
        )
    kinds = draw.choice([None, ("int8", "int8"), ("nf4", "nf4"), ("nf4", "int8")])
    if kinds:
        weights = (case.experts.gate_up, case.experts.down)
        case = replace(case, experts=Experts(*(quantize(w, k) for w, k in zip(weights, kinds))))
    isa, threads = draw.choice(ISAS), draw.randint(1, 4)
    options = {"mix": draw.choice(["add", "convex"]), "save": draw.choice(["recompute", "preact"])}
    fewest, before = fused.FEWEST_ELEMENTS, torch.get_num_threads()
    # Often one batch of hidden rows, as small calls have it.
    fused.FEWEST_ELEMENTS = draw.choice([0, 2000, 1 << 30])
    ops.kernels.set_isa(isa)
    torch.set_num_threads(threads)
    # The error of a few numbers is a matter of luck; that of many is not.
    multiple = 4.0 if sizes["T"] * min(sizes["H"], sizes["I"]) > 500 else 40.0
    names = ("x", "router.weights", "personal.gate_up", "personal.gate_weight")
    try:
        agree(case, *names, multiple=multiple, **options)
    except AssertionError as error:
        raise AssertionError(
            f"seed {seed}: {sizes} {case.x_TH.dtype} {kinds} {isa} {options}: {error}"
        ) from error
    finally:
        fused.FEWEST_ELEMENTS = fewest
        ops.kernels.set_isa("auto")
        torch.set_num_threads(before)


@pytest.mark.skipif(not ISAS, reason="the native extension is not built")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_layers_match_the_reference(batch):
    for seed in range(batch * CASES, (batch + 1) * CASES):
        check(seed)


if __name__ == "__main__":
    first = random.SystemRandom().randrange(1 << 30)
    print(f"seeds from {first}")
    for number in range(int(sys.argv[1])):
        check(first + number)
