"""The four curves of a workload against the batch size: throughput, latency, memory, drift."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from reelbatch.tune.choose import ISOLATIONS
from reelbatch.tune.figures import Point
from reelbatch.tune.results import SweepResult

COLORS = {"exact": "#1d4ed8", "packed": "#c2410c"}
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))
"""Lines of the first, second, … dtype."""
SIZE = (5.6, 3.5)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "svg.fonttype": "path",
    "svg.hashsalt": "reelbatch",
}
PAGE_COLORS = {
    "#ffffff": "card",
    "#000000": "ink",
    "#e5e7eb": "line",
    "#6b7280": "soft",
    "#b91c1c": "bad-edge",
    COLORS["exact"]: "exact",
    COLORS["packed"]: "packed",
}
"""The page's names of colors, which are others where a person prefers a dark page."""
CHARTS = ("throughput", "latency", "memory", "drift")


def draw(
    sweeps: Sequence[SweepResult], max_latency: float | None = None, max_memory: int | None = None
) -> dict[str, Figure]:
    """The charts of one workload, a line for each isolation and dtype. Limits in seconds and bytes are drawn in."""
    with rc_context(STYLE):
        return {
            "throughput": _throughput(sweeps),
            "latency": _latency(sweeps, max_latency),
            "memory": _memory(sweeps, max_memory),
            "drift": _drift(sweeps),
        }


def svg(figure: Figure) -> str:
    """The drawing alone, to stand in a page: no XML head, no names of places elsewhere, in the page's colors."""
    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", out.getvalue(), flags=re.S)
    return re.sub("|".join(PAGE_COLORS), lambda color: f"var(--{PAGE_COLORS[color[0]]})", drawing)


# -- the four --------------------------------------------------------------------------------------


def _throughput(sweeps: Sequence[SweepResult]) -> Figure:
    figure, axes = _axes("Throughput", "videos an hour", sweeps)
    for points, look in _lines(sweeps):
        batches = [p.batch for p in points]
        axes.plot(batches, [p.videos_per_hour for p in points], **look)
        low, high = [3600 / p.spread.high for p in points], [3600 / p.spread.low for p in points]
        axes.fill_between(batches, low, high, color=look["color"], alpha=0.12, linewidth=0)
    _finish(axes, sweeps, lambda point: point.videos_per_hour)
    return figure


def _latency(sweeps: Sequence[SweepResult], limit: float | None) -> Figure:
    figure, axes = _axes("Latency: to the last video of a batch", "seconds", sweeps)
    for points, look in _lines(sweeps):
        batches = [p.batch for p in points]
        axes.plot(batches, [p.last_video_seconds for p in points], **look)
        if len(sweeps) == 1:
            first = {**look, "marker": "", "linewidth": 1, "alpha": 0.5, "label": f"{look['label']}, the first"}
            axes.plot(batches, [p.first_video_seconds for p in points], **first)
    _limit(axes, limit, "--max-latency")
    _finish(axes, sweeps, lambda point: point.last_video_seconds)
    return figure


def _memory(sweeps: Sequence[SweepResult], limit: int | None) -> Figure:
    figure, axes = _axes("Memory at the peak", "GiB", sweeps)
    for points, look in _lines(sweeps):
        axes.plot([p.batch for p in points], [p.memory.peak / 2**30 for p in points], **look)
    for index, sweep in enumerate(sweeps):
        if sweep.points:
            split = sweep.points[0].memory
            held = (split.weights + split.process) / 2**30
            label = "held before a run" if index == 0 else None
            axes.axhline(held, color="#6b7280", linewidth=1, linestyle=":", label=label)
    _limit(axes, None if limit is None else limit / 2**30, "--max-memory")
    _finish(axes, sweeps, lambda point: point.memory.peak / 2**30)
    top = axes.get_ylim()[1]
    room = sweeps[0].memory_limit / 2**30
    if room < 2 * top:
        axes.axhline(room, color="#b91c1c", linewidth=1.2, linestyle="--")
        axes.annotate("all there is", (0.01, room), xycoords=("axes fraction", "data"), color="#b91c1c", va="bottom")
        axes.set_ylim(0, max(top, room * 1.12))
    return figure


def _drift(sweeps: Sequence[SweepResult]) -> Figure:
    compared = [(p, p.quality) for sweep in sweeps for p in sweep.points if p.quality]
    figure, axes = _axes("Drift from the same video alone", "largest pixel difference, of 255", sweeps)
    for points, look in _lines(sweeps, only=lambda point: point.quality is not None):
        axes.plot([p.batch for p in points], [p.quality.largest if p.quality else 0 for p in points], **look)
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)
    axes.yaxis.set_major_locator(FixedLocator([0, 1, 2, 5, 10, 25, 50, 100, 255]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    _finish(axes, sweeps, lambda point: float(point.quality.largest) if point.quality else None)
    axes.set_ylim(-0.25, max(2.5, 2.2 * max((quality.largest for _, quality in compared), default=0)))
    if not compared:
        axes.text(0.5, 0.6, "not compared: no time in the budget", transform=axes.transAxes, ha="center")
    elif any(not quality.against.startswith(p.dtype) for p, quality in compared):
        axes.set_title(f"Drift from the same video of {compared[0][1].against}")
    return figure


# -- parts of a chart ------------------------------------------------------------------------------


def _lines(
    sweeps: Sequence[SweepResult], only: Callable[[Point], bool] = lambda _: True
) -> Iterator[tuple[list[Point], dict[str, Any]]]:
    """The points of each isolation and dtype, and how they are drawn. A batch of one belongs to both isolations."""
    for index, sweep in enumerate(sweeps):
        for isolation in reversed(ISOLATIONS):  # exact on top
            points = [p for p in sweep.points if (p.isolation == isolation or p.batch == 1) and only(p)]
            points.sort(key=lambda point: point.batch)
            label = isolation if len(sweeps) == 1 else f"{isolation}, {sweep.dtype}"
            if points and (isolation == "exact" or len(points) > 1):
                look = {"color": COLORS[isolation], "marker": "o", "markersize": 4.5, "linewidth": 1.8, "label": label}
                yield points, {**look, "linestyle": STYLES[index % len(STYLES)]}


def _axes(title: str, unit: str, sweeps: Sequence[SweepResult]) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("batch size")
    axes.set_xscale("log", base=2)
    batches = sorted({point.batch for sweep in sweeps for point in sweep.points})
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    return figure, axes


def _limit(axes: Any, value: float | None, name: str) -> None:
    if value is not None:
        axes.axhline(value, color="#b91c1c", linewidth=1.2, linestyle="--", label=name)


def _finish(axes: Any, sweeps: Sequence[SweepResult], height: Callable[[Point], float | None]) -> None:
    """Marks the chosen points and places the legend where no line is."""
    axes.set_ylim(0, axes.get_ylim()[1] * 1.18)
    batches = [point.batch for sweep in sweeps for point in sweep.points] or [1]
    axes.set_xlim(min(batches) / 1.12, max(batches) * 1.12)
    for sweep in sweeps:
        chosen = sweep.chosen
        value = height(chosen) if chosen else None
        if chosen is not None and value is not None:
            circle = {"markersize": 13, "fillstyle": "none", "color": "black", "markeredgewidth": 1.8, "zorder": 5}
            axes.plot([chosen.batch], [value], "o", **circle)
            label = f"use {chosen.batch}" if len(sweeps) == 1 else f"{sweep.dtype}: {chosen.batch}"
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            above = {"xytext": (0, 11), "textcoords": "offset points", "ha": "center", "va": "bottom", "zorder": 6}
            axes.annotate(label, (chosen.batch, value), weight="bold", bbox=box, **above)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize=8.5, loc="best")
