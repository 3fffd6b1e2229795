"""What several runs of the GPU suite leave in one folder, on made-up records."""

import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_machine, gpu_report, gpu_suite

MACHINE = {"gpu": "Some GPU", "torch": "2.11.0", "source": "0123", "packages": {"triton": "3.6.0"}}


def run(folder, machine=MACHINE, parts=("targets",)):
    """A report as a run of the suite begins it."""
    report = gpu_report.Report(folder, time.monotonic() + 60)
    report.take_up(dict(machine), list(parts))
    return report


def stored(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def measured(name, both_ms, tokens=8192):
    return {"layer": "OLMoE", "tokens": tokens, "skewed": False, "name": name, "both_ms": both_ms} | {
        "forward_ms": both_ms / 3,
        "both_tflops": 1.0,
    }


def test_a_later_run_adds_to_the_results_and_replaces_what_it_measures_again(tmp_path, capsys):
    first = run(tmp_path)
    for record in (measured("flex cuda preact", 3.0), measured("transformers grouped_mm", 4.0)):
        first.add("measurements", record)
    first.add("rates", {"copy_bytes_per_s": 1.0})
    second = run(tmp_path, parts=["liger"])
    assert "adding to" in capsys.readouterr().out
    second.add("measurements", measured("liger fused_moe", 5.0))
    second.add("measurements", measured("flex cuda preact", 2.0))
    second.add("measurements", measured("flex cuda preact", 1.0, tokens=16))
    second.add("rates", {"copy_bytes_per_s": 2.0})
    (path,) = tmp_path.iterdir()
    found = stored(path)
    times = [(r["name"], r["tokens"], r["both_ms"]) for r in found["measurements"]]
    assert times == [
        ("transformers grouped_mm", 8192, 4.0),
        ("liger fused_moe", 8192, 5.0),
        ("flex cuda preact", 8192, 2.0),
        ("flex cuda preact", 16, 1.0),
    ]
    assert found["rates"] == [{"copy_bytes_per_s": 2.0}]
    assert [r["parts"] for r in found["runs"]] == [["targets"], ["liger"]]


def test_two_records_of_one_run_on_the_same_subject_are_both_kept(tmp_path):
    report = run(tmp_path)
    for both_ms in (1.0, 2.0):
        report.add("measurements", measured("flex cuda preact", both_ms))
    assert [r["both_ms"] for r in report.sections["measurements"]] == [1.0, 2.0]


@pytest.mark.parametrize(
    "other",
    [{"source": "4567"}, {"torch": "2.13.0"}, {"gpu": None}, {"packages": {"triton": "3.7.1"}}],
    ids=str,
)
def test_results_of_other_code_or_another_machine_are_left_alone(tmp_path, capsys, other):
    run(tmp_path).add("measurements", measured("flex cuda preact", 3.0))
    before = (tmp_path / "gpu_suite.json").read_bytes()
    capsys.readouterr()
    second = run(tmp_path, MACHINE | other)
    second.add("measurements", measured("flex cuda preact", 2.0))
    said = capsys.readouterr().out
    assert "gpu_suite.json is left as it is" in said and "gpu_suite_2.json" in said
    assert (tmp_path / "gpu_suite.json").read_bytes() == before
    third = run(tmp_path, MACHINE | other)
    third.add("rates", {})
    found = stored(tmp_path / "gpu_suite_2.json")
    assert third.path == second.path and [r["both_ms"] for r in found["measurements"]] == [2.0]
    assert len(found["runs"]) == 2


def test_a_package_that_comes_later_is_no_other_machine(tmp_path):
    run(tmp_path, MACHINE | {"packages": {"triton": "3.6.0", "liger_kernel": None}})
    second = run(tmp_path, MACHINE | {"packages": {"triton": "3.6.0", "liger_kernel": "0.6.2"}})
    assert second.path.name == "gpu_suite.json" and len(second.sections["runs"]) == 2


@pytest.mark.parametrize("content", ["", "[1]", '{"measurements": ['])
def test_a_file_that_cannot_be_read_is_left_alone(tmp_path, content):
    (tmp_path / "gpu_suite.json").write_text(content)
    report = run(tmp_path)
    report.add("rates", {})
    assert (tmp_path / "gpu_suite.json").read_text() == content
    assert report.path.name == "gpu_suite_2.json"


def test_what_goes_wrong_before_the_machine_is_known_overwrites_nothing(tmp_path, monkeypatch):
    run(tmp_path).add("rates", {})
    before = (tmp_path / "gpu_suite.json").read_bytes()
    monkeypatch.setattr(gpu_suite, "machine", lambda: 1 / 0)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    assert (tmp_path / "gpu_suite.json").read_bytes() == before
    assert "ZeroDivisionError" in stored(tmp_path / "gpu_suite_2.json")["parts"][0]["failed"]


def test_how_a_part_ended_is_forgotten_when_it_runs_again(tmp_path):
    first = run(tmp_path)
    first.add("parts", {"part": "checks 2/5", "stopped": "its 125 s are over"})
    first.add("parts", {"part": "checks", "case": "a case", "failed": "boom"})
    first.add("parts", {"part": "others", "skipped": "out of time"})
    second = run(tmp_path)
    second.begin("checks")
    second.add("parts", {"part": "checks 1/5", "failed": "boom"})
    second.begin("checks")
    left = [r["part"] for r in stored(second.path)["parts"]]
    assert left == ["others", "checks 1/5"]
    second.begin("others")
    assert [r["part"] for r in second.sections["parts"]] == ["checks 1/5"]


def test_the_summary_is_made_over_all_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "machine", lambda: dict(MACHINE))
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    for name, both_ms in (("flex cuda preact", 2.0), ("transformers grouped_mm", 3.0)):
        monkeypatch.setattr(
            gpu_suite,
            "without_gpu",
            lambda suite, quick, name=name, both_ms=both_ms: suite.report.add(
                "measurements", measured(name, both_ms)
            ),
        )
        assert gpu_suite.main(["--out", str(tmp_path), "--parts", "targets"]) == 0, capsys.readouterr().out
    (line,) = stored(tmp_path / "gpu_suite.json")["summary"]["layers"]
    assert line["against_grouped_mm"] == 1.5


def test_numbers_that_are_not_finite_are_written_as_text(tmp_path):
    report = run(tmp_path)
    report.add("checks", {"error_over_allowed": float("inf"), "all": [float("nan"), {"x": 1.5}], "n": 3})
    (record,) = stored(report.path)["checks"]
    assert record == {"error_over_allowed": "inf", "all": ["nan", {"x": 1.5}], "n": 3}


def test_tuned_plans_of_several_runs_come_together(tmp_path):
    report, tuned = run(tmp_path), tmp_path / "cache.json"
    for plans in ({"a": 1, "b": 1}, {"b": 2}):
        tuned.write_text(json.dumps(plans))
        report.keep_plans(tuned)
    assert stored(tmp_path / "tuned_plans.json") == {"a": 1, "b": 2}
    assert gpu_report.existing(tmp_path) == [report.path]


def test_the_digest_of_the_code_changes_with_the_code_and_with_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_machine, "ROOT", tmp_path)
    for name in ("flex_kernels/a.py", "csrc/cuda/b.cu", "benchmarks/results/c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = gpu_machine.source_digest()
    (tmp_path / "benchmarks/results/c.json").write_text("2")
    assert gpu_machine.source_digest() == first
    (tmp_path / "csrc/cuda/b.cu").write_text("2")
    second = gpu_machine.source_digest()
    (tmp_path / "csrc/cuda/b.cu").rename(tmp_path / "csrc/cuda/d.cu")
    assert len({first, second, gpu_machine.source_digest()}) == 3
