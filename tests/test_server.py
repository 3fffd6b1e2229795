"""The federated loop on a tiny model: what is averaged, what stays, what is counted, what bad clients do."""

import json

import pytest
import torch
from tiny import make_model, make_tokenizer, save_tiny, tiny_config, write_rows

import flex.select
import flex.server
from flex.client import ClientRefused, train_locally
from flex.config import Config, ConfigError
from flex.data import DataError
from flex.federation import check_length, run
from flex.files import load_tensors, save_tensors
from flex.history import select_events
from flex.observer import Observer
from flex.server import RoundError, Server, sample_clients
from flex.session import open_run
from flex.store import Store, StoreError
from flex.strategies import Flex

QUICK = {"generate": False, "before": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    rows = write_rows(folder / "rows.jsonl", {"anna": 12, "bert": 8, "cleo": 8})
    return save_tiny(folder / "model"), rows


def test_sampling_is_seeded_sorted_and_without_replacement():
    names = [f"c{i}" for i in range(10)]
    config = Config.from_dict({"federation": {"sample_fraction": 0.35}})
    rounds = [sample_clients(names, config, r) for r in range(1, 30)]
    assert all(len(set(r)) == 4 and r == sorted(r) for r in rounds)  # round(3.5) is 4
    assert rounds == [sample_clients(names, config, r) for r in range(1, 30)]
    assert len({tuple(r) for r in rounds}) > 20 and {n for r in rounds for n in r} == set(names)
    few = Config.from_dict({"federation": {"clients_per_round": 3}})
    assert len(sample_clients(names, few, 1)) == 3
    with pytest.raises(ValueError, match="clients_per_round=3 exceeds the 2 clients"):
        sample_clients(names[:2], few, 1)
    one = Config.from_dict({"federation": {"sample_fraction": 0.001}})
    assert len(sample_clients(names, one, 1)) == 1


@pytest.mark.parametrize("strategy", ["flex", "fedavg", "local"])
def test_a_run_learns_and_its_history_adds_up(tiny, tmp_path, strategy):
    model, rows = tiny
    config = tiny_config(
        model, rows, tmp_path / "run", federation={"strategy": strategy}, training={"local_steps": 4}
    )
    result = run(config)
    events = list(result.history())
    before = {e["client"]: e["loss"] for e in select_events(events, "evaluation", round=0)}
    assert set(result.metrics) == {"anna", "bert", "cleo"} == set(before)
    for name, metrics in result.metrics.items():
        assert metrics["loss"] < before[name] and metrics["round"] == 2
        assert {"perplexity", "rouge_l", "exact_match"} <= metrics.keys()
        assert metrics["personal"] is (strategy != "fedavg")
        assert ("gates" in metrics) is (strategy == "flex")
    clients = select_events(events, "client")
    assert [(e["round"], e["client"]) for e in clients] == [
        (r, c) for r in (1, 2) for c in ("anna", "bert", "cleo")
    ]
    # LoRA of rank 2 on q, o (32 to 32) and k, v (32 to 16) in two layers, in float32.
    adapters = 2 * (2 * 2 * (32 + 32) + 2 * 2 * (32 + 16)) * 4
    moved = 0 if strategy == "local" else adapters
    assert {e["bytes_down"] for e in clients} == {e["bytes_up"] for e in clients} == {moved}
    for event in select_events(events, "round"):
        mine = [e for e in clients if e["round"] == event["round"]]
        assert event["tokens"] == sum(e["tokens"] for e in mine) and event["bytes_up"] == 3 * moved
    started = select_events(events, "run")[0]
    personal = 2 * (3 * 16 * 32 + 32 + 1) if strategy == "flex" else 0
    assert started["parameters"]["shared"] * 4 == adapters and started["parameters"]["personal"] == personal


@pytest.mark.parametrize("weighting", ["tokens", "examples", "uniform"])
def test_the_shared_part_is_the_weighted_average_of_what_clients_sent(tiny, tmp_path, monkeypatch, weighting):
    sent = []

    def spy(self, shared, updates):
        kept = list(updates)
        sent.extend(kept)
        return super(Flex, self).aggregate(shared, iter(kept))

    monkeypatch.setattr(Flex, "aggregate", spy)
    model, rows = tiny
    tables = {"federation": {"rounds": 1, "weighting": weighting}, "evaluation": QUICK}
    result = run(tiny_config(model, rows, tmp_path / "run", **tables))
    events = {e["client"]: e for e in select_events(result.history(), "client")}
    weights = {
        # A quarter of 12, 8 and 8 rows is held out.
        "examples": {"anna": 9, "bert": 6, "cleo": 6},
        "uniform": dict.fromkeys(events, 1),
        "tokens": {name: event["answer_tokens"] for name, event in events.items()},
    }[weighting]
    assert {u.client: u.weight for u in sent} == weights
    shared = load_tensors(tmp_path / "run" / "rounds" / "0001.shared.safetensors")
    for name, value in shared.items():
        expected = sum(u.state[name].double() * weights[u.client] for u in sent) / sum(weights.values())
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-8)
    assert not all(u.state[n].equal(shared[n]) for u in sent for n in shared)


def test_personal_parts_differ_between_clients_and_the_base_is_untouched(tiny, tmp_path):
    model, rows = tiny
    run(tiny_config(model, rows, tmp_path / "run", evaluation=QUICK))
    session = open_run(tmp_path / "run")
    assert session.load_client("anna")
    anna = session.strategy.home(session.model)
    assert session.load_client("bert")
    bert = session.strategy.home(session.model)
    assert not anna["model.layers.0.mlp.personal.gate_up"].equal(bert["model.layers.0.mlp.personal.gate_up"])
    base = load_tensors(model / "model.safetensors")
    loaded = session.model.state_dict()
    assert loaded["lm_head.weight"].equal(base["lm_head.weight"])


def test_each_client_starts_from_the_expert_chosen_on_its_own_rows(tiny, tmp_path):
    model, rows = tiny
    result = run(tiny_config(model, rows, tmp_path / "run", evaluation=QUICK))
    chosen = select_events(result.history(), "selection")
    assert [(e["round"], e["client"]) for e in chosen] == [(1, "anna"), (1, "bert"), (1, "cleo")]
    for event in chosen:
        kept = Store(tmp_path / "run")
        kept.committed = kept.read_latest()
        state = kept.load_client(event["client"])
        for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
            errors = event["layers"][layer]["errors"]
            assert int(state[f"{layer}.personal.expert"]) == errors.index(min(errors))


def test_a_client_that_never_trained_is_measured_as_the_pretrained_model_plus_adapters(tiny, tmp_path):
    model, rows = tiny
    tables = {"federation": {"rounds": 1, "clients_per_round": 1}, "evaluation": {"generate": False}}
    result = run(tiny_config(model, rows, tmp_path / "run", **tables))
    trained = select_events(result.history(), "client")[0]["client"]
    for name, metrics in result.metrics.items():
        assert metrics["personal"] is (name == trained) and ("gates" in metrics) is (name == trained)


def poison(monkeypatch, *names: str):
    """The clients called ``names`` come back from their steps with a NaN among what they send."""

    def train(model, batches, training, *, name, **options):
        result = train_locally(model, batches, training, name=name, **options)
        if name in names:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_A" in n)[0, 0] = float("nan")
        return result

    monkeypatch.setattr(flex.server, "train_locally", train)


def test_a_client_that_returns_nan_is_left_out_by_name_and_keeps_what_it_had(tiny, tmp_path, monkeypatch):
    model, rows = tiny

    class Poison(Observer):
        def round_started(self, round_, rounds, clients):
            if round_ == 2:
                self.kept = (tmp_path / "run/clients/bert/0001.safetensors").read_bytes()
                poison(monkeypatch, "bert")

        def client_refused(self, record):
            self.reason = record["reason"]

    observer = Poison()
    result = run(tiny_config(model, rows, tmp_path / "run", evaluation=QUICK), observer=observer)
    assert (
        "client 'bert'" in observer.reason and "not finite" in observer.reason and "lora_A" in observer.reason
    )
    second = select_events(result.history(), "round", round=2)[0]
    assert (second["clients"], second["refused"]) == (["anna", "cleo"], ["bert"])
    assert (tmp_path / "run/clients/bert/0001.safetensors").read_bytes() == observer.kept
    assert not (tmp_path / "run/clients/bert/0002.safetensors").exists()
    shared = load_tensors(tmp_path / "run/rounds/0002.shared.safetensors")
    assert all(t.isfinite().all() for t in shared.values())


def test_a_round_without_a_usable_update_ends_the_run_and_can_be_resumed(tiny, tmp_path, monkeypatch):
    model, rows = tiny
    config = tiny_config(model, rows, tmp_path / "run", federation={"strategy": "fedavg"}, evaluation=QUICK)
    with monkeypatch.context() as patch:
        poison(patch, "anna", "bert", "cleo")
        with pytest.raises(
            RoundError, match=r"round 1 cannot be finished: no client sent(.|\n)*'anna'(.|\n)*intact up to"
        ):
            run(config)
    assert run(resume=tmp_path / "run").metrics.keys() == {"anna", "bert", "cleo"}


def test_a_refused_client_leaves_nothing_in_the_next_ones_model(tiny, tmp_path, monkeypatch):
    model, rows = tiny

    def refuse_anna(model_, batches, training, *, name, **options):
        if name == "anna":
            with torch.no_grad():
                for parameter in model_.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(float("nan"))
            raise ClientRefused("client 'anna': loss is nan")
        return train_locally(model_, batches, training, name=name, **options)

    monkeypatch.setattr(flex.server, "train_locally", refuse_anna)
    result = run(tiny_config(model, rows, tmp_path / "run", federation={"rounds": 1}, evaluation=QUICK))
    round_ = select_events(result.history(), "round")[0]
    assert round_["clients"] == ["bert", "cleo"] and round_["loss_after"] < round_["loss_before"]
    assert all(m["loss"] < 20 for m in result.metrics.values())


def test_a_damaged_client_file_is_named_and_the_run_survives(tiny, tmp_path):
    model, rows = tiny
    folder = tmp_path / "run"

    class Damage(Observer):
        def round_started(self, round_, rounds, clients):
            if round_ == 2:
                file = folder / "clients/bert/0001.safetensors"
                self.whole = file.read_bytes()
                file.write_bytes(self.whole[:100])

    observer = Damage()
    with pytest.raises(
        StoreError, match=r"client 'bert': could not read .*bert/0001\.safetensors: .*truncated"
    ):
        run(tiny_config(model, rows, folder, evaluation=QUICK), observer=observer)
    (folder / "clients/bert/0001.safetensors").write_bytes(observer.whole)
    assert run(resume=folder).rounds == 2


def test_a_clients_file_of_another_run_is_refused(tiny, tmp_path):
    model, rows = tiny
    run(tiny_config(model, rows, tmp_path / "full", evaluation=QUICK))
    thin = tiny_config(model, rows, tmp_path / "lora", evaluation=QUICK, personal={"kind": "lora", "rank": 2})
    run(thin)
    theirs = tmp_path / "full/clients/anna/0002.safetensors"
    (tmp_path / "lora/clients/anna/0002.safetensors").write_bytes(theirs.read_bytes())
    with pytest.raises(
        StoreError, match=r"client 'anna': .*0002\.safetensors does not fit this run: .*missing"
    ):
        open_run(tmp_path / "lora").load_client("anna")


def break_selection(monkeypatch, name: str, error: Exception):
    """The selection on ``name``'s rows raises ``error``."""
    choose = Server.choose_experts

    def choose_experts(self, round_, client):
        def select(model, batches):
            if client.name == name:
                raise error
            return real(model, batches)

        monkeypatch.setattr(flex.select, "select_experts", select)
        choose(self, round_, client)

    real = flex.select.select_experts
    monkeypatch.setattr(Server, "choose_experts", choose_experts)


def test_a_client_on_whose_rows_no_expert_can_be_chosen_is_left_out_by_name(tmp_path):
    """A real overflow: one client's rows alone hold a letter whose embedding is infinite."""
    rows = write_rows(tmp_path / "rows.jsonl", {"anna": 8, "bert": 8, "cleo": 8})
    rows.write_text(rows.read_text().replace("say b", "say z"))
    tokenizer = make_tokenizer()
    broken = make_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("z")] = float("inf")
    broken.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(
        tmp_path / "model",
        rows,
        tmp_path / "run",
        federation={"rounds": 1},
        evaluation=QUICK | {"clients": 1},
    )
    result = run(config)
    refused = select_events(result.history(), "refused")
    assert [e["client"] for e in refused] == ["bert"]
    assert refused[0]["reason"].startswith("client 'bert': calibration batch 0: the input of layer")
    assert select_events(result.history(), "round")[0]["clients"] == ["anna", "cleo"]


@pytest.mark.parametrize("error", [ValueError("a strange row"), RuntimeError("out of memory")])
def test_any_other_failure_of_a_clients_turn_names_the_client(tiny, tmp_path, monkeypatch, error):
    break_selection(monkeypatch, "bert", error)
    message = rf"round 1 cannot be finished: client 'bert': {error}; the run is intact up to round 0"
    with pytest.raises(RoundError, match=message):
        run(tiny_config(*tiny, tmp_path / "run", evaluation=QUICK))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda state: {n: t * float("nan") for n, t in state.items()}, "are not finite"),
        (lambda state: {"w": torch.zeros(2)}, "missing"),
        (lambda state: {n: t.double() for n, t in state.items()}, r"torch\.float64"),
    ],
)
def test_a_shared_state_that_is_foreign_or_not_finite_is_named_with_its_file(tiny, tmp_path, damage, message):
    folder = tmp_path / "run"
    run(tiny_config(*tiny, folder, federation={"rounds": 1}, evaluation=QUICK))
    file = folder / "rounds/0001.shared.safetensors"
    save_tensors(file, damage(load_tensors(file)))
    named = rf"rounds/0001\.shared\.safetensors does not fit this run: .*{message}"
    with pytest.raises(StoreError, match=named):
        open_run(folder)
    with pytest.raises(StoreError, match=named):
        run(resume=folder)


def test_a_run_is_not_resumed_when_a_clients_file_was_deleted(tiny, tmp_path):
    folder = tmp_path / "run"

    class Stop(Observer):
        def round_started(self, round_, rounds, clients):
            if round_ == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(*tiny, folder, evaluation=QUICK), observer=Stop())
    (folder / "clients/bert/0001.safetensors").unlink()
    with pytest.raises(StoreError, match=r"client 'bert': .*bert/0001\.safetensors is missing"):
        run(resume=folder)
    with pytest.raises(StoreError, match=r"client 'bert': .*bert/0001\.safetensors is missing"):
        open_run(folder).measure("bert", generate=False)


def test_a_folder_of_other_things_is_refused_before_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("flex.federation.load_session", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/data.json").write_text("[1, 2]")
    with pytest.raises(StoreError, match=r"run holds data\.json, a name that a run writes"):
        run(tiny_config(*tiny, tmp_path / "run"))
    assert (tmp_path / "run/data.json").read_text() == "[1, 2]"


def test_settings_data_and_folders_are_refused_before_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    model, rows = tiny
    monkeypatch.setattr("flex.federation.load_session", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="config is missing"):
        run()
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        run(tiny_config(model, tmp_path / "absent.jsonl", tmp_path / "run"))
    with pytest.raises(ValueError, match="clients_per_round=9 exceeds the 3 clients"):
        run(tiny_config(model, rows, tmp_path / "run", federation={"clients_per_round": 9}))
    with pytest.raises(
        ConfigError, match=r"max_length=513 exceeds the 512 positions of model\.path='.*' \(max_pos"
    ):
        run(tiny_config(model, rows, tmp_path / "run", data={"max_length": 513}))
    with pytest.raises(ConfigError, match=r"must be a flex\.Config, got dict; .*Config\.from_dict"):
        run(tiny_config(model, rows, tmp_path / "run").to_dict())
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder"


def test_rows_may_be_as_long_as_the_models_positions_also_when_these_are_stretched(tiny, tmp_path):
    model, rows = tiny
    check_length(tiny_config(model, rows, tmp_path / "run", data={"max_length": 512}))
    settings = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"rope_parameters": rope}))
    check_length(tiny_config(tmp_path, rows, tmp_path / "run", data={"max_length": 2048}))
    with pytest.raises(ConfigError, match="max_length=2049 exceeds the 2048 positions"):
        check_length(tiny_config(tmp_path, rows, tmp_path / "run", data={"max_length": 2049}))


def test_a_model_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path='.*nowhere' cannot be loaded: .* no such folder"):
        run(tiny_config(tmp_path / "nowhere", tiny[1], tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"model\.device='cuda:99' cannot be used here"):
        run(tiny_config(*tiny, tmp_path / "run", model={"device": "cuda:99"}))
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused_before_the_model_is_looked_for(tmp_path, monkeypatch):
    import flex.moefication

    monkeypatch.setattr(flex.moefication, "demo_model", lambda: pytest.fail("the demo's model was made"))
    settings = {
        "model": {"path": "demo", "device": "cuda"},
        "data": {"source": "reasoning_gym", "skills": ["chain_sum"]},
        "run": {"folder": str(tmp_path / "run")},
    }
    with pytest.raises(ConfigError, match=r"model\.device='cuda' cannot be used here"):
        run(Config.from_dict(settings))
