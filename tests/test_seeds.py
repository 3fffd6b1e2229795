"""Random numbers that depend on their purpose alone."""

import hashlib

import torch

from flex.seeds import derive_seed, generator, torch_seed


def test_a_derived_seed_is_the_hash_of_its_purpose():
    digest = hashlib.sha256(b"7\x1ftraining\x1f3\x1fanna").hexdigest()
    assert derive_seed(7, "training", 3, "anna") == int(digest[:16], 16) // 2 < 2**63


def test_purposes_do_not_run_into_each_other():
    purposes = [(0, "a", 11), (0, "a", 1, 1), (0, "a1", 1), (1, "a", 11), (0, "b", 11)]
    assert len({derive_seed(*purpose) for purpose in purposes}) == len(purposes)


def test_numpy_draws_depend_on_the_purpose_alone():
    generator(0, "other").random(100)
    assert generator(0, "x", 1).permutation(50).tolist() == generator(0, "x", 1).permutation(50).tolist()


def test_torch_draws_are_seeded_inside_and_the_callers_stream_goes_on():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first = torch.rand(2)
    with torch_seed(0, "x"):
        inside = torch.rand(3)
    assert torch.cat([first, torch.rand(2)]).equal(expected)
    with torch_seed(0, "x"):
        assert torch.rand(3).equal(inside)
