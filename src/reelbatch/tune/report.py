"""What is shown of a measurement: the report as JSON values, as tables in a terminal, and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

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
    names = columns(sweeps)
    shown = [i for i, (name, _) in enumerate(names) if not (brief and name in DETAILS)]
    for name, is_number in (names[i] for i in shown):
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for sweep in sweeps:
        for point in sweep.points:
            row = cells(point, sweeps)
            if brief:
                same = point.quality is not None and point.quality.equal and point.quality.psnr is None
                row = [("equal" if same else cell.partition(",")[0]) if cell == drift(point) else cell for cell in row]
            table.add_row(*(row[i] for i in shown), style="bold green" if point is sweep.chosen else None)
        table.add_section()
    return table


def columns(sweeps: list[SweepResult]) -> list[tuple[str, bool]]:
    """Names of the table's columns, and whether they hold numbers."""
    dtype = [("dtype", False)] if len(sweeps) > 1 else []
    energy = [("J a video", True)] if any(p.joules_per_video is not None for s in sweeps for p in s.points) else []
    read = [("read back", True)] if _reads_back(sweeps) else []
    return [
        *dtype,
        ("batch", True),
        ("isolation", False),
        ("s a step", True),
        ("s a video", True),
        ("videos/h", True),
        ("±", True),
        ("first s", True),
        ("last s", True),
        ("peak GiB", True),
        ("GFLOP/s", True),
        *energy,
        ("= alone", False),
        (f"from {_reference(sweeps)}", False),
        *read,
    ]


def cells(point: Point, sweeps: list[SweepResult]) -> list[str]:
    """A row of the table."""
    share = "" if point.flops_share is None else f" ({point.flops_share:.0%})"
    energy = "" if point.joules_per_video is None else f"{point.joules_per_video:,.1f}"
    quality = point.quality
    row = [
        *([point.dtype] if len(sweeps) > 1 else []),
        str(point.batch),
        "both" if point.batch == 1 else point.isolation,
        significant(point.seconds_per_step),
        significant(point.seconds_per_video),
        f"{point.videos_per_hour:,.0f}" if point.videos_per_hour >= 100 else significant(point.videos_per_hour),
        f"{spread(point):.0%}",
        significant(point.first_video_seconds),
        significant(point.last_video_seconds),
        f"{point.memory.peak / 2**30:.2f}",
        "" if point.flops is None else f"{significant(point.flops / 1e9, 2)}{share}",
    ]
    if any(name == "J a video" for name, _ in columns(sweeps)):
        row.append(energy)
    row.append("" if quality is None else "yes" if quality.equal else "no")
    row.append(drift(point))
    if _reads_back(sweeps):
        row.append("" if quality is None or quality.attributes is None else f"{quality.attributes:.0%}")
    return row


def _reference(sweeps: list[SweepResult]) -> str:
    """What the drift is from, of all dtypes."""
    against = {p.quality.against for s in sweeps for p in s.points if p.quality}
    return against.pop() if len(against) == 1 and len(sweeps) > 1 else "alone"


def _reads_back(sweeps: list[SweepResult]) -> bool:
    return any(p.quality is not None and p.quality.attributes is not None for s in sweeps for p in s.points)


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
        return f"No batch size fits ({sweep.dtype})"
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
            split = ", ".join(
                f"{name} {size(value)}"
                for name, value in (
                    ("weights", m.weights),
                    ("the process besides", m.process),
                    (f"activations{came}", m.activations),
                    ("VAE", m.vae),
                    ("text", m.text),
                )
                if name not in ("the process besides", "weights") or value
            )
            what = f"{of}memory of batch size {point.batch} ({sweep.memory_what})"
            lines.append(f"{what}: {split}; {size(m.peak)} at the peak")
            lines.append(f"{of}matrix rate of the device: {sweep.matrix_flops / 1e9:,.0f} GFLOP/s, measured")
            if point.joules_per_video is None:
                lines.append(f"{of}energy: not measured by this device")
        lines.append(of + checked(sweep))
        if any(p.quality for p in sweep.points):
            quality = next(p.quality for p in sweep.points if p.quality)
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
