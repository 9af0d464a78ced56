"""Repeats: all sizes again in turn, so that what disturbs the machine disturbs them alike, until they are steady."""

from __future__ import annotations

import statistics

from reelbatch.tune.bench import Bench
from reelbatch.tune.figures import is_steady
from reelbatch.tune.workload import shape_of, shortened

MOST_REPEATS = 15
TIME_SHARE = 0.45
"""The share of the time left that repeating may take."""


def repeat(bench: Bench) -> None:
    """Sizes that decide come first; decoding is measured again with them."""
    measured = bench.measured
    end = bench.clock() + TIME_SHARE * bench.left()
    shapes = {shape_of(request): request for request in bench.workload.requests}
    while True:
        unsteady = [
            key
            for key, record in measured.records.items()
            if len(record.repeats) < MOST_REPEATS and not is_steady(measured.per_video(key))
        ]
        if not unsteady:
            return
        unsteady = [key for key in unsteady if key in measured.deciding()] or unsteady
        cost = {key: statistics.median(one.seconds for one in measured.records[key].repeats) for key in unsteady}
        if bench.clock() + min(cost.values()) > end:
            sizes = ", ".join(f"{size} {isolation}" for isolation, size in unsteady)
            bench.note(f"not steady yet when the time was up (--budget gives more): {sizes}")
            return
        for key in unsteady:
            if bench.clock() + cost[key] <= end:
                bench.say(f"again: batch size {key[1]}, {key[0]}", at_most=True)
                bench.measure(key)
        for request in shapes.values():
            bench.observe([shortened(request, 1)])
