"""Partitioning: sizes worked out by hand, nothing lost or dealt twice, the same seed the same clients."""

from collections import Counter

import pytest

from flex.config import ConfigError, Partition
from flex.partition import deal, shares_for
from flex.rows import Row

ROWS = [Row(str(i), "o", category="abc"[i % 3], client=f"owner{i % 2}") for i in range(30)]


def split(partition: Partition, rows=ROWS, seed: int = 0) -> dict[str, list[Row]]:
    return dict(deal(rows, shares_for(rows, partition, seed), partition, seed, "train"))


def test_by_field_each_value_is_a_client():
    clients = split(Partition(scheme="field", field="client"))
    assert {name: len(rows) for name, rows in clients.items()} == {"owner0": 15, "owner1": 15}
    assert all(row.client == name for name, rows in clients.items() for row in rows)
    assert split(Partition(scheme="field", field="category"))["b"] == [r for r in ROWS if r.category == "b"]


def test_iid_deals_every_category_equally():
    clients = split(Partition(scheme="iid", clients=5))
    assert list(clients) == [f"client-{i}" for i in range(5)]
    for rows in clients.values():
        assert Counter(row.category for row in rows) == {"a": 2, "b": 2, "c": 2}


def test_pathological_gives_k_categories_a_client_shared_equally():
    # 3 clients x 2 categories over 3 categories: each category has 2 holders, which get 5 of its 10 rows
    # each.
    clients = split(Partition(scheme="pathological", clients=3, categories_per_client=2))
    for rows in clients.values():
        counts = Counter(row.category for row in rows)
        assert len(counts) == 2 and set(counts.values()) == {5}


def test_pathological_refuses_more_categories_than_there_are():
    with pytest.raises(
        ConfigError, match=r"categories_per_client=4 exceeds the 3 categories of the data: a, b, c"
    ):
        split(Partition(scheme="pathological", categories_per_client=4))


@pytest.mark.parametrize("alpha", [0.05, 0.5, 100.0])
def test_dirichlet_deals_every_row_exactly_once(alpha):
    clients = split(Partition(scheme="dirichlet", clients=7, alpha=alpha), seed=3)
    dealt = [row.instruction for rows in clients.values() for row in rows]
    assert sorted(dealt) == sorted(row.instruction for row in ROWS)


def test_a_small_alpha_is_more_uneven_than_a_large_one():
    rows = [Row(str(i), "o", category=str(i % 10)) for i in range(2000)]
    spread = {}
    for alpha in (0.1, 100.0):
        clients = split(Partition(scheme="dirichlet", clients=10, alpha=alpha), rows)
        sizes = [len(some) for some in clients.values()]
        spread[alpha] = max(sizes) - min(sizes)
    assert spread[100.0] < spread[0.1]


def test_the_seed_decides():
    partition = Partition(scheme="dirichlet", clients=4)
    assert split(partition, seed=1) == split(partition, seed=1)
    assert split(partition, seed=1) != split(partition, seed=2)


def test_clients_keep_the_order_of_the_data():
    for rows in split(Partition(scheme="iid", clients=4)).values():
        numbers = [int(row.instruction) for row in rows]
        assert numbers == sorted(numbers)


def test_test_rows_follow_the_shares_of_the_training_rows():
    partition = Partition(scheme="pathological", clients=3, categories_per_client=1)
    shares = shares_for(ROWS, partition, 0)
    train, test = (dict(deal(ROWS, shares, partition, 0, purpose)) for purpose in ("train", "test"))
    for name in train:
        assert {r.category for r in train[name]} == {r.category for r in test[name]}
