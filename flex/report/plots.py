"""The report's plots: matplotlib figures from plain numbers, drawn off screen."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex.files import atomic_write
from flex.report.data import RunData, Speed, median

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
STRATEGY_COLOURS = {"flex": "#009E73", "fedavg": "#0072B2", "local": "#E69F00"}
OTHER_COLOURS = ("#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C6BB1", "#8C8C8C")
MARKERS = "osD^vPX*"
MOST_PANELS = 12
INK, GRID = "#222222", "#E4E4E4"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.dpi": 144,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
}


def pyplot() -> Any:
    """matplotlib.pyplot on the Agg canvas, whatever display there is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def colours(runs: Sequence[RunData]) -> list[str]:
    """One colour a run: its strategy's, for the first run of each strategy."""
    spare = iter(OTHER_COLOURS * (1 + len(runs) // len(OTHER_COLOURS)))
    taken: set[str] = set()
    found = []
    for run in runs:
        colour = STRATEGY_COLOURS.get(run.strategy, "")
        if not colour or colour in taken:
            colour = next(spare)
        taken.add(colour)
        found.append(colour)
    return found


def plot_loss(runs: Sequence[RunData], path: Path) -> Path | None:
    """Held-out loss against the round: one panel a client, one line a run, the pretrained model dotted."""
    clients = list(dict.fromkeys(c for run in runs for c in run.loss))
    if not clients:
        return None
    panels: list[str | None] = list(clients[:MOST_PANELS])
    if len(clients) > 1:
        panels.append(None)
    plt = pyplot()
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(1.0 + 3.1 * columns, 0.7 + 2.5 * rows), squeeze=False, sharex=True
        )
        for axis, panel in zip(axes.flat, panels):
            start = None
            for i, (run, colour) in enumerate(zip(runs, colours(runs))):
                series = run.loss.get(panel, {}) if panel is not None else run.mean_loss()
                if not series:
                    continue
                at = sorted(series)
                marker = MARKERS[i % len(MARKERS)] if len(at) <= 30 else ""
                axis.plot(at, [series[r] for r in at], color=colour, marker=marker, label=run.label)
                start = series.get(0, start)
            if start is not None:
                axis.axhline(start, color="#777777", linestyle=":", linewidth=1.3, label="before training")
            axis.set_title(panel if panel is not None else f"mean of {len(clients)} clients")
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=6))
            axis.grid(axis="x", visible=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for column in range(columns):
            shown = [axes[r][column] for r in range(rows) if axes[r][column].get_visible()]
            shown[-1].set_xlabel("round")
            shown[-1].tick_params(labelbottom=True)
        for row in axes:
            row[0].set_ylabel("held-out loss (nats/token)")
        add_legend(figure, axes.flat)
        return finish(plt, figure, path)


def plot_gates(runs: Sequence[RunData], path: Path) -> Path | None:
    """Mean gate opening, layer by layer and client by client: one heat map a run that has gates."""
    gated = [run for run in runs if run.gates]
    if not gated:
        return None
    plt = pyplot()
    most = max(len(run.gates) for run in gated)
    layers = max(len(next(iter(run.gates.values()))) for run in gated)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            len(gated),
            1,
            figsize=(
                min(12.0, max(6.5, 2.6 + 0.27 * layers)),
                0.9 + len(gated) * (0.75 + 0.32 * min(most, 40)),
            ),
            squeeze=False,
        )
        values = [g for run in gated for by_layer in run.gates.values() for g in by_layer.values()]
        low, high = min(values), max(values)
        # A narrow range would show noise as structure: never stretch fewer than 0.1.
        middle, half = (low + high) / 2, max((high - low) / 2, 0.05)
        image = None
        for axis, run in zip(axes[:, 0], gated):
            names = list(run.gates)
            table = [list(run.gates[name].values()) for name in names]
            image = axis.imshow(
                table,
                aspect="auto",
                cmap="viridis",
                vmin=max(0.0, middle - half),
                vmax=min(1.0, middle + half),
                interpolation="nearest",
            )
            axis.set_yticks(range(len(names)), names if len(names) <= 40 else [""] * len(names))
            if len(names) > 40:
                axis.set_ylabel(f"{len(names)} clients")
            step = max(1, math.ceil(len(table[0]) / 16))
            axis.set_xticks(range(0, len(table[0]), step))
            axis.set_title(run.label)
            axis.tick_params(length=0)
            for side in ("left", "bottom"):
                axis.spines[side].set_visible(False)
        axes[-1, 0].set_xlabel("MoE layer, from the input")
        figure.colorbar(image, ax=list(axes[:, 0]), label="mean gate opening g", pad=0.02, fraction=0.05)
        return finish(plt, figure, path)


def plot_bytes(runs: Sequence[RunData], path: Path) -> Path | None:
    """Bytes sent in each round, all clients together: upward to the server, downward to the clients."""
    if not any(run.traffic for run in runs):
        return None
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 3.4))
        width = 0.8 / len(runs)
        biggest = max((max(pair) for run in runs for pair in run.traffic.values()), default=0)
        factor, unit = next((f, u) for f, u in SIZES if biggest >= f or f == 1)
        for i, (run, colour) in enumerate(zip(runs, colours(runs))):
            rounds = sorted(run.traffic)
            at = [r + (i - (len(runs) - 1) / 2) * width for r in rounds]
            up = [run.traffic[r][0] / factor for r in rounds]
            down = [-run.traffic[r][1] / factor for r in rounds]
            silent = not any(up) and not any(down)
            label = f"{run.label} (sends nothing)" if silent else run.label
            axis.bar(at, up, width * 0.92, color=colour, label=label)
            axis.bar(at, down, width * 0.92, color=colour, alpha=0.55)
            if silent:
                axis.plot(at, [0] * len(at), linestyle="", marker="_", color=colour, markersize=9)
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_xlabel("round")
        axis.set_ylabel(f"{unit} a round\n(to clients | to server)")
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=12))
        axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axis.grid(axis="x", visible=False)
        add_legend(figure, [axis])
        return finish(plt, figure, path)


SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def plot_memory(runs: Sequence[RunData], path: Path) -> Path | None:
    """Peak memory of each run, as bars."""
    measured = [(run, c) for run, c in zip(runs, colours(runs)) if run.peak_memory]
    if not measured:
        return None
    entries = [(run.label, [run.peak_memory / 2**30], colour) for run, colour in measured]
    return bars(entries, "peak memory (GiB)", "{:.2f}", path)


def plot_speed(speeds: Sequence[Speed], path: Path) -> Path | None:
    """Speed and memory of one federation step with each layer: medians as bars, every process as a tick."""
    if not speeds:
        return None
    palette = [STRATEGY_COLOURS["flex"] if "flex_kernels" in s.name else "#9A9A9A" for s in speeds]
    plt = pyplot()
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 0.9 + 0.55 * len(speeds)), sharey=True)
        draw_bars(
            axes[0],
            [(s.name, s.tokens_per_second, c) for s, c in zip(speeds, palette)],
            "training speed (tokens/s, more is better)",
            "{:,.0f}",
        )
        draw_bars(
            axes[1],
            [(s.name, [m / 2**20 for m in s.extra_memory], c) for s, c in zip(speeds, palette)],
            "memory above the loaded model (MiB, less is better)",
            "{:,.0f}",
        )
        return finish(plt, figure, path)


def bars(entries: Sequence[tuple[str, list[float], str]], label: str, form: str, path: Path) -> Path:
    plt = pyplot()
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.45 * len(entries)))
        draw_bars(axis, entries, label, form)
        return finish(plt, figure, path)


def draw_bars(axis: Any, entries: Sequence[tuple[str, list[float], str]], label: str, form: str) -> None:
    """Horizontal bars of medians, first entry on top, each with its number; several samples also as ticks."""
    at = range(len(entries))
    middles = [median(samples) for _, samples, _ in entries]
    axis.barh(at, middles, height=0.62, color=[colour for *_, colour in entries])
    top = max(max(samples) for _, samples, _ in entries) or 1.0
    for y, (_, samples, _), middle in zip(at, entries, middles):
        if len(samples) > 1:
            axis.plot(samples, [y] * len(samples), linestyle="", marker="|", color=INK, markersize=7)
        axis.text(max([middle, *samples]) + 0.02 * top, y, form.format(middle), va="center")
    axis.set_yticks(list(at), [name for name, *_ in entries])
    axis.set_xlim(0, 1.18 * top)
    axis.set_xlabel(label)
    axis.tick_params(axis="y", length=0)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()


def add_legend(figure: Any, axes: Any) -> None:
    """One legend above the figure, each label once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=min(len(handles), 5))


def finish(plt: Any, figure: Any, path: Path) -> Path:
    """Writes the figure to ``path``, whole or not at all, and closes it. Raises OSError naming ``path``."""
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.removeprefix(".") or None)
    finally:
        plt.close(figure)
    with atomic_write(path) as temporary:
        temporary.write_bytes(drawn.getbuffer())
    return path
