"""The four curves of a workload against the batch size: throughput, latency, memory, drift."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from reelbatch.tune.figures import Point
from reelbatch.tune.results import ISOLATIONS, SweepResult

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
CHARTS = ("throughput", "latency", "memory", "drift")


def draw(
    sweeps: Sequence[SweepResult], max_latency: float | None = None, max_memory: int | None = None
) -> dict[str, Figure]:
    """The charts of one workload, a line for each isolation and dtype. Limits in seconds and bytes are drawn in."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return {
            "throughput": _throughput(sweeps),
            "latency": _latency(sweeps, max_latency),
            "memory": _memory(sweeps, max_memory),
            "drift": _drift(sweeps),
        }


def svg(figure: Figure) -> str:
    """The drawing alone, to stand in a page: no XML head, no names of places elsewhere."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    body = text[text.index("<svg") :]
    begin, end = body.find("<metadata>"), body.find("</metadata>")
    return body if begin < 0 else body[:begin] + body[end + len("</metadata>") :]


# -- the four --------------------------------------------------------------------------------------


def _throughput(sweeps: Sequence[SweepResult]) -> Figure:
    figure, axes = _axes("Throughput", "videos an hour", sweeps)
    for line in _lines(sweeps):
        axes.plot(line.batches, [p.videos_per_hour for p in line.points], **line.look)
        axes.fill_between(
            line.batches,
            [3600 / p.spread.high for p in line.points],
            [3600 / p.spread.low for p in line.points],
            color=line.look["color"],
            alpha=0.12,
            linewidth=0,
        )
    _finish(axes, sweeps, lambda point: point.videos_per_hour)
    return figure


def _latency(sweeps: Sequence[SweepResult], limit: float | None) -> Figure:
    figure, axes = _axes("Latency: to the last video of a batch", "seconds", sweeps)
    for line in _lines(sweeps):
        axes.plot(line.batches, [p.last_video_seconds for p in line.points], **line.look)
        if len(sweeps) > 1:
            continue
        first = {**line.look, "marker": "", "linewidth": 1, "alpha": 0.5, "label": f"{line.look['label']}, the first"}
        axes.plot(line.batches, [p.first_video_seconds for p in line.points], **first)
    _limit(axes, limit, "--max-latency")
    _finish(axes, sweeps, lambda point: point.last_video_seconds)
    return figure


def _memory(sweeps: Sequence[SweepResult], limit: int | None) -> Figure:
    figure, axes = _axes("Memory at the peak", "GiB", sweeps)
    for line in _lines(sweeps):
        axes.plot(line.batches, [p.memory.peak / 2**30 for p in line.points], **line.look)
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
    against = next((p.quality.against for s in sweeps for p in s.points if p.quality), "alone")
    figure, axes = _axes("Drift from the same video alone", "largest pixel difference, of 255", sweeps)
    compared = [p for sweep in sweeps for p in sweep.points if p.quality]
    for line in _lines(sweeps, only=lambda point: point.quality is not None):
        axes.plot(line.batches, [p.quality.largest if p.quality else 0 for p in line.points], **line.look)
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)
    axes.yaxis.set_major_locator(FixedLocator([0, 1, 2, 5, 10, 25, 50, 100, 255]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    _finish(axes, sweeps, lambda point: float(point.quality.largest) if point.quality else None)
    largest = max((p.quality.largest for p in compared if p.quality), default=0)
    axes.set_ylim(-0.25, max(2.5, 2.2 * largest))
    if not compared:
        axes.text(0.5, 0.6, "not compared: no time in the budget", transform=axes.transAxes, ha="center")
    elif any(p.quality and not p.quality.against.startswith(p.dtype) for p in compared):
        axes.set_title(f"Drift from the same video of {against}")
    return figure


# -- parts of a chart ------------------------------------------------------------------------------


class _Line:
    """The points of one isolation and dtype, and how they are drawn. A batch of one belongs to both isolations."""

    def __init__(self, points: Sequence[Point], look: dict[str, Any]) -> None:
        self.points, self.look = points, look
        self.batches = [point.batch for point in points]


def _lines(sweeps: Sequence[SweepResult], only: Callable[[Point], bool] = lambda _: True) -> Iterator[_Line]:
    for index, sweep in enumerate(sweeps):
        for isolation in reversed(ISOLATIONS):  # exact on top
            points = [p for p in sweep.points if (p.isolation == isolation or p.batch == 1) and only(p)]
            points.sort(key=lambda point: point.batch)
            label = isolation if len(sweeps) == 1 else f"{isolation}, {sweep.dtype}"
            if points and (isolation == "exact" or len(points) > 1):
                look = {"color": COLORS[isolation], "marker": "o", "markersize": 4.5, "linewidth": 1.8, "label": label}
                yield _Line(points, {**look, "linestyle": STYLES[index % len(STYLES)]})


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
            axes.plot(
                [chosen.batch],
                [value],
                "o",
                markersize=13,
                fillstyle="none",
                color="black",
                markeredgewidth=1.8,
                zorder=5,
            )
            label = f"use {chosen.batch}" if len(sweeps) == 1 else f"{sweep.dtype}: {chosen.batch}"
            axes.annotate(
                label,
                (chosen.batch, value),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                va="bottom",
                weight="bold",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
                zorder=6,
            )
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize=8.5, loc="best")
