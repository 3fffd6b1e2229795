"""Which plan a call gets: pinned from sizes alone, or tuned once and read back from disk. No GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from flex_kernels.quantize import quantize  # noqa: E402
from flex_kernels.triton import tiles, tune  # noqa: E402
from flex_kernels.triton.codes import suited  # noqa: E402
from flex_kernels.triton.tiles import Plan, Tile  # noqa: E402

META = torch.device("meta")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("rows", "experts", "m"),
    [(4, 60, 16), (32 * 8, 8, 32), (33 * 8, 8, 64), (32768, 60, 128), (10**7, 1, 128)],
)
def test_the_pinned_plan_grows_with_the_rows_an_expert_gets(rows, experts, m):
    assert tiles.pinned_plan(90, 2, rows, experts).m == m


def test_chips_of_a_later_generation_take_the_latest_known_plans():
    assert tiles.pinned_plan(100, 2, 32768, 8) == tiles.pinned_plan(90, 2, 32768, 8)
    for small in (86, 89, 120, 121):
        assert tiles.pinned_plan(small, 2, 32768, 8) == tiles.pinned_plan(80, 2, 32768, 8)


def test_a_persistent_grid_is_no_larger_than_the_chip_or_the_work():
    tile = Tile(128, 128, 64, per_sm=2)
    assert tiles.grid_size(1000, tile, META) == 2, "a device without a count has one multiprocessor"
    assert tiles.grid_size(1, tile, META) == 1
    assert tiles.grid_size(1000, Tile(128, 128, 64), META) == 1000


def test_token_counts_share_plans_by_powers_of_two():
    assert [tune.bucket(t) for t in (1, 16, 17, 8192, 8193)] == [16, 16, 32, 8192, 16384]


def test_a_written_plan_is_read_back_beside_the_others(tmp_path):
    path = tmp_path / "deep" / "plans.json"
    first, second = tiles.HOPPER[128], tiles.AMPERE[16]
    tune.write_plan(path, "a", first)
    tune.write_plan(path, "b", second)
    assert tune.read_plans(path) == {"a": first, "b": second}
    assert [p.name for p in path.parent.iterdir()] == ["plans.json"], "no temporary file is left"


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", '{"a": {"up": 3}}', '{"a": {"up": {"m": 16, "colour": 1}}}', json.dumps({"a": {}})]
)
def test_a_damaged_file_of_plans_is_named_and_ignored(tmp_path, text):
    path = tmp_path / "plans.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignoring the tuned plans in .*plans.json"):
        assert tune.read_plans(path) == {}


def test_the_fastest_tile_wins_and_one_that_does_not_fit_is_passed_over():
    slow, fast, large = Tile(16, 32, 32), Tile(16, 64, 32), Tile(16, 128, 32)

    def run(tile):
        if tile is large:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return tile

    milliseconds = {slow: 2.0, fast: 1.0}
    found = tune.time_tiles(run, [slow, large, fast], lambda job: milliseconds[job()])
    assert found == [(1.0, fast), (2.0, slow)]
    assert tune.time_tiles(run, [large], lambda job: milliseconds[job()]) == []


def test_a_tile_that_does_not_compile_is_passed_over_and_named():
    def run(tile):
        if tile.n == 64:
            raise RuntimeError("PassManager::run failed")

    failed = []
    found = tune.time_tiles(run, [Tile(16, 64, 32), Tile(16, 32, 32)], lambda job: job() or 1.0, failed)
    assert found == [(1.0, Tile(16, 32, 32))]
    assert len(failed) == 1 and "n=64" in failed[0] and "PassManager::run failed" in failed[0]


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_there_are_few_candidates_and_the_pinned_tiles_are_among_them(capability, coded):
    found = tiles.candidates(capability, 2, coded)
    pinned = tiles.HOPPER if capability == 90 else tiles.AMPERE
    assert max(len(c) for c in found.values()) <= 16
    for m, plan in pinned.items():
        assert {t.m for t in found[m]} == {m}
        if not coded or m == 128:
            assert {plan.up, plan.down, plan.down_backward, plan.up_backward} <= set(found[m])


def test_rows_are_copied_only_for_the_products_that_gather_them():
    found = tiles.candidates(90, 2)[128]
    many, one = (tune.key_of(torch.bfloat16, 2048, 1408, *EK, 8192) for EK in ((60, 4), (1, 1)))
    copying = {name: sum(t.copy_rows for t in tune.tiles_of(name, many, found)) for name in tune.PRODUCTS}
    assert copying == {"up": 1, "down": 0, "down_backward": 1, "up_backward": 0}
    assert all(not t.copy_rows for name in tune.PRODUCTS for t in tune.tiles_of(name, one, found))
    assert all(t.tma for t in found if t.copy_rows)


@pytest.mark.parametrize("kind", tune.KINDS)
def test_candidates_for_codes_are_used_as_they_are(kind):
    """Larger ones would be cut to the same tile, and measured twice."""
    weight = quantize(torch.randn(2, 128, 128), kind)
    for m, found in tiles.candidates(90, 2, coded=True).items():
        kept = [suited(tile, weight) for tile in found]
        assert len(set(kept)) == len(found), m
        if m < 128:
            assert kept == found


def test_only_the_row_blocks_near_the_pinned_one_are_tried():
    found = tiles.candidates(90, 2)
    assert list(tiles.near(found, 32768, 60)) == [64, 128], "546 rows an expert"
    assert list(tiles.near(found, 512, 60)) == [16, 32], "9 rows an expert"
    assert list(tiles.near(found, 60 * 40, 60)) == [32, 64, 128]


def test_plans_for_codes_have_keys_of_their_own_and_those_of_plain_weights_stay():
    sizes = (torch.bfloat16, 2048, 1408, 60, 4, 8000)
    assert tune.key_text(tune.key_of(*sizes)) == "bfloat16 H2048 I1408 E60 K4 T8192"
    assert tune.key_text(tune.key_of(*sizes, "nf4")) == "bfloat16 nf4 H2048 I1408 E60 K4 T8192"
    plain = torch.randn(1, 64, 64)
    eight, four = (quantize(plain, kind) for kind in tune.KINDS)
    pairs = [(plain, plain), (eight, eight), (four, four), (eight, plain), (plain, four)]
    texts = ["plain", "int8", "nf4", "int8+plain", "plain+nf4"]
    assert [tune.weights_text(*pair) for pair in pairs] == texts


def test_a_tuned_plan_serves_its_own_weights_alone(tmp_path, monkeypatch):
    path, device = tmp_path / "plans.json", torch.device("cuda", 0)
    monkeypatch.setattr(tune, "cache_file", lambda device: path)
    monkeypatch.setattr(tune, "capability_of", lambda device: 90)
    mine = tiles.same(Tile(64, 32, 64, stages=2))
    sizes = (torch.bfloat16, 256, 128, 8, 2, 512)
    tune.write_plan(path, tune.key_text(tune.key_of(*sizes, "int8")), mine)
    tune.plan_for.cache_clear()
    try:
        assert tune.plan_for(device, *sizes, "int8") == mine
        pinned = tiles.pinned_plan(90, 2, 1024, 8)
        assert tune.plan_for(device, *sizes) == tune.plan_for(device, *sizes, "nf4") == pinned
    finally:
        tune.plan_for.cache_clear()


MEASURED = """
import json, sys, torch
from flex_kernels.triton import tune
from flex_kernels.triton.tiles import Tile

small, large = Tile(16, 32, 32, group=1), Tile(16, 64, 32, group=1)
runs = []

def narrow_is_fast(job):
    job()
    runs.append(job.args[0].n)
    return float(runs[-1])

found = {}
for weights, E, K in (("plain", 5, 2), ("int8", 5, 2), ("nf4", 5, 2), ("int8+nf4", 5, 2), ("plain", 1, 1)):
    key = tune.key_of(torch.float32, 64, 64, E, K, 9, weights)
    best = tune.fastest_plan(torch.device("cpu"), key, {16: [large, small]}, narrow_is_fast)
    narrow = best.plan == tune.Plan(*[small] * 4)
    timed = {name: [(ms, tile.n) for ms, tile in ran] for name, ran in best.timed.items()}
    found[f"{weights} {E}"] = [narrow, best.milliseconds, best.tried, best.failed, timed]

shares = []
tune.time_tiles = lambda run, tiles, time_ms: shares[-1].append((run(tiles[0]) is not None, tiles[0].n))
for part in range(3):
    shares.append([])
    tune.compile_share(torch.device("cpu"), key, {16: [large, small]}, part, 3)
print(json.dumps([found, runs, shares]))
"""


def test_every_product_of_every_kind_of_weights_is_measured_with_every_tile():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, runs, shares = json.loads(done.stdout)
    assert [len(share) for share in shares] == [3, 3, 2], "each of four products with each of two tiles once"
    assert sorted(one for share in shares for one in share) == [[True, 32]] * 4 + [[True, 64]] * 4
    assert runs == [64, 32] * 20
    for name, (narrowest, milliseconds, tried, failed, timed) in found.items():
        assert narrowest, name
        assert milliseconds == dict.fromkeys(tune.PRODUCTS, 32.0), name
        assert (tried, failed) == (8, 0), name
        assert timed == {product: [[32.0, 32], [64.0, 64]] for product in tune.PRODUCTS}, name


def test_a_shape_for_which_no_tile_runs_says_why(monkeypatch):
    class Nothing:
        def __init__(self, *args):
            pass

        def fits(self, m):
            return True

        def by_name(self, m):
            def run(tile):
                raise RuntimeError("out of everything")

            return dict.fromkeys(tune.PRODUCTS, run)

    monkeypatch.setattr(tune, "Products", Nothing)
    key = tune.key_of(torch.bfloat16, 64, 64, 4, 2, 16)
    with pytest.raises(RuntimeError, match=r"no tile runs on meta for .* T16: .*out of everything"):
        tune.fastest_plan(META, key, {16: [Tile(16, 32, 32)]}, lambda job: job() or 1.0)


@pytest.mark.parametrize(
    ("changed", "message"), [({"weights": "int3"}, "weights='int3' is not one of"), ({"K": 9}, "K=9")]
)
def test_tuning_for_what_does_not_exist_is_refused(changed, message):
    sizes = {"H": 64, "I": 64, "E": 4, "K": 2, "T": 16} | changed
    with pytest.raises(ValueError, match=message):
        tune.tune(torch.bfloat16, **sizes)


def test_tuning_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="tuning measures on a GPU"):
        tune.tune(torch.bfloat16, 64, 64, 4, 2, 128)


def test_a_plan_is_one_m_for_four_products():
    plan = Plan(*(Tile(64, n, 32) for n in (32, 64, 128, 256)))
    assert plan.m == 64
