"""Writes a report: `tune.json`, `tune.html`, and the charts as pictures."""

from __future__ import annotations

import json
from pathlib import Path

from reelbatch.tune import charts
from reelbatch.tune.page import page
from reelbatch.tune.report import Report, record


def write(report: Report, out: Path) -> dict[str, Path]:
    """Writes all into the folder `out`; returns the files by name.

    Raises:
        OSError: if the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {"json": out / "tune.json", "html": out / "tune.html"}
    files["json"].write_text(json.dumps(record(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    drawings: list[dict[str, str]] = []
    workloads = list(report.workloads())
    for number, (_, sweeps) in enumerate(workloads, 1):
        figures = charts.draw(sweeps, report.limits.max_latency, report.limits.max_memory)
        for name, figure in figures.items():
            stem = f"tune-{number}-{name}" if len(workloads) > 1 else f"tune-{name}"
            files[stem] = out / f"{stem}.png"
            figure.savefig(files[stem], dpi=150, metadata={"Software": None})
        drawings.append({name: charts.svg(figure) for name, figure in figures.items()})
    files["html"].write_text(page(report, drawings), encoding="utf-8")
    return files
