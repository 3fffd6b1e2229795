"""The settings: what is refused, how the message reads, and that they survive being written to a file."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flex.config import TABLES, Config, ConfigError

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))


@pytest.mark.parametrize(
    "tables, message",
    [
        ({"modle": {}}, r"\[modle\] is not a table of the configuration; did you mean 'model'\?"),
        ({"model": {"pth": "x"}}, r"model\.pth is unknown; did you mean 'path'\?"),
        ({"run": {"zzzzzz": 1}}, r"run\.zzzzzz is unknown; known: folder, seed, threads"),
        ({"training": 3}, r"training=3 is not a table"),
        ({"training": {"local_steps": "ten"}}, r"training\.local_steps='ten' is a str; expected int"),
        ({"training": {"local_steps": 2.5}}, r"training\.local_steps=2\.5 is a float; expected int"),
        ({"training": {"local_steps": True}}, r"training\.local_steps=True is a bool; expected int"),
        ({"evaluation": {"generate": 1}}, r"evaluation\.generate=1 is a int; expected bool"),
        ({"data": {"skills": [1]}}, r"data\.skills=\[1\] is not a list of str"),
        ({"data": {"columns": {"output": 3}}}, r"data\.columns=.* is not a table of strings"),
        (
            {"data": {"columns": {"outptu": "x"}}},
            r"data\.columns\.outptu is unknown; did you mean 'output'\?",
        ),
        ({"federation": {"rounds": 0}}, r"federation\.rounds=0 must be at least 1"),
        ({"federation": {"strategy": "fedprox"}}, r"federation\.strategy='fedprox' is not one of 'flex', "),
        ({"data": {"held_out": 1.0}}, r"data\.held_out=1\.0 must be above 0 and below 1"),
        (
            {"training": {"learning_rate": float("nan")}},
            r"training\.learning_rate=nan must be above 0, and finite",
        ),
        ({"partition": {"alpha": float("inf")}}, r"partition\.alpha=inf must be above 0, and finite"),
        (
            {"model": {"device": "banana"}},
            r"model\.device='banana' is not one of 'auto', 'cpu', 'cuda', 'cuda:N'",
        ),
        ({"model": {"device": "cuda:"}}, r"model\.device='cuda:' is not one of"),
        ({"model": {"device": "cpu\n"}}, r"model\.device='cpu\\n' is not one of"),
        ({"data": {"source": "jsonl"}}, r"data\.path is empty; data\.source='jsonl' needs it"),
        ({"data": {"skills": []}}, r"data\.skills is empty"),
        ({"run": {"folder": ""}}, r"run\.folder='' is empty; name a folder"),
        ({"run": {"folder": "  "}}, r"run\.folder='  ' is empty; name a folder"),
        ({"training": {"local_epochs": 1}}, r"local_steps=10 and training\.local_epochs=1: exactly one"),
        ({"training": {"local_steps": 0}}, r"local_steps=0 and training\.local_epochs=0: exactly one"),
        (
            {"federation": {"clients_per_round": 2, "sample_fraction": 0.5}},
            r"clients_per_round=2 and federation\.sample_fraction=0\.5: give one of them",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_what_is_accepted(tables, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(tables)


def test_python_callers_get_the_same_checks():
    with pytest.raises(ConfigError, match=r"federation\.rounds=-1 must be at least 1"):
        dataclasses.replace(Config().federation, rounds=-1)
    with pytest.raises(ConfigError, match=r"from plain dicts use Config\.from_dict"):
        Config(model={"path": "x"})


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_every_kind_of_device_is_accepted(device):
    assert Config.from_dict({"model": {"device": device}}).model.device == device


def test_errors_from_a_file_name_the_file(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[training]\nlearning_rat = 1\n")
    with pytest.raises(
        ConfigError, match=r"bad\.toml: training\.learning_rat is unknown; did you mean 'learning_rate'"
    ):
        Config.from_toml(path)
    path.write_text("[training\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not a TOML file: .*line 1"):
        Config.from_toml(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read \(No such file"):
        Config.from_toml(tmp_path / "absent.toml")


def test_an_integer_is_taken_for_a_float_and_one_string_for_a_list():
    config = Config.from_dict({"shared": {"alpha": 32, "targets": "q_proj"}})
    assert config.shared.alpha == 32.0 and isinstance(config.shared.alpha, float)
    assert config.shared.targets == ("q_proj",)


def test_overrides_replace_single_settings_and_take_bare_strings(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[run]\nseed = 1\n[federation]\nrounds = 7\n")
    config = Config.from_toml(
        path,
        ["run.seed=5", "data.path=/x/y.jsonl", "data.skills=['gcd']", "model.gradient_checkpointing=true"],
    )
    assert (config.run.seed, config.federation.rounds, config.data.path) == (5, 7, "/x/y.jsonl")
    assert config.data.skills == ("gcd",) and config.model.gradient_checkpointing is True
    for bad in ("seed=5", "run.seed", "=1", ".x=1"):
        with pytest.raises(ConfigError, match=r"is not of the form table\.key=value"):
            Config.from_toml(path, [bad])


@given(
    path=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    rate=st.floats(1e-12, 1e3),
    skills=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=3),
    column=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_a_config_written_as_toml_reads_back_equal(tmp_path_factory, path, rate, skills, column):
    config = Config.from_dict(
        {
            "data": {"path": path, "skills": skills, "columns": {"instruction": column}},
            "training": {"learning_rate": rate},
        }
    )
    file = tmp_path_factory.mktemp("toml") / "c.toml"
    file.write_bytes(config.to_toml(comments=True).encode())
    assert Config.from_toml(file) == config


def test_every_setting_says_what_it_means():
    for table in TABLES.values():
        for field in dataclasses.fields(table):
            assert len(field.metadata["doc"]) > 4, f"{table.__name__}.{field.name}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_accepted(path):
    Config.from_toml(path)


def test_there_are_three_examples():
    assert [path.stem for path in EXAMPLES] == ["own_jsonl", "p3_four_clients", "reasoning_gym"]
