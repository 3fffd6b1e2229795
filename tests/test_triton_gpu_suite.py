"""The GPU suite and the roofline as they run on a machine without a GPU."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_checks, gpu_measure, gpu_parts, gpu_suite, gpu_worker, roofline
from benchmarks.gpu_layers import LIGER, SCATTERMOE, compiled_contenders, contenders, make_problem
from flex_kernels.triton import codegen, tiles

QWEN = next(layer for layer in roofline.LAYERS if layer.name.startswith("Qwen1.5"))


@pytest.fixture
def one_kernel(monkeypatch):
    """Only the smallest kernel is compiled: the others have tests of their own."""
    name = "sm_90 bf16 combine"
    case = codegen.cases()[name]
    monkeypatch.setattr(codegen, "cases", lambda: {name: case})
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_suite_checks_measures_and_compiles(one_kernel, tmp_path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path), "--quick"]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert found["failures"] == 0 and found["machine"]["gpu"] is None
    assert {r["backend"] for r in found["checks"]} <= {"cpu", "reference"}
    assert all(r["error_over_allowed"] <= 1 for r in found["checks"])
    assert [r["name"] for r in found["codegen"]] == ["sm_90 bf16 combine"]
    measured = {r["name"]: r for r in found["measurements"]}
    for name in ("grouped_mm", "eager", "batched_mm", "grouped_mm, compiled", "eager, compiled"):
        assert measured[f"transformers {name}"]["both_ms"] > 0, name
    assert {r["skewed"] for r in found["measurements"]} == {True, False}
    assert {r["name"] for r in found["measurements"] if "failed" in r} == set()
    assert found.get("parts", []) == [], "no part was stopped or failed"
    steps = {r["layer"]: r for r in found["client"]}
    assert list(steps) == ["flex-recompute", "grouped_mm", "eager", "flex-preact"]
    # The same model, batches and start: the losses agree up to bfloat16.
    for step in steps.values():
        assert len(step["losses"]) == 4 and step["trained"] == steps["eager"]["trained"]
        assert step["losses"] == pytest.approx(steps["eager"]["losses"], rel=2e-3)
        assert step["tokens_per_second"] > 0 and step["peak_bytes"] > 0
    assert {r["forward_launches"] for r in found["launches"]} == {None}, "there is no device to launch on"
    (routing,) = found["routing"]
    assert routing["both_ms"] > 0 and routing["route_ms"] > 0
    assert found["summary"]["client"]["eager"]["ours_times_as_fast"] > 0
    (even, skewed) = found["summary"]["layers"]
    assert (even["skewed"], skewed["skewed"]) == (False, True)
    assert {r["sizes"][-1] for r in found["checks"]} == {"plain", "int8", "nf4"}
    if "cpu" in {r["backend"] for r in found["checks"]}:
        assert measured["flex cpu recompute, nf4 experts"]["both_ms"] > 0
        assert measured["flex cpu recompute, compiled"]["both_ms"] > 0
        # 16 tokens: x of 64 numbers in 2 bytes, 2 ids and 2 weights of 4 bytes. Nothing else is kept.
        assert measured["flex cpu recompute"]["saved_bytes"] == 16 * (2 * 64 + 2 * 4 + 2 * 4)
        assert even["saved_bytes_a_token"] == 144
        # With a personal expert the gate's 4 bytes a token more; its row is kept as it came.
        complete = measured["flex cpu recompute, with personal and shared"]
        assert complete["saved_bytes"] == 16 * (144 + 4)
    assert "times say nothing" in found["note"]


def test_a_kernel_that_spills_fails_the_suite(one_kernel, tmp_path, monkeypatch):
    real = codegen.resources
    monkeypatch.setattr(
        codegen, "resources", lambda *args: type(real(*args))(**(vars(real(*args)) | {"stack": 8}))
    )
    assert gpu_suite.main(["--out", str(tmp_path), "--quick", "--parts", "codegen"]) == 1
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
    layers = contenders(["cpu"]) | compiled_contenders(["cpu"], "cpu")
    for name, build in layers.items():
        if any(part in name for part in ("dense", "personal", "experts", "liger", "scattermoe")):
            continue
        got = build(p)(p.x_TH)
        want = got if want is None else want
        gpu_suite.torch.testing.assert_close(got, want, msg=name)


def test_quantised_contenders_are_the_same_layer_up_to_their_rounding():
    p = make_problem(roofline.Layer("small", 64, 32, 5, 2), 9, "cpu", gpu_suite.torch.float32)
    found = contenders(["cpu"])
    want = found["flex cpu recompute"](p)(p.x_TH)
    for kind, least, most in (("int8", 1e-3, 0.03), ("nf4", 0.03, 0.3)):
        got = found[f"flex cpu recompute, {kind} experts"](p)(p.x_TH)
        assert least < ((got - want).norm() / want.norm()).item() < most, kind


def test_the_tests_that_the_suite_picks_by_name_exist():
    suite = (gpu_suite.ROOT / "tests" / "triton_suite_codes.py").read_text()
    for name in ("test_every_value", "captured", "of_the_format"):
        assert name in suite
    kernels = (gpu_suite.ROOT / gpu_suite.KERNEL_TESTS[0]).read_text()
    assert any(word in kernels for word in gpu_suite.SANITIZED.split(" or "))
    assert all((gpu_suite.ROOT / name).is_file() for name in (*gpu_suite.gpu_tests(), *gpu_suite.CODES))


def test_the_suite_s_tests_do_without_what_it_turns_off(monkeypatch, tmp_path):
    """It runs pytest without its cache, in which the CUDA kernels built for the host are kept."""
    import cuda_emulation

    assert "no:cacheprovider" in gpu_suite.PYTEST
    monkeypatch.setattr(cuda_emulation.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cuda_emulation.kept(argparse.Namespace()).parent == tmp_path
    assert '["emulated", "gpu"]' in Path(cuda_emulation.__file__).read_text()
    assert gpu_suite.ON_GPU_TESTS == "not emulated"


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


def test_the_checks_reach_every_row_block_of_the_pinned_plans():
    routed = {
        tiles.pinned_plan(90, 2, T * (1 if routing == "one-hot" else K), E).m
        for T, _, _, E, K, _, routing, _ in gpu_checks.SIZES + gpu_checks.BFLOAT16_SIZES
    }
    assert routed == set(tiles.HOPPER)
    T, H, I, _, K, *_ = gpu_checks.BFLOAT16_SIZES[0]
    plan, processors = tiles.HOPPER[128], 132
    for tile, reduced in ((plan.up, H), (plan.down, I)):
        assert tile.flatten and T * K // tile.m > 2 * processors * tile.per_sm
        assert tiles.ceil_div(reduced, tile.k) < tile.stages - 1


def test_the_allowed_error_covers_float32_sums_in_order_and_nothing_larger():
    torch = gpu_suite.torch
    n, generator = 4096, torch.Generator().manual_seed(0)
    terms = torch.randn(n, 500, generator=generator)
    one_by_one = sum(terms, torch.zeros(500))
    found = gpu_checks.relative_error(one_by_one, terms.double().sum(0))
    # A layer has two products, one behind the other.
    assert 4e-7 < found < gpu_checks.allowed(0.0, torch.float32, n) / 2
    tf32 = 2.0**-11
    assert gpu_checks.allowed(0.0, torch.float32, 14336) < tf32 / 20


def test_the_kernels_that_take_most_are_named_with_their_calls():
    found = [("up", 5.0), ("down", 4.0), ("up", 6.5), *((f"small {i}", 0.1) for i in range(20))]
    named = gpu_measure.by_kernel(found)
    assert list(named.items())[:2] == [("up", [2, 11.5]), ("down", [1, 4.0])]
    assert len(named) == gpu_measure.NAMED_KERNELS


def test_a_backend_that_breaks_is_a_failed_check_and_not_the_end(monkeypatch):
    def broken(*args, **options):
        if options["backend"] != "reference":
            raise RuntimeError("illegal memory access")
        return gpu_checks.reference.moe(*args, options["mix"])[0]

    monkeypatch.setattr(gpu_checks, "flex_moe", broken)
    found = list(gpu_checks.check_layers(["cpu"], "cpu", gpu_checks.TINY[:2], (gpu_suite.torch.float32,), 0))
    assert [r["failed"] for r in found] == ["RuntimeError: illegal memory access"] * 2
    assert not any(r["passed"] for r in found)


BAD_CASES = """
import sys

if sys.orig_argv[1:2] == ["-m"]:
    import os, time
    from benchmarks import gpu_parts

    def run(options, case):
        (what,) = case
        if what == "raises":
            raise RuntimeError("no kernel image")
        yield "seen", {"case": what}
        if what == "dies":
            print("a last word")
            os._exit(3)
        if what == "hangs":
            time.sleep(60)
        if what == "breaks the device":
            gpu_parts.device_works = lambda device: False

    names = ("fine", "raises", "dies", "hangs", "breaks the device", "fine again")
    gpu_parts.PARTS["bad"] = gpu_parts.Part(lambda options: [(name,) for name in names], run)
"""


def test_a_case_that_raises_dies_hangs_or_breaks_the_device_costs_itself_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BAD_CASES)
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{gpu_worker.ROOT}"}
    found = []
    work = gpu_worker.Work(("bad",), "cpu", ("cpu",), environment=path)
    gpu_worker.run_part(work, 250, 4, lambda section, record: found.append((section, record)))
    seen = [record["case"] for section, record in found if section == "seen"]
    assert seen == ["fine", "dies", "hangs", "breaks the device", "fine again"]
    wrong = [record for section, record in found if section == "parts"]
    reasons = ["RuntimeError: no kernel image", "exit code 3", "over 4 s", "the device is unusable"]
    assert [record["failed"] for record in wrong] == reasons
    assert "a last word" in wrong[1]["output"] and "'hangs'" in wrong[2]["case"]


SLOW = """
import time
print('@suite {"case": 0, "name": "slow"}', flush=True)
time.sleep(60)
"""


def test_a_part_ends_with_its_time_and_says_during_which_case(monkeypatch):
    real = gpu_worker.start
    slow = [sys.executable, "-c", SLOW]
    monkeypatch.setattr(gpu_worker, "start", lambda arguments, *given, **named: real(slow, *given, **named))
    found = []
    work = gpu_worker.Work(("any",), "cpu", ("cpu",))
    gpu_worker.run_part(work, 3, 60, lambda section, record: found.append((section, record)))
    assert found == [("parts", {"part": "any", "stopped": "its 3 s are over", "during": "slow"})]


def test_ending_a_process_ends_what_it_started():
    process = gpu_worker.start(["sh", "-c", "sleep 100 & echo $!; wait"], {})
    child = int(process.stdout.readline())
    gpu_worker.end(process)
    for _ in range(50):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")


def test_what_a_worker_prints_beside_its_messages_is_not_one():
    assert gpu_worker.parsed("@suite not json") is None
    assert gpu_worker.parsed("@suite [1]") is None
    assert gpu_worker.parsed('{"case": 1}') is None
    assert gpu_worker.parsed('@suite {"case": 1}\n') == {"case": 1}


OPTIONS = argparse.Namespace(device="cuda", backends=["cuda", "triton"], seed=0, workers=1)


def layer_cases(part):
    return [case for case in gpu_parts.PARTS[part].cases(OPTIONS) if case[0] in gpu_parts.BY_NAME]


def test_every_layer_size_and_routing_of_the_issue_is_measured_beside_its_peers():
    names = {}
    for layer, tokens, skewed, name in layer_cases("targets") + layer_cases("others"):
        names.setdefault((layer, tokens, skewed), set()).add(name)
    peers = {"transformers grouped_mm", "dense of equal FLOPs", SCATTERMOE}
    for layer in roofline.LAYERS:
        for tokens in (16, 128, 1024, 8192, 32768):
            for skewed in (False, True):
                found = names[layer.name, tokens, skewed]
                assert peers | {"flex cuda preact", "flex cuda recompute"} <= found
                assert tokens > 128 or "transformers eager" in found
    known = contenders(OPTIONS.backends)
    assert all(found <= known.keys() for found in names.values())


def test_the_targets_are_measured_first_and_fit_their_time():
    sizes = [(tokens, skewed) for _, tokens, skewed, _ in layer_cases("targets")]
    assert list(dict.fromkeys(sizes)) == [(8192, False), (128, False), (16, False), (8192, True)]
    installed = [c for c in layer_cases("targets") if c[3] != SCATTERMOE]
    planned = sum(map(gpu_parts.estimated_seconds, installed)) + 10
    assert planned < gpu_suite.TARGETS_S
    both = planned + sum(map(gpu_parts.estimated_seconds, layer_cases("others")))
    assert both < 540, "a second run with --parts targets others has them all"


def test_liger_is_tuned_for_a_layer_before_it_is_measured_there(monkeypatch):
    monkeypatch.setattr(gpu_parts.gpu_liger, "installed", lambda: False)
    assert gpu_parts.PARTS["liger"].cases(OPTIONS) == []
    monkeypatch.setattr(gpu_parts.gpu_liger, "installed", lambda: True)
    cases = gpu_parts.PARTS["liger"].cases(OPTIONS)
    first, *rest = cases[: len(cases) // len(roofline.LAYERS)]
    assert first == (QWEN.name, 8192, "tune") and rest[0] == (QWEN.name, 8192, False)
    assert {case[1:] for case in rest} == {
        (tokens, skewed) for tokens in (16, 128, 1024, 8192, 32768) for skewed in (False, True)
    }
    assert LIGER in contenders(OPTIONS.backends)


def test_the_shares_of_a_tuners_configurations_are_all_of_them_and_never_empty():
    shares = [gpu_parts.gpu_liger.share(range(10), part, 4) for part in range(4)]
    assert sorted(one for part in shares for one in part) == list(range(10))
    assert gpu_parts.gpu_liger.share(range(2), 3, 4) == [0]


def test_batched_products_are_left_out_where_they_would_gather_too_much():
    assert "transformers batched_mm" in gpu_parts.target_names(["cuda"], QWEN, 128)
    mixtral = roofline.LAYERS[-1]
    assert "transformers batched_mm" not in gpu_parts.target_names(["cuda"], mixtral, 128)
    assert "transformers batched_mm" in gpu_parts.target_names(["cuda"], mixtral, 16)


def test_whatever_is_measured_was_compiled_before():
    warm = {case[2] for case in gpu_parts.PARTS["warm"].cases(OPTIONS)}
    ours = {c[3] for c in layer_cases("targets") + layer_cases("others") if c[3].startswith("flex")}
    assert ours <= warm


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A suite on a GPU whose workers and commands are only noted, in order: (name, limit)."""
    noted = []

    def part(work, limit, case_limit, receive):
        noted.append((work.parts[0], work.backends, limit))
        if work.parts[0] == "client":
            raise OSError("no more processes")

    monkeypatch.setattr(gpu_suite, "run_part", part)
    monkeypatch.setattr(
        gpu_suite, "command", lambda report, name, arguments, limit, **e: noted.append((name, e, limit))
    )
    monkeypatch.setattr(gpu_suite, "usable_backends", lambda report: ("cuda", "triton"))
    monkeypatch.setattr(gpu_suite, "sanitizer", lambda: "/bin/compute-sanitizer")
    monkeypatch.setattr(gpu_suite, "unbuilt", lambda: False)
    monkeypatch.setattr(gpu_suite, "CACHE", tmp_path / "cache")
    parts = [part for part in gpu_suite.PARTS if part != "codegen"]

    def run(seconds, parts=parts):
        report = gpu_suite.Report(tmp_path, time.monotonic() + seconds)
        gpu_suite.on_gpu(gpu_suite.Suite(report, parts, "cuda", 0))
        return noted, report

    return run


def test_on_a_gpu_the_parts_run_in_the_order_of_their_importance(pretended):
    noted, report = pretended(540)
    order = list(dict.fromkeys(name for name, *_ in noted))
    first = {"build the extension", "checks", "warm", "Triton's kernels alone"}
    assert set(order[:4]) == first
    assert order[4:6] == ["targets", "client"]
    tests = {"the GPU tests", "tests of quantised experts", "compute-sanitizer memcheck"}
    assert set(order[6:9]) == tests and order[9:] == ["launches", "compiled", "liger", "tune", "others"]
    assert {b for name, b, _ in noted if name == "checks"} == {("cuda",), ("triton",)}
    assert all(limit <= 540 for *_, limit in noted)
    (wrong,) = report.sections["parts"]
    assert "no more processes" in wrong["failed"], "the client step broke, and the rest went on"


def test_a_backend_whose_checks_fail_is_not_the_one_that_is_measured():
    good, bad = {"backend": "triton", "passed": True}, {"backend": "cuda", "passed": False}
    names = ("cuda", "triton")
    assert gpu_suite.by_health(names, {"checks": [good, bad]}) == ("triton", "cuda")
    assert gpu_suite.by_health(names, {"checks": [good]}) == ("triton", "cuda"), "no check of it ended"
    assert gpu_suite.by_health(names, {"checks": [good, bad | {"passed": True}]}) == names


def test_packages_that_the_user_put_on_the_path_reach_the_workers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/some/site")
    process = gpu_worker.start(["sh", "-c", "echo $PYTHONPATH"], {})
    assert process.communicate()[0].strip() == f"{gpu_worker.ROOT}{os.pathsep}/some/site"


def test_parts_that_are_not_asked_for_do_not_run(pretended):
    noted, _ = pretended(540, ["targets", "tune"])
    assert [name for name, *_ in noted] == ["targets", "tune"]


def test_a_suite_without_time_starts_nothing_and_says_so(pretended):
    noted, report = pretended(5)
    assert noted == []
    assert {r["part"] for r in report.sections["parts"] if "skipped" in r} >= {"build", "checks", "tune"}


def test_an_error_of_the_suite_itself_leaves_a_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_suite, "without_gpu", lambda *args: 1 / 0)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert "ZeroDivisionError" in found["parts"][0]["failed"] and "summary" in found
    assert "1 failures" in capsys.readouterr().out
