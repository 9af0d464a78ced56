"""Comparison: every size's videos against the same videos alone."""

from __future__ import annotations

import statistics

from reelbatch.tune.bench import Bench
from reelbatch.tune.measure import DoesNotFit, write_seconds
from reelbatch.tune.measurements import ALONE, Key
from reelbatch.tune.quality import Alone, compare
from reelbatch.tune.workload import frame_bytes, shortened
from reelbatch.video import Video

TIME_SHARE = 0.85
"""The share of the time left that comparing may take."""
COMPARED = ((8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0), (2, 0.25), (1, 0.0))
"""Videos that are compared, and the share of their steps: the first for which the best sizes take half the time."""
COMPARED_BYTES = 2**30
"""Frames that are kept for comparing, at most."""


def compare_all(bench: Bench) -> None:
    """Compares as many sizes as there is time for, the best first."""
    seconds = TIME_SHARE * bench.left()
    end = bench.clock() + seconds
    alone = generate_alone(bench, seconds)
    best = bench.measured.candidates()
    order = sorted(bench.measured.records, key=lambda key: (key not in best, key[1]))
    skipped: list[str] = []
    for number, key in enumerate(order):
        ahead = [seconds_to_compare(bench, alone, other) for other in order[number:]]
        if number and bench.clock() + ahead[0] > end:
            skipped.append(f"{key[1]} {key[0]}")
            continue
        left = min(sum(ahead), end - bench.clock())
        bench.say(f"comparing the videos of batch size {key[1]}, {key[0]}", left)
        compare_size(bench, alone, key)
    if skipped:
        bench.note(f"not compared with the videos alone, for want of time (--budget): {', '.join(skipped)}")


def generate_alone(bench: Bench, seconds: float) -> Alone:
    """Generates `bench.alone`: as many videos as the reference has, or as can be compared in so many seconds."""
    workload, measured = bench.workload, bench.measured
    count, steps = bench.reference.sizes if bench.reference else _affordable(bench, seconds)
    videos: list[Video] = []
    each = measured.full_seconds(ALONE, 1, steps)
    for i, request in enumerate(workload.take(count)):
        bench.say(f"video {i + 1} of {count} alone, to compare with", each * (count - i))
        videos += bench.observe([shortened(request, steps)]).videos.values()
    full = steps >= workload.steps
    if not full:
        bench.note(f"videos are compared after {steps} of {workload.steps} steps: all would take too long")
    if bench.model.device.type == "cpu":
        measured.write_rate = statistics.median(write_seconds(video) / video.frames.nbytes for video in videos)
    bench.alone = Alone(tuple(videos), steps, full, f"{measured.dtype} alone")
    return bench.alone


def compare_size(bench: Bench, alone: Alone, key: Key) -> None:
    """Compares the videos of one size, and takes what a full run of it shows besides."""
    isolation, size = key
    record, workload = bench.measured.records[key], bench.workload
    count, steps = alone.sizes
    videos = list(alone.videos)
    if size > 1:
        requests = [shortened(request, steps) for request in workload.take(max(count, size))]
        try:
            trace = bench.observe(requests, isolation, size, weigh=True)
        except DoesNotFit as error:
            bench.note(f"{isolation} {size}: no full run: {error}")
            return
        record.step_bytes = max(record.step_bytes, trace.peaks["step"])
        record.decode_bytes = max(record.decode_bytes, trace.peaks["decode"])
        videos = [trace.videos[str(i)] for i in range(count)]
        if alone.full and count <= size and workload.period == 1:
            record.full_run = trace.last
    record.quality = compare(videos, alone, bench.reference or alone, workload.scenes[:count])


def seconds_to_compare(bench: Bench, alone: Alone, key: Key) -> float:
    """About what comparing a size takes."""
    count, steps = alone.sizes
    return bench.measured.full_seconds(key, max(count, key[1]), steps)


def _affordable(bench: Bench, seconds: float) -> tuple[int, int]:
    """How many videos to compare, after how many steps."""
    measured = bench.measured
    most = max(1, COMPARED_BYTES // max(map(frame_bytes, bench.workload.requests)))
    for count, share in COMPARED:
        steps = max(round(share * bench.workload.steps), bench.steps)
        best = {*measured.candidates(), ALONE}
        cost = sum(measured.full_seconds(key, max(count, key[1]), steps) for key in best)
        if count <= most and cost <= seconds / 2:
            return count, steps
    return 1, bench.steps
