"""What each strategy keeps, sends and averages; expected numbers worked out by hand."""

import pytest
import torch
from tiny import make_model

import flex
from flex.strategies import STRATEGIES, Update, weighted_mean
from flex.strategies.base import size_in_bytes


def update(client: str, weight: float, *values: float, dtype=torch.float32) -> Update:
    return Update(client, weight, {"a": torch.tensor(values, dtype=dtype)})


def test_the_average_is_weighted():
    # (1 * 1 + 3 * 5) / 4 = 4 and (1 * 2 + 3 * -2) / 4 = -1
    mean = weighted_mean([update("x", 1, 1.0, 2.0), update("y", 3, 5.0, -2.0)])
    assert mean["a"].tolist() == [4.0, -1.0]


def test_one_client_is_its_own_average():
    torch.manual_seed(0)
    state = {"w": torch.randn(5, 3), "b": torch.randn(2, dtype=torch.bfloat16)}
    mean = weighted_mean([Update("x", 7, state)])
    assert all(mean[k].equal(state[k]) and mean[k].dtype == state[k].dtype for k in state)


def test_small_updates_are_not_lost_beside_large_ones():
    # In float32, 1e8 + 1 - 1e8 is 0.
    mean = weighted_mean([update("x", 1, 1e8), update("y", 1, 1.0), update("z", 1, -1e8)])
    assert mean["a"].item() == pytest.approx(1 / 3, rel=1e-6)


def test_updates_are_taken_one_at_a_time():
    alive = []

    def stream():
        for i in range(3):
            item = update(str(i), 1, float(i))
            alive.append(i)
            yield item

    assert weighted_mean(stream())["a"].item() == 1.0 and alive == [0, 1, 2]


@pytest.mark.parametrize(
    "updates, message",
    [
        ([], "no client sent an update"),
        ([update("x", 0, 1.0)], "client 'x': weight 0 is not above 0"),
        ([update("x", float("nan"), 1.0)], "client 'x': weight nan"),
        (
            [update("x", 1, 1.0), update("y", 1, 1.0, 2.0)],
            r"client 'y' sent a \[2\]; the clients before it \[1\]",
        ),
        (
            [update("x", 1, 1.0), Update("y", 1, {"b": torch.ones(1)})],
            "client 'y' sent other tensors .*: a, b",
        ),
    ],
)
def test_updates_that_cannot_be_averaged_are_refused(updates, message):
    with pytest.raises(ValueError, match=message):
        weighted_mean(updates)


def test_bytes_are_those_of_the_tensors():
    assert size_in_bytes({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}) == 60 + 14


def prepared(name: str):
    model = make_model()
    strategy = STRATEGIES[name]()
    flex.graft(
        model, start=[0, 1] if strategy.personal else None, personal="full" if strategy.personal else None
    )
    flex.add_lora(model, rank=2)
    return strategy, model


def test_flex_keeps_personal_experts_and_sends_only_adapters():
    strategy, model = prepared("flex")
    assert strategy.travels and strategy.personal
    assert all(".personal." in name for name in strategy.home(model))
    assert flex.shared_state(model) and not any(".personal." in name for name in flex.shared_state(model))


def test_fedavg_keeps_nothing():
    strategy, model = prepared("fedavg")
    assert strategy.travels and not strategy.personal and strategy.home(model) == {}
    with pytest.raises(ValueError, match="keeps nothing on a client, but 1 tensors"):
        strategy.restore(model, {"a": torch.ones(1)})


def test_local_keeps_its_adapters_and_never_averages():
    strategy, model = prepared("local")
    assert not strategy.travels and not strategy.personal
    assert strategy.home(model).keys() == flex.shared_state(model).keys()
    start = {"a": torch.zeros(1)}
    assert strategy.aggregate(start, [Update("x", 1, {}), Update("y", 1, {})]) == start
    with pytest.raises(ValueError, match="no client sent an update"):
        strategy.aggregate(start, [])


@pytest.mark.parametrize("name", ["flex", "local"])
def test_what_was_kept_comes_back(name):
    strategy, model = prepared(name)
    kept = strategy.home(model)
    changed = {k: t + 1 if t.is_floating_point() else t for k, t in kept.items()}
    strategy.restore(model, changed)
    assert all(strategy.home(model)[k].equal(changed[k]) for k in kept)
