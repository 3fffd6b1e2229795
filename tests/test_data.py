"""Reading rows and making clients of them: every malformed line is named, no client is silently empty."""

import dataclasses
import gzip
import json

import pytest

from flex.config import Config, ConfigError, Data, Partition
from flex.data import DataError, fingerprint, load_clients, read_jsonl, split_off
from flex.rows import Row
from flex.tasks import SKILLS, reasoning_gym_rows, score


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


GOOD = {"instruction": "add 1 and 1", "output": "2"}


def test_plain_and_compressed_files_read_alike(tmp_path):
    text = lines(GOOD, "", GOOD | {"category": "sum", "client": 7, "other": [1]})
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    expected = [Row("add 1 and 1", "2"), Row("add 1 and 1", "2", "sum", "7")]
    assert read_jsonl(tmp_path / "a.jsonl") == read_jsonl(tmp_path / "a.jsonl.gz") == expected


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{", r"a\.jsonl:3: not JSON"),
        ("[1]", r"a\.jsonl:3: a list; expected an object with 'instruction' and 'output'"),
        (
            {"instruction": "x"},
            r"a\.jsonl:3: 'output' is missing; expected a string.*; the row has instruction",
        ),
        (
            {"instruction": "x", "output": 3},
            r"a\.jsonl:3: 'output' is 3; expected a string that is not empty",
        ),
        ({"instruction": " ", "output": "y"}, r"a\.jsonl:3: 'instruction' is ' '; expected"),
        (GOOD | {"client": ["x"]}, r"a\.jsonl:3: 'client' is \['x'\]; expected"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path, bad, message):
    (tmp_path / "a.jsonl").write_text(lines(GOOD, "", bad, GOOD))
    with pytest.raises(DataError, match=message):
        read_jsonl(tmp_path / "a.jsonl")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: .*No such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        read_jsonl(tmp_path / "empty.jsonl")
    whole = gzip.compress(lines(*[GOOD | {"id": i} for i in range(200)]).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz(:\d+)?: cannot be read: Compressed file ended"):
        read_jsonl(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl: cannot be read: .*utf-8"):
        read_jsonl(tmp_path / "latin.jsonl")


def test_columns_rename(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"q": "x", "a": "y", "who": "z"}))
    columns = {"instruction": "q", "output": "a", "client": "who"}
    assert read_jsonl(tmp_path / "a.jsonl", columns) == [Row("x", "y", "", "z")]
    with pytest.raises(DataError, match="'nobody' is missing"):
        read_jsonl(tmp_path / "a.jsonl", columns | {"client": "nobody"})


def write_clients(path, **counts: int):
    path.write_text(
        lines(
            *[GOOD | {"client": name, "output": f"{name}{i}"} for name, n in counts.items() for i in range(n)]
        )
    )
    return path


def jsonl_config(path, **data) -> Config:
    return Config(data=Data(source="jsonl", path=str(path), **data))


def test_held_out_rows_are_a_tenth_and_at_least_one(tmp_path):
    clients = load_clients(jsonl_config(write_clients(tmp_path / "a.jsonl", big=30, small=2)))
    assert [(c.name, len(c.train), len(c.test)) for c in clients] == [("big", 27, 3), ("small", 1, 1)]
    outputs = [row.output for row in clients[0].train + clients[0].test]
    assert sorted(outputs) == sorted(f"big{i}" for i in range(30))


def test_a_test_file_is_used_whole_and_training_rows_are_then_all_kept(tmp_path):
    train = write_clients(tmp_path / "a.jsonl", x=5, y=6)
    test = write_clients(tmp_path / "b.jsonl", x=2, y=1)
    clients = load_clients(jsonl_config(train, test_path=str(test)))
    assert [(c.name, len(c.train), len(c.test)) for c in clients] == [("x", 5, 2), ("y", 6, 1)]


def test_max_rows_limits_each_client(tmp_path):
    clients = load_clients(jsonl_config(write_clients(tmp_path / "a.jsonl", x=20, y=4), max_rows=5))
    assert [len(c.train) for c in clients] == [5, 3]


def test_an_empty_client_is_refused_by_name(tmp_path):
    path = write_clients(tmp_path / "a.jsonl", x=1, y=5)
    with pytest.raises(DataError, match=r"client 'x' has no held-out rows"):
        load_clients(jsonl_config(path))
    config = dataclasses.replace(jsonl_config(path), partition=Partition(scheme="iid", clients=40))
    with pytest.raises(DataError, match=r"client 'client-\d\d' has no training rows .*use fewer clients"):
        load_clients(config)


def test_rows_without_the_field_of_the_partition_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(GOOD))
    with pytest.raises(DataError, match=r"partition\.field='client', but the row 'add 1 and 1' has none"):
        load_clients(jsonl_config(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("scheme", ["pathological", "dirichlet"])
def test_rows_without_a_category_are_refused_where_categories_are_dealt(tmp_path, scheme):
    bare, full = tmp_path / "bare.jsonl", tmp_path / "full.jsonl"
    bare.write_text(lines(*[GOOD | {"category": "sum"}] * 30, GOOD))
    full.write_text(lines(*[GOOD | {"category": "sum"}] * 31))
    partition = Partition(scheme=scheme, clients=2, alpha=100.0)
    with pytest.raises(
        DataError,
        match=rf"partition\.scheme='{scheme}' goes by 'category', but the row 'add 1 and 1' has none",
    ):
        load_clients(dataclasses.replace(jsonl_config(bare), partition=partition))
    assert len(load_clients(dataclasses.replace(jsonl_config(full), partition=partition))) == 2
    equal = dataclasses.replace(partition, scheme="iid")
    assert len(load_clients(dataclasses.replace(jsonl_config(bare), partition=equal))) == 2


def test_split_off_by_hand():
    rows = [Row(str(i), "o") for i in range(7)]
    train, test = split_off(rows, 0.5, "x", 0)
    assert len(test) == 4 and len(train) == 3  # round(3.5) is 4: ties to even
    assert split_off(rows[:1], 0.5, "x", 0) == (rows[:1], [])


def test_a_fingerprint_changes_with_any_row(tmp_path):
    path = write_clients(tmp_path / "a.jsonl", x=5)
    before = fingerprint(load_clients(jsonl_config(path)))
    assert before["sizes"] == {"x": [4, 1]}
    assert fingerprint(load_clients(jsonl_config(path))) == before
    path.write_text(path.read_text().replace("x3", "x9"))
    assert fingerprint(load_clients(jsonl_config(path)))["sha256"] != before["sha256"]


@pytest.mark.parametrize("skill", sorted(SKILLS))
def test_a_skills_own_answers_satisfy_its_verifier(skill):
    train, test = reasoning_gym_rows([skill], 20, 10, seed=1)
    assert (len(train), len(test)) == (20, 10)
    assert [score(row.check, row.output) for row in test] == [1.0] * 10
    assert score(test[0].check, "certainly not this") < 0.5
    assert len({row.instruction for row in train + test}) == 30, "a question is in both parts, or twice"
    assert all(row.check is None for row in train)


def test_reasoning_gym_rows_depend_on_the_seed_alone():
    assert reasoning_gym_rows(["gcd"], 5, 2, 3) == reasoning_gym_rows(["gcd"], 5, 2, 3)
    assert reasoning_gym_rows(["gcd"], 5, 2, 3) != reasoning_gym_rows(["gcd"], 5, 2, 4)


def test_unknown_and_exhausted_skills_are_named():
    with pytest.raises(
        ConfigError, match=r"'chain_sums' is not a reasoning-gym task; did you mean 'chain_sum'"
    ):
        reasoning_gym_rows(["chain_sums"], 5, 2, 0)
    with pytest.raises(ConfigError, match=r"'count_bits' has only \d+ different questions"):
        reasoning_gym_rows(["count_bits"], 5000, 2, 0)


def test_a_hugging_face_folder_is_read_with_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is optional")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        lines({"q": "a", "a": "b", "client": "c"}, {"q": "d", "a": "e", "client": "c"})
    )
    columns = {"instruction": "q", "output": "a"}
    config = Config(data=Data(source="huggingface", path=str(folder), columns=columns, held_out=0.5))
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    (client,) = load_clients(config)
    assert (client.name, len(client.train), len(client.test)) == ("c", 1, 1)
    absent = dataclasses.replace(config, data=dataclasses.replace(config.data, split="nope"))
    with pytest.raises(DataError, match=r"split 'nope'"):
        load_clients(absent)
