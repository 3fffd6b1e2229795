"""What the GPU suite makes of its records: ratios, targets and tables, on made-up figures."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_suite, gpu_summary, roofline, tables

QWEN = next(layer for layer in roofline.LAYERS if layer.name.startswith("Qwen1.5"))


def measured(name, both_ms, tokens=8192, **more):
    record = {"layer": QWEN.name, "tokens": tokens, "skewed": False, "name": name, "both_ms": both_ms}
    return record | {"forward_ms": both_ms / 3, "both_tflops": 1000 / both_ms} | more


SECTIONS = {
    "rates": [{"matmul_flops_per_s": 8e14, "copy_bytes_per_s": 4e12}],
    "measurements": [
        measured("flex cuda preact", 2.0),
        measured("flex cuda recompute", 2.5, saved_bytes=8192 * 4200),
        measured("transformers grouped_mm", 3.5),
        measured("liger fused_moe", 2.4),
        measured("dense of equal FLOPs", 1.6),
        measured("flex cuda recompute, int8 experts", 0.5),
        measured("flex cuda recompute", 0.1, tokens=128, peak_bytes=346_030_081, both_graph_ms=0.05),
        measured("flex cuda preact", 0.2, tokens=128, both_graph_ms=0.04),
        measured("transformers eager", 0.5, tokens=128),
        measured("transformers grouped_mm", 0.6, tokens=128, both_graph_ms=0.1),
        {"layer": QWEN.name, "tokens": 8192, "skewed": False, "name": "scattermoe", "missing": "no"},
    ],
    "launches": [
        {
            "layer": QWEN.name,
            "tokens": 8192,
            "name": "flex cuda preact",
            "forward_launches": 6,
            "both_launches": 12,
        },
        {"layer": QWEN.name, "tokens": 8192, "name": "flex cuda recompute", "forward_launches": 6},
    ],
    "routing": [{"tokens": 8192, "both_ms": 0.09, "both_graph_ms": 0.024}],
    "client": [
        {"layer": "flex-recompute", "tokens_per_second": 300.0, "peak_bytes": 50, "loaded_bytes": 1},
        {"layer": "eager", "tokens_per_second": 100.0, "peak_bytes": 100, "loaded_bytes": 1},
    ],
}


def test_the_summary_takes_the_faster_of_ours_against_each_peer():
    found = gpu_summary.summarise(SECTIONS)
    many, few = found["layers"]
    assert many["ours"] == "flex cuda preact" and many["best_peer"] == "liger fused_moe"
    assert many["against_grouped_mm"] == 1.75 and many["against_liger"] == pytest.approx(1.2)
    assert many["against_best_peer"] == pytest.approx(1.2) and many["against_dense"] == pytest.approx(0.8)
    assert many["saved_bytes_a_token"] == 4200
    # 2 x 6 x 2048 x 8192 x 4 x 1408 operations at 8e14 a second, over 2 ms.
    assert many["of_roofline"] == pytest.approx(2 * 6 * 2048 * 8192 * 4 * 1408 / 8e14 / 2e-3)
    assert few["against_best_peer"] == 5.0
    # eager cannot be captured: the peer that can is the one compared with.
    assert few["both_graph_ms"] == 0.04 and few["against_best_peer_graph"] == 2.5
    assert many["both_graph_ms"] is None and many["against_best_peer_graph"] is None
    targets = {t["target"]: t for t in found["targets"]}
    met = {name.removeprefix("Qwen1.5-MoE-A2.7B, "): t["met"] for name, t in targets.items()}
    assert met["T=8192: times grouped_mm"] and met["T=8192: of equal-FLOP dense"]
    assert met["T=8192: times liger"] is False and met["T=128: times the best peer"] is True
    assert met["T=16: times the best peer"] is None
    assert targets["Qwen1.5-MoE-A2.7B, T=8192: TFLOP/s"]["value"] == 500
    assert met["Qwen1.5-MoE-A2.7B: bytes kept a token, recompute"] is True
    # One byte more than down's 2 x 60 x 2048 x 1408.
    assert met["T=128: peak memory in parts of a frozen weight"] is False
    assert targets["route + permute, T=8192 E=64 K=8: us"]["value"] == 24.0
    assert found["client"]["eager"]["ours_times_as_fast"] == 3.0
    assert found["client"]["eager"]["ours_peak_in_parts"] == 0.5


def test_tuned_tiles_have_a_line_of_their_own_and_decide_the_targets():
    tuned = [measured("flex cuda preact", 1.6, pinned_both_ms=2.0)]
    found = gpu_summary.summarise(SECTIONS | {"tuned": tuned})
    pinned, _, line = found["layers"]
    assert pinned["against_liger"] == pytest.approx(1.2)
    assert line["tuned"] and line["against_liger"] == pytest.approx(1.5)
    targets = {t["target"]: t["met"] for t in found["targets"]}
    assert targets["Qwen1.5-MoE-A2.7B, T=8192: times liger"] is True
    assert "Qwen1.5-MoE-A2.7B (tuned)" in gpu_summary.shown(found)


def test_the_summary_of_nothing_is_empty():
    found = gpu_summary.summarise({})
    assert found["layers"] == [] and {t["met"] for t in found["targets"]} == {None}
    assert gpu_summary.shown(found) == ""


def test_a_peer_that_does_not_run_is_no_failure_of_ours():
    bad = [{"name": "liger fused_moe", "failed": "boom"}, {"name": "flex cuda preact", "failed": "boom"}]
    assert [r["name"] for r in gpu_suite.failures({"measurements": bad})] == ["flex cuda preact"]
    graph = {"name": "flex triton recompute", "both_ms": 1.0, "both_graph_failed": "boom"}
    assert list(gpu_suite.failures({"measurements": [graph]})) == [graph]


def test_a_peer_that_hangs_or_crashes_is_no_failure_of_ours():
    layer = "compiled: ('Qwen1.5-MoE-A2.7B', 8192, '%s, compiled')"
    cases = [layer % "transformers eager", "client: ('eager',)", "client: ('grouped_mm',)"]
    ours = [layer % "flex cuda recompute", "client: ('flex-recompute',)", "checks: ('cuda', 'bfloat16', ...)"]
    records = [{"part": "any", "case": case, "failed": "over 30 s"} for case in (*cases, *ours)]
    found = gpu_suite.failures({"parts": [*records, {"part": "any", "failed": "given up"}]})
    assert [r.get("case") for r in found] == [*ours, None]


def test_the_results_can_be_printed_as_markdown():
    text = tables.gpu_tables(SECTIONS | {"machine": {"gpu": "Some GPU"}})
    assert text.startswith("Measured on Some GPU.")
    row = "| Qwen1.5-MoE-A2.7B | 8192 | 2.000 | 500 | 0.71 | 1.20 | 1.75 | 1.20 | 0.80 |  |  | 4200 | 6, 12 |"
    assert row in text
    assert "| route + permute, T=8192 E=64 K=8: us | 24.00 | at most 25 | met |" in text
    assert tables.gpu_tables({"measurements": [], "note": "no GPU here"}).startswith("No GPU: no GPU here.")
