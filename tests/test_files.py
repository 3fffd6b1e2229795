"""Atomic files: a write that fails leaves what was there, and foreign files are named."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from flex.files import atomic_write, check_finite, load_tensors, save_tensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(7),
    "c": torch.ones(3, dtype=torch.bfloat16),
}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(t, other[n]) and t.dtype == other[n].dtype for n, t in one.items()
    )


def test_tensors_come_back_as_they_were_saved(tmp_path):
    path = tmp_path / "deep" / "er" / "t.safetensors"
    save_tensors(path, TENSORS, {"round": "3"})
    assert same(load_tensors(path), TENSORS)
    with safe_open(path, "pt") as file:
        assert file.metadata()["round"] == "3"
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_views_and_tensors_of_one_memory_are_written_in_full(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"all": base, "column": base[:, 1], "turned": base.T}
    save_tensors(tmp_path / "t", tensors)
    assert same(load_tensors(tmp_path / "t"), tensors)


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    save_tensors(tmp_path / "t", TENSORS)
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_block_that_raises_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_new_content_is_on_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    path, events = tmp_path / "f", []
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", str(b))), real(a, b)))
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert events == [("fsync", str(temporary)), ("replace", str(path)), ("fsync", str(tmp_path))]


def test_a_full_disk_at_the_flush_names_the_file_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing: .*t\.safetensors") as caught:
        save_tensors(path, {"a": torch.zeros(9)})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert same(load_tensors(path), TENSORS) and list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_cuts_short_names_the_file_and_loses_nothing(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS)
    code = (
        "import resource, signal, sys, torch\n"
        "from flex.files import save_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    save_tensors(sys.argv[1], {'a': torch.zeros(9999)})\n"
        "except OSError as error:\n"
        "    print(error.errno, error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(path)]
    assert same(load_tensors(path), TENSORS) and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_tensors(tmp_path / "file" / "t", TENSORS)


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:20],
        lambda whole: b"",
        lambda whole: b"PK\x03\x04" + bytes(200),
        lambda whole: whole + b"more",
    ],
)
def test_a_truncated_or_foreign_file_is_refused_by_name(content, tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t\.safetensors is truncated or is not a safetensors file"):
        load_tensors(path)


def test_a_pickle_is_never_loaded(tmp_path):
    torch.save(TENSORS, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"t\.pt is truncated or is not a safetensors file"):
        load_tensors(tmp_path / "t.pt")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path)


def test_values_that_are_not_finite_are_counted_and_named():
    check_finite(TENSORS, "state")
    with pytest.raises(ValueError, match=r"state: a \[3\] has 2 values that are not finite"):
        check_finite({"n": torch.tensor(1), "a": torch.tensor([1.0, float("nan"), float("-inf")])}, "state")
