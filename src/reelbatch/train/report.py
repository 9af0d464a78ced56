"""What a run tells: metrics.csv, the loss plot, TensorBoard where it is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reelbatch.wording import duration

COLUMNS = (
    "step",
    "samples",
    "tokens",
    "loss",
    "validation_loss",
    "learning_rate",
    "gradient_norm",
    "seconds",
    "samples_per_second",
)
SMOOTHED_OVER = 20
"""Rows of metrics.csv that a point of the smoothed loss averages."""


@dataclass(frozen=True)
class Outcome:
    """One step of all devices together.

    Attributes:
        loss: mean over its samples (or tokens). gradient_norm: before clipping.
        samples, tokens: how many it had. seconds: how long it took. stop: whether the run was asked to stop.
    """

    loss: float
    gradient_norm: float
    samples: int
    tokens: int
    seconds: float
    stop: bool


@dataclass
class Tally:
    """What came of the steps since the last row."""

    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def row(self, step: int, learning_rate: float) -> dict[str, Any]:
        """A row of `metrics.csv`: sums of samples, tokens and seconds, means of the others."""
        outcomes = self.outcomes
        seconds = sum(one.seconds for one in outcomes)
        samples = sum(one.samples for one in outcomes)
        return {
            "step": step,
            "samples": samples,
            "tokens": sum(one.tokens for one in outcomes),
            "loss": sum(one.loss for one in outcomes) / len(outcomes),
            "learning_rate": learning_rate,
            "gradient_norm": sum(one.gradient_norm for one in outcomes) / len(outcomes),
            "seconds": seconds,
            "samples_per_second": samples / seconds,
        }

    def seconds_left(self, steps: int) -> float:
        """Seconds that so many steps more take, at the pace of these."""
        return steps * sum(one.seconds for one in self.outcomes) / len(self.outcomes)


IN_A_LINE = {
    "loss": "loss {:.4g}",
    "validation_loss": "held-out loss {:.4g}",
    "learning_rate": "learning rate {:.3g}",
    "gradient_norm": "gradient norm {:.3g}",
    "samples_per_second": "{:.3g} samples/s",
}


def line(row: Mapping[str, Any], steps: int, seconds_left: float | None) -> str:
    """A row for people: `step 20 of 1000: loss 0.42, learning rate 0.0001, …, about 3 min 20 s left`."""
    parts = [text.format(row[name]) for name, text in IN_A_LINE.items() if name in row]
    if seconds_left:
        parts.append(f"about {duration(seconds_left)} left")
    return f"step {row['step']} of {steps}: {', '.join(parts)}"


class Metrics:
    """Rows of `metrics.csv`, and the same in TensorBoard. A run that is resumed at a step drops the rows after it."""

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        self.folder, self.path = folder, folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if resumed_at and self.path.is_file():
            self.rows = [row for row in read_metrics(self.path) if int(row["step"]) <= resumed_at]
        self._write()
        self._board = _tensorboard(folder / "tensorboard", resumed_at)

    def add(self, row: Mapping[str, Any]) -> None:
        """A row; what is not said is empty."""
        self.rows.append({name: row.get(name, "") for name in COLUMNS})
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(self.rows[-1])
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", float(value), int(row["step"]))

    def close(self) -> Path | None:
        """Draws the loss; returns the picture's path, None if there is nothing to draw."""
        if self._board is not None:
            self._board.close()
        return plot(self.rows, self.folder / "loss.png")

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _tensorboard(folder: Path, resumed_at: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)


def plot(rows: list[dict[str, Any]], path: Path) -> Path | None:
    """The losses over the steps, as a PNG; None if there is no row with a loss."""
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"] != ""]
    held_out = [(int(row["step"]), float(row["validation_loss"])) for row in rows if row["validation_loss"] != ""]
    if not losses:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, label="training")
    windows = [values[max(0, i + 1 - SMOOTHED_OVER) : i + 1] for i in range(len(values))]
    axes.plot(steps, [sum(w) / len(w) for w in windows], color="tab:blue", label=f"mean of {SMOOTHED_OVER} rows")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=3, label="held-out clips")
    axes.set_xlabel("step")
    axes.set_ylabel("flow-matching loss")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
    return path
