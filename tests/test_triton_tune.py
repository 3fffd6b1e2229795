"""Which plan a call gets: pinned from sizes alone, or tuned once and read back from disk. No GPU needed."""

import json

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from flex_kernels.triton import tiles, tune  # noqa: E402
from flex_kernels.triton.tiles import Plan, Tile  # noqa: E402

META = torch.device("meta")


@pytest.mark.parametrize(
    ("rows", "experts", "m"),
    [(4, 60, 16), (32 * 8, 8, 32), (33 * 8, 8, 64), (32768, 60, 128), (10**7, 1, 128)],
)
def test_the_pinned_plan_grows_with_the_rows_an_expert_gets(rows, experts, m):
    assert tiles.pinned_plan(90, 2, rows, experts).m == m


def test_chips_of_a_later_generation_take_the_latest_known_plans():
    assert tiles.pinned_plan(100, 2, 32768, 8) == tiles.pinned_plan(90, 2, 32768, 8)
    assert tiles.pinned_plan(89, 2, 32768, 8) == tiles.pinned_plan(80, 2, 32768, 8)


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
    assert tune.best_tile(run, [slow, large, fast], lambda job: milliseconds[job()]) == (1.0, fast)
    assert tune.best_tile(run, [large], lambda job: milliseconds[job()]) is None


@pytest.mark.parametrize("capability", [80, 90])
def test_there_are_few_candidates_and_the_pinned_tiles_are_among_them(capability):
    found = tiles.candidates(capability, 2)
    pinned = tiles.HOPPER if capability == 90 else tiles.AMPERE
    assert max(len(c) for c in found.values()) <= 16
    for m, plan in pinned.items():
        assert {plan.up, plan.down, plan.down_backward, plan.up_backward} <= set(found[m])
        assert {t.m for t in found[m]} == {m}


def test_tuning_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="tuning measures on a GPU"):
        tune.tune(torch.bfloat16, 64, 64, 4, 2, 128)


def test_a_plan_is_one_m_for_four_products():
    plan = Plan(*(Tile(64, n, 32) for n in (32, 64, 128, 256)))
    assert plan.m == 64
