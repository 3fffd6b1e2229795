"""The CUDA permute kernel, run on the host: a stable counting sort of slots by expert.

Letters: E experts, N slots, M row tiles.
"""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import emulation_fixture, host_only_fixture, needs_compiler, survives  # noqa: F401
from torch import Tensor

from flex_kernels.row_order import part_sizes, parts_of

pytestmark = needs_compiler

# One block, its limit and one past it; several chunks; a length that fills no chunk and no warp.
LENGTHS = (0, 1, 31, 33, 2047, 2048, 2049, 5003)


def expected(ids_N: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """offsets, order, inverse by torch's stable sort."""
    bin_N = torch.where((ids_N < 0) | (ids_N > experts), experts, ids_N).long()
    order_N = bin_N.sort(stable=True).indices.int()
    counts_E1 = torch.bincount(bin_N, minlength=experts + 1)
    offsets_E1 = torch.cat([torch.zeros(1, dtype=torch.long), counts_E1[:experts].cumsum(0)]).int()
    real = int(offsets_E1[-1])
    inverse_N = torch.full_like(order_N, -1)
    inverse_N[order_N[:real].long()] = torch.arange(real, dtype=torch.int32)
    order_N[real:] = -1
    return offsets_E1, order_N, inverse_N


def random_ids(N: int, experts: int, seed: int, low: int = 0, high: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high or experts, (N,), generator=generator, dtype=torch.int32)


def assert_sorted(found: tuple[Tensor, ...], ids_N: Tensor, experts: int) -> None:
    for name, got, want in zip(("offsets", "order", "inverse"), found, expected(ids_N, experts)):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("experts", (1, 60, 64, 257, 512))
def test_sorts_stably_for_any_number_of_slots_and_experts(emulation, N, experts):
    ids_N = random_ids(N, experts, seed=N + experts)
    assert_sorted(emulation.kernels.permute(ids_N, experts), ids_N, experts)


@pytest.mark.parametrize("N", (40, 2500))
def test_skips_sentinels_and_never_trusts_an_id_outside_the_experts(emulation, N):
    ids_N = random_ids(N, 6, seed=1, low=-2, high=9)
    ids_N[3] = torch.iinfo(torch.int32).min
    ids_N[5] = torch.iinfo(torch.int32).max
    assert_sorted(emulation.kernels.permute(ids_N, 6), ids_N, 6)


@pytest.mark.parametrize("N", (100, 3000))
def test_all_slots_on_one_expert_keep_their_order(emulation, N):
    ids_N = torch.full((N,), 59, dtype=torch.int32)
    offsets_E1, order_N, inverse_N = emulation.kernels.permute(ids_N, 60)
    assert torch.equal(order_N, torch.arange(N, dtype=torch.int32))
    assert torch.equal(inverse_N, order_N)
    assert offsets_E1.tolist() == [0] * 60 + [N]


def test_all_slots_skipped_leave_no_row(emulation):
    ids_N = torch.full((70,), 4, dtype=torch.int32)
    offsets_E1, order_N, inverse_N = emulation.kernels.permute(ids_N, 4)
    assert offsets_E1.tolist() == [0] * 5
    assert (order_N == -1).all() and (inverse_N == -1).all()


@pytest.mark.parametrize("N", (97, 4500))
def test_the_order_of_threads_changes_nothing(emulation, N):
    ids_N = random_ids(N, 60, seed=2, high=61)
    for seed in range(6):
        emulation.seed(seed)
        assert_sorted(emulation.kernels.permute(ids_N, 60), ids_N, 60)


# Where a thread meets them when 1000 slots make 2 rounds of 32 a warp, of the 4 that are loaded together. The
# __syncwarp that ends a round (1 to 4, 8, 10) is not here: the warp meets again in __match_any_sync before
# it goes on, and only real hardware could let memory lag behind that.
NEEDED_BARRIERS = {
    "zeroed -> counts": 0,
    "counts of warps -> prefix": 5,
    "prefix -> scan": 6,
    "scan -> first rows": 7,
    "ranks -> step": 9,
}


@pytest.mark.parametrize("name", NEEDED_BARRIERS)
def test_a_missing_barrier_is_caught(emulation, host_only, name):
    ids_N = random_ids(1000, 40, seed=3)
    want = expected(ids_N, 40)

    def always_right() -> bool:
        emulation.drop_barrier(NEEDED_BARRIERS[name])
        for seed in range(20):
            emulation.seed(seed)
            found = emulation.kernels.permute(ids_N, 40)
            if not all(torch.equal(a, b) for a, b in zip(found, want)):
                return False
        return True

    assert not survives(always_right), f"20 schedules without the barrier '{name}' all gave the right answer"


@pytest.mark.parametrize("block_rows", (1, 16, 128))
@pytest.mark.parametrize("N", (0, 5, 700, 2600))
def test_tiles_cover_every_expert_and_never_cross_one(emulation, N, block_rows):
    experts = 13
    ids_N = random_ids(N, experts, seed=4, high=experts + 1)
    ids_N[ids_N == 7] = 8
    packed = emulation.kernels.sort_rows(ids_N, experts, block_rows)
    found = parts_of(packed, part_sizes(N, experts, block_rows))
    assert_sorted((found.offsets_E1, found.order_N, found.inverse_N), ids_N, experts)
    offsets = found.offsets_E1.tolist()
    want = [(e, row) for e in range(experts) for row in range(offsets[e], offsets[e + 1], block_rows)]
    used = int(found.tile_count_1)
    assert list(zip(found.tile_expert_M.tolist(), found.tile_row_M.tolist()))[:used] == want
    assert len(found.tile_expert_M) == N // block_rows + min(experts, N)
    assert (found.tile_expert_M[used:] == -1).all() and (found.tile_row_M[used:] == 0).all()


def test_chunks_stay_bounded_at_a_million_tokens_of_eight(emulation):
    chunks = [
        emulation.kernels.native.permute_chunks(n) for n in (0, 2048, 2049, 65536, 8_000_000, 2**31 - 1)
    ]
    assert chunks[:2] == [0, 0]
    assert all(0 < c <= 256 for c in chunks[2:])
    assert chunks[3] >= 128, "8192 tokens of 8 must spread over a whole GPU"


def test_a_long_list_is_sorted_in_256_chunks(emulation):
    ids_N = random_ids(200_001, 8, seed=5, high=9)
    assert emulation.kernels.native.permute_chunks(200_001) > 128
    assert_sorted(emulation.kernels.permute(ids_N, 8), ids_N, 8)


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    (
        (
            torch.zeros(4, 2, dtype=torch.int64),
            4,
            r"ids must be contiguous \[4, 2\] int32, got \[4, 2\] int64",
        ),
        (torch.zeros(4, 2, dtype=torch.int32).t(), 4, r"ids must be contiguous .* with strides \[1, 2\]"),
        (torch.zeros(4, 2, dtype=torch.int32), 0, "experts=0 is not between 1 and 512"),
        (torch.zeros(4, 2, dtype=torch.int32), 513, "experts=513 is not between 1 and 512"),
    ),
)
def test_bad_arguments_are_named(emulation, ids, experts, message):
    with pytest.raises(ValueError, match=message):
        emulation.kernels.permute(ids, experts)
