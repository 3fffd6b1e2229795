"""The GPU suite and the roofline as they run on a machine without a GPU."""

import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_checks, gpu_suite, roofline
from benchmarks.gpu_layers import contenders, make_problem
from flex_kernels.triton import codegen

QWEN = next(layer for layer in roofline.LAYERS if layer.name.startswith("Qwen1.5"))


@pytest.fixture
def one_kernel(monkeypatch):
    """Only the smallest kernel is compiled: the others have tests of their own."""
    name = "sm_90 bf16 combine"
    case = codegen.cases()[name]
    monkeypatch.setattr(codegen, "cases", lambda: {name: case})
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_suite_checks_measures_and_compiles(one_kernel, tmp_path):
    assert gpu_suite.main(["--out", str(tmp_path), "--quick"]) == 0
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert found["failures"] == 0 and found["machine"]["gpu"] is None
    assert {r["backend"] for r in found["checks"]} <= {"cpu", "reference"}
    assert all(r["error_over_allowed"] <= 1 for r in found["checks"])
    assert [r["name"] for r in found["codegen"]] == ["sm_90 bf16 combine"]
    measured = {r["name"]: r for r in found["measurements"]}
    assert measured["transformers grouped_mm"]["both_ms"] > 0
    assert {r["sizes"][-1] for r in found["checks"]} == {"plain", "int8", "nf4"}
    if "cpu" in {r["backend"] for r in found["checks"]}:
        assert measured["flex cpu recompute, nf4 experts"]["both_ms"] > 0
        assert "floor_both_ms" not in measured["flex cpu recompute, int8 experts"]
    assert "times say nothing" in found["note"]


def test_a_kernel_that_spills_fails_the_suite(one_kernel, tmp_path, monkeypatch):
    real = codegen.resources
    monkeypatch.setattr(
        codegen, "resources", lambda *args: type(real(*args))(**(vars(real(*args)) | {"stack": 8}))
    )
    assert gpu_suite.main(["--out", str(tmp_path), "--quick"]) == 1
    (record,) = json.loads((tmp_path / "gpu_suite.json").read_text())["codegen"]
    assert not record["passed"] and record["stack"] == 8


def test_every_record_is_on_disk_before_the_next_one_starts(tmp_path):
    report = gpu_suite.Report(tmp_path, time.monotonic() + 60)
    for n in range(3):
        report.add("checks", {"n": n})
        assert json.loads(report.path.read_text())["checks"] == [{"n": i} for i in range(n + 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["gpu_suite.json"]


def test_a_command_that_fails_or_hangs_is_recorded_with_its_output(tmp_path):
    report = gpu_suite.Report(tmp_path, time.monotonic() + 60)
    assert not gpu_suite.command(
        report, "fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 30
    )
    assert not gpu_suite.command(report, "hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    fails, hangs = report.sections["commands"]
    assert "why" in fails["output"] and "stopped after 1 s" in hangs["output"]
    assert len(list(gpu_suite.failures(report.sections))) == 2


def test_every_contender_computes_the_same_layer():
    layer = roofline.Layer("small", 32, 16, 5, 2)
    p = make_problem(layer, 9, "cpu", gpu_suite.torch.float32)
    want = None
    for name, build in contenders(p, ["cpu"]).items():
        if "dense" in name or "personal" in name or name in ("liger fused_moe", "scattermoe"):
            continue
        got = build()(p.x_TH)
        want = got if want is None else want
        gpu_suite.torch.testing.assert_close(got, want, msg=name)


def test_quantised_contenders_are_the_same_layer_up_to_their_rounding():
    p = make_problem(roofline.Layer("small", 64, 32, 5, 2), 9, "cpu", gpu_suite.torch.float32)
    found = contenders(p, ["cpu"], quantised=True)
    want = found["flex cpu recompute"]()(p.x_TH)
    for kind, least, most in (("int8", 1e-3, 0.03), ("nf4", 0.03, 0.3)):
        got = found[f"flex cpu recompute, {kind} experts"]()(p.x_TH)
        assert least < ((got - want).norm() / want.norm()).item() < most, kind
    assert not any("experts" in name for name in contenders(p, ["cpu"]))


def test_the_tests_that_the_suite_picks_by_name_exist():
    suite = (gpu_suite.ROOT / "tests" / "triton_suite_codes.py").read_text()
    for name in ("test_every_value", "captured", "of_the_format"):
        assert name in suite


def test_the_floor_is_arithmetic_for_many_tokens_and_memory_for_few():
    chip = roofline.Chip("round numbers", flops=1e15, bandwidth=2e12)
    many, few = roofline.floor_seconds(QWEN, 8192, chip), roofline.floor_seconds(QWEN, 16, chip)
    # 6 * 2048 * 8192 * (4 * 1408 + 5632) operations at 1e15 a second.
    assert many == pytest.approx(1.13387e-3, rel=1e-4)
    # 60 (1 - (56/60)^16) = 40.1052 experts of 3 * 2048 * 1408 weights, a shared one of 3 * 2048 * 5632, and
    # 2 * 16 * 2048 numbers of x and y: 2 bytes each, at 2e12 bytes a second.
    weights = 3 * 2048 * (40.1052 * 1408 + 5632)
    assert few == pytest.approx((weights + 2 * 16 * 2048) * 1e-12, rel=1e-4)


def test_the_roofline_says_that_it_is_an_estimate(capsys):
    roofline.main()
    printed = capsys.readouterr().out
    assert printed.startswith("ESTIMATES") and "nothing below was measured" in printed


def test_a_backend_that_breaks_is_a_failed_check_and_not_the_end(monkeypatch):
    def broken(*args, **options):
        if options["backend"] != "reference":
            raise RuntimeError("illegal memory access")
        return gpu_checks.reference.moe(*args, options["mix"])[0]

    monkeypatch.setattr(gpu_checks, "flex_moe", broken)
    found = list(gpu_checks.check_layers(["cpu"], "cpu", gpu_checks.TINY[:2], (gpu_suite.torch.float32,), 0))
    assert [r["failed"] for r in found] == ["RuntimeError: illegal memory access"] * 2
    assert not any(r["passed"] for r in found)
