"""The plot of ``flex-moe bench``: speed and memory of the layer against the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flex.report.data import median
from flex.report.plots import STYLE, add_legend, finish, pyplot

LOOKS = {
    # implementation -> (colour, line style, marker)
    "flex recompute": ("#009E73", "-", "o"),
    "flex preact": ("#009E73", "--", "s"),
    "flex int8": ("#56B4E9", "-.", "P"),
    "flex nf4": ("#CC79A7", "-.", "X"),
    "transformers eager": ("#E69F00", "-", "^"),
    "transformers grouped_mm": ("#D55E00", "-", "v"),
    "dense gemm": ("#777777", ":", ""),
}
OTHER = ("#0072B2", "-", "d")
MODES = {
    "forward": "forward",
    "backward": "forward + backward",
    "personal": "with personal expert",
}


def plot_bench(result: Mapping[str, Any], path: Path) -> Path:
    """One row of panels a shape and dtype: tokens per second in each mode, then peak extra memory.

    Args:
        result: as benchmarks/layer.py writes it: ``cases`` with ``samples_seconds``, ``memory`` in bytes.

    Raises:
        ValueError: there is no case in it.
    """
    cases = list(result["cases"].values())
    if not cases:
        raise ValueError("the benchmark's result holds no case to draw")
    rows = list(dict.fromkeys((case["shape"], case["dtype"]) for case in cases))
    modes = [mode for mode in MODES if any(case["mode"] == mode for case in cases)]
    columns = len(modes) + bool(result.get("memory"))
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(rows), columns, figsize=(0.6 + 3.4 * columns, 0.6 + 2.5 * len(rows)), squeeze=False
        )
        for (shape, dtype), line in zip(rows, axes):
            for mode, axis in zip(modes, line):
                lines: dict[str, list[tuple[int, float]]] = {}
                for case in cases:
                    if (case["shape"], case["dtype"], case["mode"]) == (shape, dtype, mode):
                        for name, samples in case["samples_seconds"].items():
                            lines.setdefault(name, []).append(
                                (case["tokens"], case["tokens"] / median(samples))
                            )
                draw(axis, lines, f"{shape} {dtype}, {MODES[mode]}", "tokens/s")
            if len(line) > len(modes):
                prefix = f"{shape} {dtype} "
                memory = {
                    name.removeprefix(prefix): [(int(t), size / 2**20) for t, size in sizes.items()]
                    for name, sizes in result["memory"].items()
                    if name.startswith(prefix)
                }
                draw(line[-1], memory, f"{shape} {dtype}, extra memory", "MiB")
        add_legend(figure, axes.flat)
        return finish(plt, figure, path)


def draw(axis: Any, lines: Mapping[str, list[tuple[int, float]]], title: str, unit: str) -> None:
    for name, points in lines.items():
        colour, style, marker = LOOKS.get(name, OTHER)
        at, values = zip(*sorted(points))
        axis.plot(at, values, color=colour, linestyle=style, marker=marker, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    # On a short logarithmic axis powers of ten alone would leave it with one number.
    axis.yaxis.set_major_locator(pyplot().LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("tokens")
    axis.set_ylabel(unit)
    ticks = sorted({at for points in lines.values() for at, _ in points})
    if ticks:
        axis.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
        axis.minorticks_off()
