"""The run's folder: what counts is what was committed, whatever happens to the disk."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest
import torch

import flex.files
from flex.history import History, read_history, select_events
from flex.store import Commit, Store, StoreError, folder_name


def state(value: float, size: int = 4) -> dict[str, torch.Tensor]:
    return {"w": torch.full((size,), value)}


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "run")
    made.create("# settings\n", {"sizes": {}})
    made.save_shared(0, state(0.0))
    made.commit(0, True, 0)
    yield made
    made.release()


def reopened(store: Store) -> Store:
    store.release()
    again = Store(store.folder)
    again.open()
    return again


def files(store: Store) -> list[str]:
    return sorted(str(p.relative_to(store.folder)) for p in store.folder.rglob("*.safetensors"))


def test_a_client_starts_with_nothing_and_gets_back_what_was_committed(store):
    assert store.load_client("anna") is None
    store.save_client("anna", 1, state(1.0))
    assert store.load_client("anna") is None, "not committed yet"
    store.save_shared(1, state(9.0))
    store.commit(1, True, 0)
    assert store.load_client("anna")["w"].tolist() == [1.0] * 4
    assert store.load_shared(1)["w"].tolist() == [9.0] * 4


def test_files_of_an_unfinished_round_are_dropped_on_opening(store):
    store.save_client("anna", 1, state(1.0))
    store.save_shared(1, state(1.0))
    store.commit(1, True, 10)
    store.save_client("anna", 2, state(2.0))
    store.save_client("bert", 2, state(2.0))
    store.save_shared(2, state(2.0))
    (store.clients / "anna" / ".0002.safetensors.1.2.tmp").write_bytes(b"half")
    again = reopened(store)
    assert again.committed == Commit(1, True, 10, {"anna": 1})
    assert files(again) == ["clients/anna/0001.safetensors", "rounds/0001.shared.safetensors"]
    assert not list(again.folder.rglob("*.tmp"))
    assert again.load_client("anna")["w"][0] == 1.0 and again.load_client("bert") is None
    again.release()


def test_one_state_a_client_remains_on_disk(store):
    for round_ in (1, 2, 3):
        store.save_client("anna", round_, state(round_))
        if round_ == 1:
            store.save_client("bert", 1, state(1.0))
        store.save_shared(round_, state(round_))
        store.commit(round_, True, 0)
        store.tidy(["anna"])
    assert files(store) == [
        "clients/anna/0003.safetensors",
        "clients/bert/0001.safetensors",
        "rounds/0003.shared.safetensors",
    ]
    assert store.load_client("bert")["w"][0] == 1.0


def test_a_full_disk_is_named_with_client_and_file_and_loses_nothing(store, monkeypatch):
    store.save_client("anna", 1, state(1.0))
    store.save_shared(1, state(1.0))
    store.commit(1, True, 0)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(flex.files.os, "fsync", full)
    message = r"client 'anna': could not write .*anna/0002\.safetensors: No space left .*intact up to round 1"
    with pytest.raises(StoreError, match=message):
        store.save_client("anna", 2, state(2.0))
    with pytest.raises(StoreError, match=r"the shared state of round 2: could not write .*No space left"):
        store.save_shared(2, state(2.0))
    with pytest.raises(StoreError, match=r"round 2 could not be committed: .*No space left"):
        store.commit(2, True, 0)
    monkeypatch.undo()
    again = reopened(store)
    assert again.committed == Commit(1, True, 0, {"anna": 1})
    assert again.load_client("anna")["w"][0] == 1.0
    again.release()


def test_a_write_cut_short_by_the_system_is_an_error_and_loses_nothing(store):
    """The system itself refuses (RLIMIT_FSIZE), in a process of its own: the limit would hit the test runner
    too.
    """
    store.save_client("anna", 1, state(1.0))
    store.save_shared(1, state(1.0))
    store.commit(1, True, 0)
    store.release()
    program = f"""
import resource, signal, torch
from flex.store import Store, StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store({str(store.folder)!r})
store.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))
try:
    store.save_client("anna", 2, {{"w": torch.zeros(100_000)}})
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "client 'anna': could not write" in done.stdout and "File too large" in done.stdout
    assert files(store) == ["clients/anna/0001.safetensors", "rounds/0001.shared.safetensors"]
    assert not list(store.folder.rglob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not a safetensors file at all", None])
def test_a_truncated_or_foreign_file_is_named_with_its_client(store, content):
    store.save_client("anna", 1, state(1.0, 1000))
    store.save_shared(1, state(1.0))
    store.commit(1, True, 0)
    path = store.client_path("anna")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(StoreError, match=r"client 'anna': could not read .*0001\.safetensors"):
        store.load_client("anna")


def test_a_second_run_in_the_same_folder_is_refused(store):
    with pytest.raises(StoreError, match="already holds a run; resume it"):
        Store(store.folder).create("", {})


def test_a_run_leaves_alone_what_others_have_in_its_folder(tmp_path):
    foreign = {
        "draft.tmp": b"mine",
        ".notes.1.ab.tmp": b"mine too",
        "0007.safetensors": b"a checkpoint",
        "9999.shared.safetensors": b"another",
        "train.log": b"round 1",
        "other-run/config.toml": b"seed = 1",
    }
    for name, content in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.tmp").mkdir()
    made = Store(tmp_path)
    made.create("# settings\n", {"sizes": {}})
    made.save_shared(0, state(0.0))
    made.commit(0, True, 0)
    (tmp_path / ".latest.12.0a1b.tmp").write_bytes(b"half")
    reopened(made).release()
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign
    assert (tmp_path / "folder.tmp").is_dir()
    assert not (tmp_path / ".latest.12.0a1b.tmp").exists()


@pytest.mark.parametrize(
    "name",
    ["data.json", "latest", "lock", "rounds", "rounds/0007.shared.safetensors", "clients/zoe/0003.tmp"],
)
def test_a_folder_with_something_else_under_a_runs_names_is_refused_and_stays(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / "clients" / "anna").mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"mine": 1}')
    if path.parent.name == "run":
        (tmp_path / "run/clients/anna").rmdir()
    with pytest.raises(StoreError, match=rf"run holds {name.split('/')[0]}.*move it away, or choose another"):
        Store(tmp_path / "run").create("# settings\n", {"sizes": {}})
    assert path.read_bytes() == b'{"mine": 1}' and not (tmp_path / "run/config.toml").exists()


def test_what_a_run_without_settings_left_behind_is_no_obstacle(tmp_path):
    folder = tmp_path / "run"
    (folder / "rounds").mkdir(parents=True)
    (folder / "clients").mkdir()
    (folder / "lock").touch()
    (folder / "data.json").write_text('{"sizes": {"anna": [6, 2]}, "sha256": "0"}')
    (folder / ".config.toml.12.0a1b.tmp").write_text("ha")
    made = Store(folder)
    made.create("# settings\n", {"sizes": {}})
    assert sorted(p.name for p in folder.iterdir()) == [
        "clients",
        "config.toml",
        "data.json",
        "lock",
        "rounds",
    ]
    made.release()


def test_a_run_whose_pointer_was_deleted_keeps_its_states(store):
    store.save_client("anna", 1, state(1.0))
    store.save_shared(1, state(1.0))
    store.commit(1, True, 0)
    (store.folder / "latest").unlink()
    store.release()
    with pytest.raises(StoreError, match=r"latest is missing, but there is .*0001\.shared\.safetensors"):
        Store(store.folder).open()
    assert files(store) == ["clients/anna/0001.safetensors", "rounds/0001.shared.safetensors"]


def test_two_processes_cannot_run_one_run(store):
    with pytest.raises(StoreError, match="another process is running this run"):
        Store(store.folder).open()
    reopened(store).release()


def test_folders_that_hold_no_run_and_a_damaged_pointer_are_named(store, tmp_path):
    with pytest.raises(StoreError, match=r"nowhere holds no run: there is no config\.toml"):
        Store(tmp_path / "nowhere").open()
    (store.folder / "latest").write_text('{"round": 1')
    with pytest.raises(StoreError, match=r"latest cannot be read"):
        store.read_latest()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"round": "1"}, "round is '1', expected a number"),
        ({"round": True}, "round is True, expected a number"),
        ({"history_bytes": -1}, "history_bytes is -1, expected a number"),
        ({"history_bytes": None}, "history_bytes is None"),
        ({"evaluated": 1}, "evaluated is 1, expected true or false"),
        ({"clients": ["anna"]}, r"clients is \['anna'\], expected an object of numbers"),
        ({"clients": {"anna": "1"}}, r"clients is \{'anna': '1'\}"),
        ({"extra": 1}, "it has round, evaluated, history_bytes, clients, extra; expected round"),
    ],
)
def test_a_pointer_with_other_types_is_named_with_the_key(store, changes, message):
    path = store.folder / "latest"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(StoreError, match=rf"latest cannot be read \({message}"):
        reopened(store)


@pytest.mark.parametrize("text", ["[1]", "3", "{}", "\udcff"])
def test_a_pointer_that_is_something_else_is_named(store, text):
    (store.folder / "latest").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match="latest cannot be read"):
        reopened(store)


@pytest.mark.parametrize("gone", ["0001.safetensors", "anna", "clients"])
def test_a_trained_client_whose_file_is_gone_is_not_taken_for_a_new_one(store, gone):
    store.save_client("anna", 1, state(1.0))
    store.save_shared(1, state(1.0))
    store.commit(1, False, 0)
    store.save_shared(2, state(2.0))
    store.commit(2, True, 0)
    path = store.clients / "anna" / "0001.safetensors"
    path.rename(store.folder / "aside")
    if gone != "0001.safetensors":
        path.parent.rmdir()
    if gone == "clients":
        store.clients.rmdir()
    message = r"client 'anna': .*clients/anna/0001\.safetensors is missing; .* in round 1: put it back"
    with pytest.raises(StoreError, match=message):
        store.load_client("anna")
    with pytest.raises(StoreError, match=message):
        reopened(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    (store.folder / "aside").rename(path)
    again = Store(store.folder)
    assert again.open().clients == {"anna": 1} and again.load_client("anna")["w"][0] == 1.0
    again.release()


def test_a_run_in_which_no_client_kept_anything_needs_no_folder_for_them(store):
    store.clients.rmdir()
    again = reopened(store)
    assert again.load_client("anna") is None
    again.release()


@pytest.mark.parametrize("name", ["anna", "a.b-c_9"])
def test_plain_names_are_their_own_folders(name):
    assert folder_name(name) == name


def test_other_names_get_folders_that_are_safe_and_differ():
    names = [
        "../../etc",
        "a/b",
        "a b",
        "Anna",
        "ANNA",
        "..",
        ".",
        "",
        "é",
        "x" * 200,
        "x" * 201,
        "nul\0",
        "a.",
    ]
    folders = [folder_name(name) for name in names]
    assert len({f.lower() for f in folders}) == len(names)
    for folder in folders:
        assert "/" not in folder and "\0" not in folder and folder.strip(".") and len(folder) <= 64


def test_history_is_on_disk_at_once_and_cut_back_to_what_was_committed(tmp_path):
    path = tmp_path / "rounds" / "history.jsonl"
    history = History(path)
    history.append("round", round=1, loss=0.5)
    assert [e["event"] for e in read_history(path)] == ["round"]
    kept = history.sync()
    history.append("client", round=2, client="é")
    history.close()
    again = History(path, kept)
    again.append("round", round=2)
    assert [(e["event"], e["round"]) for e in again] == [("round", 1), ("round", 2)]
    assert select_events(again, "round", round=1) == [{"event": "round", "round": 1, "loss": 0.5}]
    again.close()
    with pytest.raises(ValueError, match="it was changed since"):
        History(path, 10_000)


def test_a_full_disk_under_the_history_is_named_with_what_stands(store):
    """In a process of its own, as above: the system refuses the second of two lines in its middle."""
    store.release()
    program = f"""
import resource, signal
from flex.history import History
from flex.store import Store, StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store({str(store.folder)!r})
store.open()
history = History(store.history, 0, store.intact)
history.append("client", round=1)
store.commit(1, True, history.sync())
resource.setrlimit(resource.RLIMIT_FSIZE, (100, {resource.RLIM_INFINITY}))
try:
    history.append("client", round=2, client="x" * 500)
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"could not write {store.history}: File too large; the run is intact up to round 1" in done.stdout
    assert f"flex-moe train --resume {store.folder}" in done.stdout
    assert store.history.stat().st_size == 100
    again = Store(store.folder)
    commit = again.open()
    history = History(again.history, commit.history_bytes)
    assert list(history) == [{"event": "client", "round": 1}]
    history.close()
    again.release()


def test_a_history_that_cannot_be_flushed_or_opened_is_named(tmp_path, monkeypatch):
    history = History(tmp_path / "history.jsonl", intact=lambda: "all is well")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("flex.history.os.fsync", full)
        with pytest.raises(StoreError, match=r"write .*history\.jsonl: No space left on device; all is well"):
            history.sync()
    history.close()
    with pytest.raises(StoreError, match=r"could not write .*history\.jsonl/x/history\.jsonl: "):
        History(tmp_path / "history.jsonl" / "x" / "history.jsonl")


def test_a_last_line_cut_short_is_passed_over_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({"event": "run"}) + '\n{"event": "cl')
    assert list(read_history(path)) == [{"event": "run"}]
    path.write_text('{"event"\n{"event": "run"}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl:1: not JSON"):
        list(read_history(path))
