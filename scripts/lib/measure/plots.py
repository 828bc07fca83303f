"""Draw plots of measurements as PNG files, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class RatePoint(NamedTuple):
    """The rate and the latencies of a measured load."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    label: str = ""


def plot_latency_against_throughput(
    path: Path,
    series: Mapping[str, Sequence[RatePoint]],
    title: str,
    chosen: RatePoint | None = None,
    budget_ms: float | None = None,
    limits_per_s: Mapping[str, float] | None = None,
    connected: bool = True,
) -> None:
    """Plot latency over requests/s: p50 and p99 of each series.

    chosen: gets a ring. budget_ms: the bound on p99. limits_per_s: vertical lines, by name.
    connected: lines between the points of a series, p50 too; else points of p99 alone.
    """
    figure, axes = new_figure((8, 5))
    for index, (name, points) in enumerate(series.items()):
        rates = [point.requests_per_s for point in points]
        colour = f"C{index % 10}"
        style = "o-" if connected else "o"
        axes.plot(rates, [point.p99_ms for point in points], style, color=colour, label=f"{name}, p99")
        if connected:
            axes.plot(rates, [point.p50_ms for point in points], "o:", color=colour, label=f"{name}, p50")
        for point in points:
            axes.annotate(
                point.label,
                (point.requests_per_s, point.p99_ms),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=7,
            )
    if chosen is not None:
        axes.plot(
            [chosen.requests_per_s],
            [chosen.p99_ms],
            "o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor="black",
            label=f"chosen: {chosen.label}",
        )
    if budget_ms is not None:
        axes.axhline(
            budget_ms, color="black", linestyle="--", linewidth=0.8, label=f"p99 of {budget_ms:g} ms"
        )
    highest = max((point.requests_per_s for points in series.values() for point in points), default=0.0)
    for index, (name, rate) in enumerate((limits_per_s or {}).items()):
        label = f"{name}, {rate:.0f}/s"
        if rate <= 2 * highest:
            axes.axvline(rate, color=f"{0.3 + 0.3 * index}", linestyle="-.", linewidth=1, label=label)
        else:  # drawn to scale, it would squeeze the measured points into a corner
            axes.plot([], [], " ", label=f"{label}, off the scale")
    axes.set(xlabel="requests/s", ylabel="latency in ms", yscale="log", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_shares(path: Path, bars: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Plot the parts (in ms) of a batch's time, one stacked bar of 100 % per batch.

    bars: label of a bar -> part -> milliseconds.
    """
    figure, axes = new_figure((8, 1.6 + 0.7 * len(bars)))
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    for index, part in enumerate(parts):
        for row, bar in enumerate(bars.values()):
            total = sum(bar.values())
            before = sum(bar.get(earlier, 0.0) for earlier in parts[:index]) / total * 100
            share = bar.get(part, 0.0) / total * 100
            axes.barh(row, share, left=before, color=f"C{index % 10}", label=part if row == 0 else None)
            if share > 6:
                axes.text(
                    before + share / 2, row, f"{bar[part]:.2f} ms", ha="center", va="center", fontsize=7
                )
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of a batch's time", title=title)
    axes.legend(fontsize=8, ncols=min(6, max(1, len(parts))), loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=120)


class BlockBar(NamedTuple):
    """Drift from float32 with this block alone in INT8, 0 up, and whether the block stays float32."""

    name: str
    drift: float
    kept: bool


def plot_sensitivity(path: Path, bars: Sequence[BlockBar], title: str) -> None:
    """Plot one bar per block, in the order given, coloured by its precision."""
    figure, axes = new_figure((8, 1.2 + 0.2 * len(bars)))
    for kept, colour, label in ((True, "C3", "stays float32"), (False, "C0", "INT8")):
        rows = [(row, bar.drift) for row, bar in enumerate(bars) if bar.kept is kept]
        if rows:
            axes.barh(*zip(*rows, strict=True), color=colour, label=label)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="drift from float32 with this block alone in INT8", title=title)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def plot_soak(
    path: Path,
    minutes: Sequence[Mapping[str, float] | None],
    memory_mb: Sequence[tuple[float, Mapping[str, float]]],
    title: str,
) -> None:
    """Plot p50 and p99 of each minute above the memory of each kind of process.

    minutes: percentiles in ms, None without answers. memory_mb: (seconds, 10^6 bytes by kind).
    """
    figure, latency = new_figure((8, 6), rows=2)
    memory = figure.add_subplot(2, 1, 2)
    for name in ("p50", "p99"):
        points = [(index + 0.5, minute[name]) for index, minute in enumerate(minutes) if minute]
        latency.plot(*zip(*points, strict=True) if points else ([], []), "o-", markersize=3, label=name)
    for kind in memory_mb[0][1] if memory_mb else ():
        memory.plot([at / 60 for at, _ in memory_mb], [sizes[kind] for _, sizes in memory_mb], label=kind)
    latency.set(ylabel="latency in ms", title=title, ylim=(0, None))
    memory.set(xlabel="minutes", ylabel="memory in MB", ylim=(0, None))
    for axes in (latency, memory):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def new_figure(size_inch: tuple[float, float], rows: int = 1) -> tuple[Any, Any]:
    """A figure to be saved as a file, and the first of its axes, which are below each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inch, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display needed
    return figure, figure.add_subplot(rows, 1, 1)
