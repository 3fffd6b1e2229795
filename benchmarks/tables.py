"""Prints the committed results as Markdown tables: what docs/results.md shows.

python -m benchmarks.tables benchmarks/results/layer_cpu.json
python -m benchmarks.tables benchmarks/results/federation.json
python -m benchmarks.tables benchmarks/results/quantized_quality.json
python -m benchmarks.tables benchmarks/results/full_size.json
python -m benchmarks.tables gpu_suite.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STOCK = ("transformers eager", "transformers grouped_mm")
MODES = {
    "forward": "forward",
    "backward": "forward + backward",
    "personal": "forward + backward, personal expert",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def layer_tables(result: dict[str, Any]) -> str:
    """One table a shape, dtype and mode: milliseconds, and the ratio to the faster of transformers' two."""
    parts = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in result["cases"].values():
        groups.setdefault((case["shape"], case["dtype"], case["mode"]), []).append(case)
    for (shape, dtype, mode), cases in groups.items():
        names = list(max((c["median_seconds"] for c in cases), key=len))
        flex = [n for n in names if n.startswith("flex")]
        header = ["T", *(f"{n}, ms" for n in names), *(f"{n}: times as fast" for n in flex)]
        rows = []
        for case in sorted(cases, key=lambda c: c["tokens"]):
            medians = case["median_seconds"]
            best = min(medians[n] for n in STOCK)
            rows.append(
                [
                    f"{case['tokens']:,}",
                    *(f"{1e3 * medians[n]:.1f}" if n in medians else "" for n in names),
                    *(f"{best / medians[n]:.2f}" if n in medians else "" for n in flex),
                ]
            )
        parts.append(f"**{shape}, {dtype}, {MODES[mode]}**\n\n{table(header, rows)}")
    if "rates" in result:
        parts.insert(0, rates_line(result["rates"]))
    return "\n\n".join([*parts, memory_table(result["memory"])])


def memory_table(memory: dict[str, dict[str, int]]) -> str:
    """Peak extra MiB of a forward and backward step."""
    rows, tokens = [], sorted({t for held in memory.values() for t in held}, key=int)
    for key, held in memory.items():
        shape, dtype, name = key.split(" ", 2)
        stock = memory.get(f"{shape} {dtype} transformers grouped_mm", {})
        cells = []
        for t in tokens:
            cell = "" if t not in held else f"{held[t] / 2**20:,.1f}"
            if t in held and t in stock and name.startswith("flex"):
                cell += f" ({held[t] / stock[t]:.2f})"
            cells.append(cell)
        rows.append([f"{shape} {dtype} {name}", *cells])
    header = ["", *(f"T={int(t):,}" for t in tokens)]
    title = "Peak extra memory of forward + backward, MiB (in brackets: parts of grouped_mm's)"
    return f"**{title}**\n\n{table(header, rows)}"


def rates_line(rates: dict[str, float]) -> str:
    """What the machine read and multiplied, beside which times are to be read."""
    products = ", ".join(f"{v / 1e9:.0f} GFLOP/s in {n.split()[0]}" for n, v in rates.items() if "flop" in n)
    return f"Measured in the same run: {rates['read bytes/s'] / 1e9:.1f} GB/s read, {products}."


def federation_table(result: dict[str, Any]) -> str:
    """Seconds and memory a round by number of clients."""
    header = ["clients", "s a round", "resident before, MiB", "peak, MiB", "personal states on disk, MiB"]
    mib = 2**20
    rows = [
        [
            f"{r['clients']:,}",
            f"{r['seconds_round']:.1f}",
            f"{r['rss_before_bytes'] / mib:.0f}",
            f"{r['rss_peak_bytes'] / mib:.0f}",
            f"{r['all_personal_states_bytes'] / mib:.1f}",
        ]
        for r in result["results"]
    ]
    return table(header, rows)


def quality_tables(result: dict[str, Any]) -> str:
    """Quantised experts: error a layer, perplexity (in brackets its ratio to bfloat16), and a federation."""
    errors = result["layer_error"]
    kinds = list(next(iter(errors.values())))
    rows = []
    for text, of_kind in errors.items():
        cells = []
        for kind in kinds:
            values = list(of_kind[kind].values())
            mean = sum(values) / len(values)
            cells.append(f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})")
        rows.append([text, *cells])
    layers = table(["", *kinds], rows)
    models, texts = result["models"], list(result["held_out_tokens"])
    base = models["bfloat16"]["perplexity"]
    rows = [
        [
            name,
            f"{m['expert_bytes'] / 2**20:,.0f}",
            *(f"{m['perplexity'][text]:.2f} ({m['perplexity'][text] / base[text]:.3f})" for text in texts),
        ]
        for name, m in models.items()
    ]
    perplexity = table(["experts", "MiB", *texts], rows)
    rows = [
        [name, *(f"{m['divergence'][text]:.4f}" for text in texts)]
        for name, m in models.items()
        if name != "bfloat16"
    ]
    divergence = table(["experts", *texts], rows)
    rows = [
        [name, *(f"{sum(f[when].values()) / len(f[when]):.3f}" for when in ("before", "after"))]
        for name, f in result.get("federation", {}).items()
    ]
    federation = table(["experts", "held-out loss before", "after"], rows)
    return (
        f"**Relative error of a layer's routed sum: mean over layers (least to largest)**\n\n{layers}\n\n"
        f"**Perplexity (ratio to bfloat16), and memory of the routed experts**\n\n{perplexity}\n\n"
        f"**Divergence of a token's distribution from the bfloat16 model's, nats**\n\n{divergence}\n\n"
        f"**FLEx, mean over clients of the loss of an answer token, nats**\n\n{federation}"
    )


def full_size_table(result: dict[str, Any]) -> str:
    """The proof of size: memory by part, peak and speed."""
    rows = [[part, f"{held / 2**30:.2f}"] for part, held in result["memory_by_part_bytes"].items()]
    rows.append(["peak of the process", f"{result['peak_bytes'] / 2**30:.2f}"])
    products = result["with_int8_products"]
    with_int8 = f", with int8 products {products['tokens_per_second']:.1f}" if products else ""
    return (
        f"{table(['', 'GiB'], rows)}\n\n{result['weights']:,} weights, {result['trained']:,} trained; "
        f"{result['tokens_per_second']:.1f} tokens/s{with_int8}"
    )


def gpu_tables(result: dict[str, Any]) -> str:
    """A run of the GPU suite: the layer at every size, a client's step, the targets."""
    from benchmarks.gpu_summary import client_rows, layer_rows, summarise, target_rows

    summary = summarise(result)
    parts = [rows(summary) for rows in (layer_rows, client_rows, target_rows)]
    tables = [table(header, rows) for header, rows in parts if rows]
    gpu = (result.get("machine") or {}).get("gpu")
    said = (
        f"Measured on {gpu}." if gpu else f"No GPU: {result.get('note', 'nothing here was measured on one')}."
    )
    return "\n\n".join([said, *tables])


def main() -> None:
    parser = argparse.ArgumentParser(description="Print results as Markdown tables.")
    parser.add_argument("file", type=Path)
    result = json.loads(parser.parse_args().file.read_text())
    for key, tables in (
        ("cases", layer_tables),
        ("layer_error", quality_tables),
        ("memory_by_part_bytes", full_size_table),
        ("results", federation_table),
        ("measurements", gpu_tables),
    ):
        if key in result:
            print(tables(result))
            break


if __name__ == "__main__":
    main()
