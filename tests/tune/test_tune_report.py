"""The page, the table and the figures of `tune`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tuning import GIB

from reelbatch.tune import report
from reelbatch.tune.choose import choose
from reelbatch.tune.figures import MemorySplit, Point, Spread
from reelbatch.tune.quality import Quality
from reelbatch.tune.results import Check, SweepResult
from reelbatch.tune.write import write


def made_up(batch: int, isolation: str = "exact", rate: float = 1000.0, **fields) -> Point:
    quality = Quality(4, 20, "float32 alone", isolation == "exact", int(isolation != "exact"), None, 1.0, 0.97)
    if isolation != "exact":
        quality = replace(quality, psnr=61.2, ssim=0.9991)
    base = Point(
        "float32", isolation, batch, 0.1, 3600 / rate, rate, Spread(3600 / rate, 3500 / rate, 3700 / rate, 5), 1.0, 2.0,
        MemorySplit(2**25, 2**28, 2**20, batch * 2**24, 2**25, 2**29 + batch * 2**24), 2e10, 0.3, None, quality,
    )  # fmt: skip
    return replace(base, **fields)


def shown(*sweeps: SweepResult, **fields) -> report.Report:
    found = tuple(sweeps) or (made_up_sweep(),)
    return report.Report(
        "demo", "0" * 64, "cpu: a <processor>", {"torch": "2"}, "auto", "2026-11-22", 90.0, 80.0, found, **fields
    )


def made_up_sweep(dtype: str = "float32", scale: float = 1.0, **fields) -> SweepResult:
    points = tuple(
        replace(made_up(batch, isolation, rate * scale), dtype=dtype)
        for isolation, rates_ in (("exact", {1: 1000, 2: 1500, 4: 1600, 8: 1610}), ("packed", {2: 1550, 4: 1700}))
        for batch, rate in rates_.items()
    )
    base = SweepResult(
        "64×64, 9 frames, 20 steps", "64×64×9", dtype, points, choose(points), None,
        Check(4, "exact", 2.0, 2.1, 2), 6e10, 16 * GIB, "resident set", 20, 3, 40.0, False, ("exact: stopped at 8",),
    )  # fmt: skip
    return replace(base, **fields)


def test_the_page_says_what_to_choose_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    files = write(shown(), tmp_path / "o")
    page = files["html"].read_text(encoding="utf-8")
    assert "Use batch size 4, exact isolation" in page
    assert "1.60 times the throughput of one alone" in page
    assert page.count("<svg") == 4
    assert '<tr class="chosen"><td>4</td><td class="words">exact</td>' in page
    assert "cpu: a &lt;processor&gt;" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!\#)|url\((?!\#)|@import|<script|<link""", page)
    elsewhere = {url for url in re.findall(r"https?://[^\"'<> )]+", page) if not url.startswith("http://www.w3.org/")}
    assert not elsewhere  # only names of XML's own vocabularies
    for name in ("throughput", "latency", "memory", "drift"):
        assert files[f"tune-{name}"].read_bytes().startswith(b"\x89PNG")
    saved = json.loads(files["json"].read_text(encoding="utf-8"))
    assert saved["sweeps"][0]["choice"]["batch"] == 4
    assert saved["sweeps"][0]["check"]["error"] == pytest.approx(2.0 / 2.1 - 1)


def test_the_page_has_dark_colors_for_itself_and_its_charts(tmp_path: Path) -> None:
    page = write(shown(), tmp_path)["html"].read_text(encoding="utf-8")
    style, body = page.split("</style></head>")
    light, dark = (
        set(re.findall(r"(--[a-z-]+):", part)) for part in style.split("@media (prefers-color-scheme: dark) {")[:2]
    )
    used = set(re.findall(r"var\((--[a-z-]+)\)", page))
    assert used <= light and used <= dark
    assert {"--ink", "--card", "--line", "--exact", "--packed"} <= set(re.findall(r"var\((--[a-z-]+)\)", body))
    assert not re.search(r"(fill|stroke): ?#", body)  # each color of a chart has one for a dark page


def test_several_dtypes_stand_in_one_table_with_speed_against_quality(tmp_path: Path) -> None:
    half = made_up_sweep("bfloat16", 2.0)
    found = shown(made_up_sweep(), half)
    console = Console(width=160, record=True, file=open(tmp_path / "t", "w"))  # noqa: SIM115
    console.print(report.terminal(found, 160))
    text = console.export_text()
    assert "bfloat16 gives 2.00 times the videos an hour of float32" in text
    assert "from float32 alone" in text
    assert "…" not in text
    page = write(found, tmp_path)["html"].read_text(encoding="utf-8")
    assert page.count("Use batch size 4, exact isolation") == 2
    assert page.count("<svg") == 4


def test_a_table_fits_eighty_columns(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=open(tmp_path / "t", "w"))  # noqa: SIM115
    console.print(report.terminal(shown(), 80))
    text = console.export_text()
    assert "…" not in text
    assert "Use --batch-size 4, exact isolation" in text
    assert "promised" in text


def test_nothing_measured_no_choice_and_an_unquiet_machine_are_shown_as_such(tmp_path: Path) -> None:
    nothing = made_up_sweep(points=(), choice=None, why_none="nothing was measured", check=None, interrupted=True)
    page = write(shown(nothing, interrupted=True), tmp_path)["html"].read_text(encoding="utf-8")
    assert "No batch size fits" in page
    assert "Stopped by hand" in page
    little = replace(nothing, too_little=True, why_none="Only batch size 1 was measured. Measure more: a command")
    page = write(shown(little), tmp_path)["html"].read_text(encoding="utf-8")
    assert "Too little was measured to choose a batch size" in page and "Measure more: a command" in page
    console = Console(width=100, record=True, file=open(tmp_path / "t", "w"))  # noqa: SIM115
    console.print(report.terminal(shown(little), 100))
    text = console.export_text()
    assert "Too little was measured" in text and "Measure more: a command" in text
    wild = made_up_sweep(points=(replace(made_up(1), spread=Spread(3.6, 2.0, 9.0, 5)),))
    wild = replace(wild, choice=choose(wild.points))
    assert "±97%" in report.unquiet([wild])
    assert report.unquiet([made_up_sweep()]) is None
    off = made_up_sweep(check=Check(4, "exact", 2.0, 3.0, 1))
    assert "a full run took another time than promised, by 33%" in report.unquiet([off])
