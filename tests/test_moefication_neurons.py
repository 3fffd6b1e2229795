"""How the conversion splits neurons and fits weights: the parts, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the conversion needs transformers")

from flex.moefication.neurons import balanced_assignment, cluster_neurons, random_partition, shared_neurons
from flex.moefication.ridge import RidgeSums


def test_shared_neurons_are_those_with_the_largest_mean_square():
    contribution = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.0, 0.0, -2.5, 0.1]])
    assert shared_neurons(contribution, 1).tolist() == [1]
    assert shared_neurons(contribution, 3).tolist() == [1, 2, 3]
    assert shared_neurons(contribution, 0).tolist() == []


@pytest.mark.parametrize("count", [-1, 5])
def test_shared_neurons_refuses_a_count_outside_the_neurons(count):
    with pytest.raises(ValueError, match=f"count={count} is outside 0..4"):
        shared_neurons(torch.ones(2, 4), count)


def test_balanced_assignment_keeps_groups_equal_and_lets_the_most_affected_choose_first():
    # All three prefer column 0; row 2 would lose most by leaving it, so row 0 and row 1 give way.
    score = torch.tensor([[1.0, 0.9, 0.8], [1.0, 0.9, 0.5], [1.0, 0.0, 0.0]])
    assert balanced_assignment(score).tolist() == [1, 2, 0] or balanced_assignment(score).tolist() == [
        2,
        1,
        0,
    ]


def test_clusters_are_balanced_and_find_groups_of_neurons_that_fire_together():
    generator = torch.Generator().manual_seed(3)
    group = torch.tensor([0, 1, 2] * 7)[torch.randperm(21, generator=generator)]
    tokens = torch.arange(90) % 3
    activity = (group[:, None] == tokens).float() + 0.2 * torch.rand(21, 90, generator=generator)
    choice = cluster_neurons(activity, experts=3, seed=0)
    assert choice.bincount().tolist() == [7, 7, 7]
    same_group, same_cluster = group[:, None] == group, choice[:, None] == choice
    assert torch.equal(same_group, same_cluster)


@pytest.mark.parametrize("features", [torch.rand(30, 17), torch.zeros(30, 4), torch.ones(30, 1)])
def test_clusters_stay_balanced_on_data_without_structure(features):
    assert cluster_neurons(features, experts=5, seed=0).bincount().tolist() == [6] * 5


def test_random_partition_is_balanced_and_follows_its_seed():
    assert random_partition(12, 4, seed=0).bincount().tolist() == [3] * 4
    assert random_partition(12, 4, seed=0).tolist() == random_partition(12, 4, seed=0).tolist()
    assert random_partition(12, 4, seed=0).tolist() != random_partition(12, 4, seed=1).tolist()


@pytest.mark.parametrize(
    "split", [lambda: cluster_neurons(torch.rand(10, 3), 4, 0), lambda: random_partition(10, 4, 0)]
)
def test_groups_that_cannot_be_equal_are_refused(split):
    with pytest.raises(ValueError, match="10 neurons cannot be split into experts=4 equal groups"):
        split()


# Ridge regression.


def test_ridge_is_the_solution_of_the_weighted_normal_equations_in_float64():
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(50, 7)), rng.normal(size=(50, 3)), rng.uniform(0.1, 2, size=50)
    gram = x.T @ (weight[:, None] * x)
    expected = np.linalg.solve(gram + 0.05 * np.mean(np.diag(gram)) * np.eye(7), x.T @ (weight[:, None] * y))
    sums = RidgeSums(7, 3)
    for part in (slice(0, 13), slice(13, 50)):
        sums.add(*(torch.tensor(array[part], dtype=torch.float32) for array in (x, y, weight)))
    np.testing.assert_allclose(sums.solve(0.05).numpy(), expected, rtol=0, atol=20 * np.finfo(np.float32).eps)


def test_ridge_of_features_that_are_all_zero_is_zero():
    sums = RidgeSums(4, 2)
    sums.add(torch.zeros(5, 4), torch.ones(5, 2))
    assert sums.solve(0.1).abs().max() == 0


@pytest.mark.parametrize("strength", [0, -1.0, float("nan")])
def test_ridge_refuses_a_strength_that_is_not_positive(strength):
    with pytest.raises(ValueError, match=r"strength=.* must be positive"):
        RidgeSums(2, 1).solve(strength)


def test_ridge_refuses_non_finite_data():
    sums = RidgeSums(2, 1)
    sums.add(torch.tensor([[1.0, float("inf")]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="non-finite"):
        sums.solve(0.1)
