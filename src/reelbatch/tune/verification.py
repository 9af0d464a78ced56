"""Verification: full runs of the chosen size against what was extrapolated."""

from __future__ import annotations

import statistics

from reelbatch.tune.bench import Bench
from reelbatch.tune.comparison import compare_size, seconds_to_compare
from reelbatch.tune.results import Check

MOST_RUNS = 3


def verify(bench: Bench) -> Check | None:
    """The median of up to three full runs, as time allows; None, with a note, where it allows none."""
    measured, alone = bench.measured, bench.alone
    candidates = measured.candidates()
    if not candidates:
        return None
    isolation, size = key = candidates[0]
    record = measured.records[key]
    if record.quality is None and alone is not None and seconds_to_compare(bench, alone, key) <= bench.left():
        compare_size(bench, alone, key)
    promised = measured.point(key).last_video_seconds
    wave = max(bench.workload.waves(size), key=lambda wave: sum(request.work for request in wave))
    took: list[float] = []
    while len(took) < MOST_RUNS and promised < bench.left():
        bench.say(f"checking with a full run of {size}", promised * (MOST_RUNS - len(took)), at_most=True)
        took.append(bench.observe(wave, isolation, size).last)
    if not took and record.full_run is not None:
        took = [record.full_run]
    if not took:
        bench.note(
            f"the extrapolation was not checked: a full run takes about {promised:.0f} s, more than is left of the "
            "budget (--budget)"
        )
        return None
    # extrapolated anew: those runs measured decoding once more
    return Check(size, isolation, measured.point(key).last_video_seconds, statistics.median(took), len(took))
