"""How `reelbatch job` shows where a job stands and what lies ahead: as JSON, and as tables."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from reelbatch.cli.common import SafeConsole
from reelbatch.wording import duration

if TYPE_CHECKING:
    from reelbatch.jobs.manifest import Manifest
    from reelbatch.jobs.outlook import Outlook

SHOWN_ERRORS = 10


def status_record(manifest: Manifest) -> dict[str, Any]:
    """As `job status --json` gives it."""
    from reelbatch.jobs.manifest import OPEN, State
    from reelbatch.jobs.outlook import pace

    rows = manifest.rows()
    now = pace(rows)
    counts = manifest.counts()
    saved = {
        str(state): {
            "done": sum(row.step for row in rows if row.state == state),
            "of": sum(row.to_request().steps or 0 for row in rows if row.state == state),
        }
        for state in OPEN
    }
    failed = [
        {"id": row.id, "prompt": row.prompt, "seed": row.seed, "attempts": row.attempts, "error": row.error}
        for row in rows
        if row.state == State.FAILED
    ]
    return {
        "videos": len(rows),
        **{str(state): count for state, count in counts.items()},
        "videos_per_hour": now.videos_per_hour,
        "seconds_left": now.seconds_left,
        "saved_steps": saved,
        "failures": failed,
    }


def status_table(manifest: Manifest) -> Group:
    """As `job status` shows it."""
    status = status_record(manifest)
    table = Table("state", "videos", "", box=None, padding=(0, 2, 0, 0))
    for state in ("done", "running", "waiting", "failed", "cancelled"):
        share = status[state] / status["videos"] if status["videos"] else 0
        steps = status["saved_steps"].get(state, {"done": 0})
        note = f", {steps['done']:,} of {steps['of']:,} steps done" if steps["done"] else ""
        table.add_row(f"{state}{note}", f"{status[state]:,}", "█" * round(40 * share))
    rate, left = status["videos_per_hour"], status["seconds_left"]
    pace = "" if rate is None else f"{rate:,.0f} videos an hour"
    if left:
        pace += f"; about {duration(left)} left while it runs like that"
    errors = Counter(failure["error"] for failure in status["failures"])
    lines = [Text(f"{count} × {error}", style="red") for error, count in errors.most_common(SHOWN_ERRORS)]
    return Group(table, Text(pace), *lines)


def show_outlook(outlook: Outlook, as_json: bool) -> None:
    """Prints what `job run --dry-run` is for."""
    if as_json:
        typer.echo(json.dumps(outlook.record()))
        return
    table = Table("videos", "size", "frames", "steps", "branches", box=None, padding=(0, 2, 0, 0))
    for kind, count in outlook.kinds.items():
        table.add_row(f"{count:,}", f"{kind.width}×{kind.height}", *map(str, (kind.frames, kind.steps, kind.branches)))
    answer = SafeConsole()
    answer.print(table)
    there = f" ({outlook.kept:,} of them are made already)" if outlook.kept else ""
    time_ = f"about {duration(outlook.seconds)}" if outlook.seconds is not None else "unknown"
    free = f"; {outlook.free_bytes / 2**30:,.1f} GiB are free" if outlook.free_bytes is not None else ""
    for line in (
        f"{outlook.videos:,} videos of {outlook.prompts:,} prompts{there}, in about {outlook.batches:,} batches of "
        f"{outlook.batch_size}",
        f"time: {time_} ({outlook.time_from})",
        f"disk: about {outlook.bytes / 2**20:,.1f} MiB ({outlook.disk_from}){free}",
        "nothing was made: leave --dry-run out to make them",
    ):
        answer.print(line, markup=False, highlight=False, soft_wrap=True)
