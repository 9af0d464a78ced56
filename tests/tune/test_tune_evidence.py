"""Whether what was measured allows advice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tune_report import made_up
from tuning import AMPLE, call

from reelbatch.tune import bench, evidence, profiles
from reelbatch.tune.choose import NO_LIMITS, Limits, choose
from reelbatch.tune.evidence import TooLittle, check_evidence
from reelbatch.tune.figures import Point, Spread


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "SLACK", 0.10)


def measured(batch: int, rate: float, isolation: str = "exact", moved: float = 0.01, repeats: int = 5) -> Point:
    seconds = 3600 / rate
    spread = Spread(seconds, seconds * (1 - moved), seconds * (1 + moved), repeats)
    return replace(made_up(batch, isolation, rate), spread=spread)


def check(*points: Point, limits: Limits = NO_LIMITS) -> None:
    check_evidence(points, choose(points, limits), limits)


def test_steady_figures_of_two_sizes_are_enough() -> None:
    check(measured(1, 1000), measured(2, 1500))
    check(measured(1, 1000), measured(2, 990), measured(2, 1010, "packed"))
    check(measured(1, 1000), measured(2, 1000), measured(2, 1300, "packed"))
    check(measured(1, 1000), measured(2, 1500), measured(4, 1500, moved=0.08))


@pytest.mark.parametrize(
    ("points", "missing"),
    [
        ([measured(1, 1000)], "Only batch size 1 was measured, which says nothing of other sizes"),
        ([measured(1, 1000, repeats=2), measured(2, 1010)], "Batch size 1, exact was measured only 2 times"),
        ([measured(1, 1000, moved=0.3), measured(2, 1010)], "1, exact gave as few as 769 videos an hour, and 2, exact"),
        ([measured(1, 1000), measured(2, 1010, moved=0.2)], "and 2, exact as many as 1,262"),
        ([measured(1, 1000), measured(2, 1000), measured(2, 1120, "packed", 0.15)], "2, packed gave as few as 974"),
    ],
)
def test_what_is_missing_is_said(points: list[Point], missing: str) -> None:
    with pytest.raises(TooLittle, match=re.escape(missing)):
        check(*points)


def test_sizes_that_break_a_limit_are_no_rivals() -> None:
    wild = measured(8, 1020, moved=0.5)
    with pytest.raises(TooLittle):
        check(measured(1, 1000), measured(2, 1010), wild)
    check(measured(1, 1000), measured(2, 1010), wild, limits=Limits(max_memory=wild.peak_bytes - 1))


@given(
    rates=st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.floats(100, 10_000), min_size=2),
    moved=st.floats(0, 0.5),
)
def test_what_passes_loses_no_more_than_the_slack(rates: dict[int, float], moved: float) -> None:
    points = [measured(batch, rate, moved=moved) for batch, rate in rates.items()]
    choice = choose(points, NO_LIMITS)
    chosen = next(point for point in points if point.batch == choice.exact_batch)
    slowest = 3600 / chosen.spread.high
    quickest = max(3600 / point.spread.low for point in points if point is not chosen)
    try:
        check(*points)
    except TooLittle:
        assert slowest < 0.851 * quickest
    else:
        assert slowest > 0.849 * quickest


def test_a_run_that_had_time_for_one_size_stores_nothing_and_names_the_command(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a busy machine: one size was measured, "use batch size 1" was stored, and obeyed for ever."""
    left = bench.Bench.left
    monkeypatch.setattr(bench.Bench, "left", lambda self: min(left(self), 0.0))
    words = ("--model", tiny_folder, "--shape", "32x32x5", "--steps", "2", "--out", "t")
    result = call("tune", *words, "--budget", f"{AMPLE}s", "--json")
    assert result.exit_code == 1, result.output
    (sweep,) = json.loads(result.stdout)["sweeps"]
    assert [point["batch"] for point in sweep["points"]] == [1]
    assert sweep["choice"] is None and sweep["too_little"]
    command = sweep["why_none"].partition("machine: ")[2]
    asked = ("--shape 32x32x5", "--steps 2", f"--model {tiny_folder}", "--out t", "--json", f"--budget {AMPLE // 30}m")
    assert command.startswith("reelbatch tune ") and all(words in command for words in asked)
    assert not re.search(r"-\d+ s left", result.stderr)
    assert not profiles.stored()
    page = (here / "t" / "tune.html").read_text(encoding="utf-8")
    assert "Too little was measured to choose a batch size" in page
    assert "Only batch size 1 was measured" in page
