"""What is shown of a measurement: the report as JSON values, as tables in a terminal, and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reelbatch.tune.choose import NO_LIMITS, Limits
from reelbatch.tune.figures import Point
from reelbatch.tune.results import SweepResult

WAITING = {
    "component": "only the weights of the component at work are on the device",
    "block": "of networks of blocks, only the weights of the block at work are on the device",
}
UNQUIET, FAR_OFF = 0.05, 0.10
"""Spread of the chosen figure, and error of the extrapolation, from which a person is warned."""
WIDE = 160
DETAILS = ("= alone", "s a step", "s a video", "first s", "GFLOP/s", "J a video")
"""Columns that a terminal narrower than `WIDE` letters leaves out."""
OPTIONAL = ("dtype", "J a video", "read back")
"""Columns that are left out where they are empty."""


@dataclass(frozen=True)
class Report:
    """A whole measurement. budget: seconds that were allowed. seconds: taken. profiles: files that hold the advice."""

    model: str
    weights: str
    device: str
    versions: dict[str, str]
    attention: str
    when: str
    budget: float
    seconds: float
    sweeps: tuple[SweepResult, ...]
    interrupted: bool = False
    limits: Limits = NO_LIMITS
    notes: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()

    def workloads(self) -> Iterator[tuple[str, list[SweepResult]]]:
        """Each workload with its sweeps, one a dtype."""
        ordered = sorted(self.sweeps, key=lambda sweep: [s.workload for s in self.sweeps].index(sweep.workload))
        for name, sweeps in groupby(ordered, key=lambda sweep: sweep.workload):
            yield name, list(sweeps)


def record(report: Report) -> dict[str, Any]:
    """As JSON values; figures that are not there are null."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(report)))
    for sweep, source in zip(values["sweeps"], report.sweeps, strict=True):
        if source.check is not None:
            sweep["check"]["error"] = source.check.error
    return values


# -- the terminal ----------------------------------------------------------------------------------


def terminal(report: Report, width: int) -> RenderableType:
    """Tables, and below each what to use and why. width: in letters; a narrow one leaves out details."""
    parts: list[RenderableType] = []
    for name, sweeps in report.workloads():
        offload = " and ".join(dict.fromkeys(sweep.offload for sweep in sweeps))
        title = f"{report.model}, {name}" + ("" if offload == "none" else f", offload {offload}")
        parts.append(_table(title, sweeps, brief=width < WIDE))
        parts += [Text(line) for line in facts(sweeps)]
        for sweep in sweeps:
            parts.append(Text(f"\n{headline(sweep)}", style="bold"))
            parts.append(Text(str(sweep.choice.why if sweep.choice else sweep.why_none)))
            parts += [Text(line) for line in [instead(sweep)] if line]
        parts += [Text(f"\n{line}") for line in [between_dtypes(sweeps)] if line]
        parts += [Text(line, style="yellow") for line in [unquiet(sweeps)] if line]
    parts += [Text(note, style="yellow") for note in report.notes]
    return Group(*parts)


def _table(title: str, sweeps: list[SweepResult], brief: bool) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    shown = [column for column in columns(sweeps, brief) if not (brief and column.name in DETAILS)]
    for column in shown:
        table.add_column(column.name, justify="right" if column.is_number else "left", no_wrap=True)
    for sweep in sweeps:
        for point in sweep.points:
            style = "bold green" if point is sweep.chosen else None
            table.add_row(*(column.cell(point) for column in shown), style=style)
        table.add_section()
    return table


class Column(NamedTuple):
    """A column of the table: its name, whether it holds numbers, and its text for a batch size."""

    name: str
    is_number: bool
    cell: Callable[[Point], str]


def columns(sweeps: list[SweepResult], brief: bool = False) -> list[Column]:
    """The table's columns. brief: with little said of the drift."""
    every = [
        Column("dtype", False, lambda p: p.dtype if len(sweeps) > 1 else ""),
        Column("batch", True, lambda p: str(p.batch)),
        Column("isolation", False, lambda p: "both" if p.batch == 1 else p.isolation),
        Column("s a step", True, lambda p: significant(p.seconds_per_step)),
        Column("s a video", True, lambda p: significant(p.seconds_per_video)),
        Column("videos/h", True, _rate),
        Column("±", True, lambda p: f"{spread(p):.0%}"),
        Column("first s", True, lambda p: significant(p.first_video_seconds)),
        Column("last s", True, lambda p: significant(p.last_video_seconds)),
        Column("peak GiB", True, lambda p: f"{p.memory.peak / 2**30:.2f}"),
        Column("GFLOP/s", True, _flops),
        Column("J a video", True, lambda p: "" if p.joules_per_video is None else f"{p.joules_per_video:,.1f}"),
        Column("= alone", False, lambda p: "" if p.quality is None else "yes" if p.quality.equal else "no"),
        Column(f"from {_reference(sweeps)}", False, _brief_drift if brief else drift),
        Column("read back", True, _read_back),
    ]
    points = [point for sweep in sweeps for point in sweep.points]
    return [column for column in every if column.name not in OPTIONAL or any(map(column.cell, points))]


def _rate(point: Point) -> str:
    rate = point.videos_per_hour
    return f"{rate:,.0f}" if rate >= 100 else significant(rate)


def _flops(point: Point) -> str:
    share = "" if point.flops_share is None else f" ({point.flops_share:.0%})"
    return "" if point.flops is None else f"{significant(point.flops / 1e9, 2)}{share}"


def _brief_drift(point: Point) -> str:
    same = point.quality is not None and point.quality.equal and point.quality.psnr is None
    return "equal" if same else drift(point).partition(",")[0]


def _read_back(point: Point) -> str:
    share = point.quality and point.quality.attributes
    return "" if share is None else f"{share:.0%}"


def _reference(sweeps: list[SweepResult]) -> str:
    """What the drift is from, of all dtypes."""
    against = {p.quality.against for s in sweeps for p in s.points if p.quality}
    return against.pop() if len(against) == 1 and len(sweeps) > 1 else "alone"


def drift(point: Point) -> str:
    """How far the videos are from those alone, in a few words."""
    quality = point.quality
    if quality is None:
        return "not compared"
    if quality.psnr is None:
        return "no difference"
    ssim = "" if quality.ssim is None else f", SSIM {quality.ssim:.4f}"
    return f"≤ {quality.largest} of 255, {quality.psnr:.1f} dB{ssim}"


def spread(point: Point) -> float:
    """Half of what lies between the least and the most, as a share of the median."""
    return (point.spread.high - point.spread.low) / 2 / point.spread.median


def unquiet(sweeps: list[SweepResult]) -> str | None:
    """A warning if the advised figures moved a good deal while they were measured."""
    worst = max((spread(p) for p in (sweep.chosen for sweep in sweeps) if p is not None), default=0.0)
    off = max((abs(sweep.check.error) for sweep in sweeps if sweep.check), default=0.0)
    if worst <= UNQUIET and off <= FAR_OFF:
        return None
    moved = f"figures of the chosen size moved by ±{worst:.0%}" if worst > UNQUIET else ""
    missed = f"a full run took another time than promised, by {off:.0%}" if off > FAR_OFF else ""
    what = ", and ".join(filter(None, (moved, missed)))
    return (
        f"The machine was busy with something else: {what}. Measure again when it is quiet, or with a larger --budget."
    )


def instead(sweep: SweepResult) -> str | None:
    """What to use where every video must stay equal to the last bit, if packed is advised."""
    if sweep.choice is None or sweep.choice.isolation == "exact":
        return None
    exact = [p for p in sweep.points if p.isolation == "exact" and p.batch == sweep.choice.exact_batch]
    rate = f" ({exact[0].videos_per_hour:,.0f} videos an hour)" if exact else ""
    return f"Where every video must stay equal to the bit: --batch-size {sweep.choice.exact_batch}, exact{rate}."


def headline(sweep: SweepResult) -> str:
    """What to use, in a line."""
    if sweep.choice is None:
        return f"{sweep.no_advice} ({sweep.dtype})"
    use = f"--batch-size {sweep.choice.batch}" + ("" if sweep.offload == "none" else f" --offload {sweep.offload}")
    return f"Use {use}, {sweep.choice.isolation} isolation ({sweep.dtype})"


def facts(sweeps: list[SweepResult]) -> list[str]:
    """Lines below the table: memory, energy, how it was measured, and what to know."""
    lines = []
    for sweep in sweeps:
        of = f"{sweep.dtype}: " if len(sweeps) > 1 else ""
        point = sweep.chosen or sweep.alone
        if sweep.offload != "none":
            lines.append(f"{of}offload {sweep.offload}: {WAITING[sweep.offload]}")
        if point is not None:
            m = point.memory
            came = "" if sweep.offload == "none" else " and the weights that come"
            held = [("weights", m.weights), ("the process besides", m.process)]
            taken = [(f"activations{came}", m.activations), ("VAE", m.vae), ("text", m.text)]
            split = ", ".join(f"{name} {size(value)}" for name, value in [*filter(itemgetter(1), held), *taken])
            what = f"{of}memory of batch size {point.batch} ({sweep.memory_what})"
            lines.append(f"{what}: {split}; {size(m.peak)} at the peak")
            lines.append(f"{of}matrix rate of the device: {sweep.matrix_flops / 1e9:,.0f} GFLOP/s, measured")
            if point.joules_per_video is None:
                lines.append(f"{of}energy: not measured by this device")
        lines.append(of + checked(sweep))
        if quality := next((p.quality for p in sweep.points if p.quality), None):
            count = f"{quality.videos} video{'s' if quality.videos > 1 else ''} of each size"
            lines.append(f"{of}compared: {count}, after {quality.steps} steps, with {quality.against}; worst shown")
        lines.append("±, and the bands around the curves: where the middle half of the repeats lies")
        lines += [of + note for note in sweep.notes]
    return list(dict.fromkeys(lines))


def checked(sweep: SweepResult) -> str:
    """How far a full run was from the extrapolation."""
    how = f"{sweep.measured_steps} or a few more of {sweep.full_steps} steps were measured at a time, and extrapolated"
    if sweep.check is None:
        return f"{how}, not checked by a full run"
    c = sweep.check
    runs = "a full run" if c.runs == 1 else f"{c.runs} full runs"
    return (
        f"{how}; checked by {runs} of {c.batch}: {significant(c.promised)} s promised, {significant(c.took)} s taken "
        f"({c.error:+.1%})"
    )


def between_dtypes(sweeps: list[SweepResult]) -> str | None:
    """Speed, memory and distance of the other dtypes against the first, in a sentence each."""
    base = sweeps[0].chosen
    if base is None or len(sweeps) < 2:
        return None
    lines = []
    for sweep in sweeps[1:]:
        point = sweep.chosen
        if point is not None:
            times = point.videos_per_hour / base.videos_per_hour
            memory = point.memory.peak / base.memory.peak
            lines.append(
                f"{point.dtype} gives {times:.2f} times the videos an hour of {base.dtype} in {memory:.2f} times its "
                f"memory; its videos: {drift(point)} from {_reference(sweeps)}."
            )
    return " ".join(lines) or None


def size(count: int) -> str:
    """Bytes, in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def significant(value: float, digits: int = 3) -> str:
    """Three digits that count, without powers of ten."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
