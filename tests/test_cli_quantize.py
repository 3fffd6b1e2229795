"""flex-moe quantize: the folder that it writes, and what it refuses before it reads a weight."""

from __future__ import annotations

import gzip

import pytest
import torch
from test_cli import failed
from test_loading import same_bits
from tiny import save_tiny, write_rows
from transformers import AutoTokenizer

import flex
from flex import cli
from flex.batching import padded_batches
from flex.data import read_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    save_tiny(folder / "model")
    write_rows(folder / "rows.jsonl", {"anna": 6})
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten. " * 40)
    return folder


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_without_calibration_the_folder_holds_what_load_gives(kind, place, tmp_path, capsys):
    out = tmp_path / "new" / "small"
    assert cli.main(["quantize", str(place / "model"), "--out", str(out), "--experts", kind]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"routed experts in {kind}: ") and printed[-1] == str(out)
    same_bits(flex.load(out), flex.load(place / "model", kind))
    assert AutoTokenizer.from_pretrained(out)("one").input_ids


@pytest.mark.parametrize("packed", [False, True])
def test_rows_calibrate_with_error_feedback(packed, place, tmp_path, capsys):
    rows = place / "rows.jsonl"
    if packed:
        rows = tmp_path / "rows.jsonl.gz"
        rows.write_bytes(gzip.compress((place / "rows.jsonl").read_bytes()))
    out = tmp_path / "small"
    given = ["--calibration", str(rows), "--rows", "4", "--max-length", "40", "--dtype", "float32"]
    assert cli.main(["quantize", str(place / "model"), "--out", str(out), *given]) == 0
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    batches = list(padded_batches(read_jsonl(rows)[:4], tokenizer, 40, 4))
    assert f", by {int(batches[0]['attention_mask'].sum())} tokens: " in capsys.readouterr().out
    same_bits(flex.load(out), flex.load(place / "model", "nf4", torch.float32, gptq=batches))


def test_plain_text_is_cut_into_rows(place, tmp_path, capsys):
    given = ["--calibration", str(place / "text.txt"), "--rows", "3", "--max-length", "16"]
    out = tmp_path / "small"
    assert cli.main(["quantize", str(place / "model"), "--out", str(out), *given]) == 0
    assert "by 48 tokens" in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(place / "model")((place / "text.txt").read_text()).input_ids[:48]
    same_bits(flex.load(out), flex.load(place / "model", "nf4", gptq=[torch.tensor(ids).view(3, 16)]))


def test_what_cannot_be_used_is_named_and_nothing_written(place, tmp_path, capsys):
    model, out = str(place / "model"), tmp_path / "small"
    asked = ["quantize", model, "--out", str(out)]
    rows = str(place / "rows.jsonl")
    assert "--calibration is for --experts nf4, got int8" in failed(
        capsys, *asked, "--experts", "int8", "--calibration", rows
    )
    (tmp_path / "empty.txt").write_text(" \n")
    assert "empty.txt holds no text" in failed(capsys, *asked, "--calibration", str(tmp_path / "empty.txt"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "neither JSON lines" in failed(capsys, *asked, "--calibration", str(tmp_path / "bytes"))
    assert "absent.txt" in failed(capsys, *asked, "--calibration", str(tmp_path / "absent.txt"))
    assert "no shared experts" in failed(capsys, *asked, "--shared-experts", "int8")
    assert "there is no such folder" in failed(capsys, "quantize", "/nowhere/model", "--out", str(out))
    assert not out.exists()
    (tmp_path / "file").touch()
    assert "file" in failed(capsys, "quantize", model, "--out", str(tmp_path / "file" / "small"))
    (out / "kept").mkdir(parents=True)
    assert f"--out {out} exists and is not an empty folder" in failed(capsys, *asked)
    small = tmp_path / "again"
    assert cli.main(["quantize", model, "--out", str(small), "--experts", "int8"]) == 0
    again = ["quantize", str(small), "--out", str(tmp_path / "third")]
    assert "quantised already, with 'int8'" in failed(capsys, *again)
