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
    assert again.committed == Commit(1, True, 10)
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
    assert again.committed == Commit(1, True, 0)
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


def test_a_last_line_cut_short_is_passed_over_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({"event": "run"}) + '\n{"event": "cl')
    assert list(read_history(path)) == [{"event": "run"}]
    path.write_text('{"event"\n{"event": "run"}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl:1: not JSON"):
        list(read_history(path))
