"""What a run of the GPU suite says about the project's targets: ratios within the run, met or missed.

Letters: T tokens, H hidden, E experts, K chosen, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.gpu_layers import BATCHED, DENSE, EAGER, GROUPED, LIGER, SCATTERMOE
from benchmarks.roofline import LAYERS, Chip, floor_seconds

Record = dict[str, Any]
# (layer, tokens, skewed)
Size = tuple[str, int, bool]
PEERS = (GROUPED, LIGER, SCATTERMOE, EAGER, BATCHED, f"{GROUPED}, compiled", f"{EAGER}, compiled")
# Layers whose useful work is to reach LARGE_TFLOPS: the widest experts.
LARGE = ("Qwen1.5-MoE-A2.7B", "DeepSeek-MoE-16B", "Mixtral-8x7B")
LARGE_TFLOPS = 450.0
BY_NAME = {layer.name: layer for layer in LAYERS}


def summarise(sections: dict[str, Any]) -> dict[str, Any]:
    """What a run found, from what it recorded.

    "layers": a line for each layer, T and routing, and one more where tiles were tuned. "targets": what was
    to be reached, by the tuned tiles where there are some. "client": the whole step, beside each stock layer.
    """
    groups, tuned = by_size(sections.get("measurements", ())), by_size(sections.get("tuned", ()))
    chip = chip_of(sections)
    lines = [line_of(*size, found, chip) for size, found in groups.items()]
    for size, ours in tuned.items():
        peers = {n: r for n, r in groups.get(size, {}).items() if n not in ours_in(groups[size])}
        lines.append(line_of(*size, peers | ours, chip) | {"tuned": True})
    lines = [line for line in lines if "ours" in line]
    counts = {(r["layer"], r["tokens"], r["name"]): r for r in sections.get("launches", ())}
    for line in lines:
        counted = counts.get((line["layer"], line["tokens"], line["ours"]), {})
        line |= {what: counted.get(what) for what in ("forward_launches", "both_launches")}
    return {
        "layers": lines,
        "targets": [*layer_targets(lines, groups), *routing_targets(sections)],
        "client": client_ratios(sections.get("client", ())),
    }


def by_size(records: Iterable[Record]) -> dict[Size, dict[str, Record]]:
    """The records that have times, by (layer, tokens, skewed) and name."""
    groups: dict[Size, dict[str, Record]] = {}
    for record in records:
        if "both_ms" in record:
            size = (record["layer"], record["tokens"], record["skewed"])
            groups.setdefault(size, {})[record["name"]] = record
    return groups


def chip_of(sections: dict[str, Any]) -> Chip | None:
    """The rates that this run measured."""
    rates = sections.get("rates")
    if not rates:
        return None
    found = rates[-1] if isinstance(rates, list) else rates
    return Chip("measured", found["matmul_flops_per_s"], found["copy_bytes_per_s"])


def ours_in(found: dict[str, Record]) -> dict[str, Record]:
    """The contenders that compute what the peers do: plain routed experts, not under torch.compile."""
    return {n: r for n, r in found.items() if n.startswith("flex") and n.endswith(("preact", "recompute"))}


def line_of(
    layer: str, tokens: int, skewed: bool, found: dict[str, Record], chip: Chip | None
) -> dict[str, Any]:
    """The ratios of one size: how many times as fast as each peer our faster mode is, forward and backward;
    {} without one of ours."""
    ours = ours_in(found)
    if not ours:
        return {}
    name = min(ours, key=lambda n: ours[n]["both_ms"])
    best = ours[name]

    def ratio(peer: str, what: str = "both_ms") -> float | None:
        fastest = min((r[what] for r in ours.values() if r.get(what)), default=None)
        theirs = found.get(peer, {}).get(what)
        return theirs / fastest if theirs and fastest else None

    def least_ratio(what: str) -> float | None:
        return min((r for n in peers if (r := ratio(n, what)) is not None), default=None)

    peers = [n for n in PEERS if n in found]
    line: dict[str, Any] = {
        "layer": layer,
        "tokens": tokens,
        "skewed": skewed,
        "ours": name,
        "both_ms": best["both_ms"],
        "both_tflops": best["both_tflops"],
        "best_peer": min(peers, key=lambda n: found[n]["both_ms"], default=None),
        "against_best_peer": least_ratio("both_ms"),
        "against_best_peer_forward": least_ratio("forward_ms"),
        # Replayed CUDA graphs on either side: what is left when the host's time is taken away.
        "both_graph_ms": min(
            (r["both_graph_ms"] for r in ours.values() if r.get("both_graph_ms")), default=None
        ),
        "against_best_peer_graph": least_ratio("both_graph_ms"),
        "against_grouped_mm": ratio(GROUPED),
        "against_liger": ratio(LIGER),
        "against_dense": ratio(DENSE),
    }
    recompute = next((r for n, r in ours.items() if n.endswith("recompute")), None)
    if recompute and recompute.get("saved_bytes") is not None:
        line["saved_bytes_a_token"] = recompute["saved_bytes"] / tokens
    if recompute and recompute.get("peak_bytes") is not None:
        line["peak_bytes"] = recompute["peak_bytes"]
        if GROUPED in found and found[GROUPED].get("peak_bytes"):
            line["peak_against_grouped_mm"] = recompute["peak_bytes"] / found[GROUPED]["peak_bytes"]
    if chip is not None and layer in BY_NAME:
        routed = replace(BY_NAME[layer], Is=0)
        line["of_roofline"] = 1e3 * floor_seconds(routed, tokens, chip, True) / best["both_ms"]
    return line


def target(name: str, value: float | None, limit: float, at_least: bool = True) -> dict[str, Any]:
    """One target; ``met`` is None where nothing was measured."""
    met = None if value is None else (value >= limit if at_least else value <= limit)
    return {"target": name, "value": value, "limit": limit, "at_least": at_least, "met": met}


def layer_targets(
    lines: list[dict[str, Any]], groups: dict[Size, dict[str, Record]]
) -> Iterator[dict[str, Any]]:
    # Lines of tuned tiles come last.
    of_size = {(line["layer"], line["tokens"]): line for line in lines if not line["skewed"]}
    for layer in LAYERS:
        many, name = of_size.get((layer.name, 8192), {}), layer.name
        yield target(f"{name}, T=8192: times grouped_mm", many.get("against_grouped_mm"), 1.5)
        yield target(f"{name}, T=8192: times liger", many.get("against_liger"), 1.3)
        yield target(f"{name}, T=8192: of equal-FLOP dense", many.get("against_dense"), 0.75)
        if name in LARGE:
            yield target(f"{name}, T=8192: TFLOP/s", many.get("both_tflops"), LARGE_TFLOPS)
        for tokens in (128, 16):
            few = of_size.get((name, tokens), {})
            yield target(f"{name}, T={tokens}: times the best peer", few.get("against_best_peer"), 3.0)
        if layer.H == 2048:
            saved = many.get("saved_bytes_a_token")
            yield target(f"{name}: bytes kept a token, recompute", saved, 4.2 * 1024, at_least=False)
        ours = ours_in(groups.get((name, 128, False), {}))
        peaks = [r["peak_bytes"] for r in ours.values() if r.get("peak_bytes") is not None]
        # Few rows beside 2 E I H bytes of down alone: a buffer as large as a frozen weight would show.
        weight = 2.0 * layer.E * layer.I * layer.H
        peak = max(peaks) / weight if peaks else None
        yield target(f"{name}, T=128: peak memory in parts of a frozen weight", peak, 1.0, at_least=False)


def routing_targets(sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    times = [
        r.get("both_graph_ms") or r["both_ms"] for r in sections.get("routing", ()) if r["tokens"] == 8192
    ]
    best = 1e3 * min(times) if times else None
    yield target("route + permute, T=8192 E=64 K=8: us", best, 25.0, at_least=False)


def client_ratios(records: Any) -> dict[str, Any]:
    """A client's step: tokens a second and peak memory of every layer, and ours (recompute) against each
    other."""
    by_layer = {r["layer"]: r for r in records if "tokens_per_second" in r}
    found: dict[str, Any] = {
        name: {k: r[k] for k in ("tokens_per_second", "peak_bytes", "loaded_bytes")}
        for name, r in by_layer.items()
    }
    ours = by_layer.get("flex-recompute")
    for name, r in by_layer.items():
        if ours is not None and r is not ours:
            found[name]["ours_times_as_fast"] = ours["tokens_per_second"] / r["tokens_per_second"]
            found[name]["ours_peak_in_parts"] = ours["peak_bytes"] / r["peak_bytes"]
    return found


def number(value: Any, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def layer_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the layers' table."""
    header = [
        "layer",
        "T",
        "ms",
        "TFLOP/s",
        "of roofline",
        "x best peer",
        "x grouped_mm",
        "x liger",
        "x dense",
        "graph, ms",
        "x best graph",
    ]
    header += ["B kept/token", "launches f, f+b"]
    rows = []
    for line in sorted(summary["layers"], key=lambda one: (one["layer"], one["tokens"], one["skewed"])):
        counts = [line.get("forward_launches"), line.get("both_launches")]
        rows.append(
            [
                line["layer"] + " (skewed)" * line["skewed"] + " (tuned)" * line.get("tuned", False),
                str(line["tokens"]),
                number(line["both_ms"], ".3f"),
                number(line["both_tflops"], ".0f"),
                number(line.get("of_roofline")),
                *(number(line[f"against_{n}"]) for n in ("best_peer", "grouped_mm", "liger", "dense")),
                number(line["both_graph_ms"], ".3f"),
                number(line["against_best_peer_graph"]),
                number(line.get("saved_bytes_a_token"), ".0f"),
                ", ".join(str(n) for n in counts if n is not None),
            ]
        )
    return header, rows


def target_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    words = {True: "met", False: "MISSED", None: "not measured"}
    rows = []
    for t in summary["targets"]:
        wanted = f"at {'least' if t['at_least'] else 'most'} {t['limit']:g}"
        rows.append([t["target"], number(t["value"]), wanted, words[t["met"]]])
    return ["target", "found", "wanted", ""], rows


def client_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, r in summary["client"].items():
        ratios = (number(r.get(what)) for what in ("ours_times_as_fast", "ours_peak_in_parts"))
        rows.append([name, number(r["tokens_per_second"], ",.0f"), number(r["peak_bytes"] / 2**30), *ratios])
    return [
        "client's step",
        "tokens/s",
        "peak, GiB",
        "recompute: times as fast",
        "recompute: parts of its peak",
    ], rows


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded with blanks, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in (header, *rows)
    )


def shown(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal; without the targets where none was measured."""
    parts = [layer_rows(summary), client_rows(summary)]
    if any(t["met"] is not None for t in summary["targets"]):
        parts.append(target_rows(summary))
    return "\n\n".join(plain_table(*part) for part in parts if part[1])
