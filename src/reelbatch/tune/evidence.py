"""Evidence: whether what was measured is enough to advise a batch size, or what is missing. Pure, as choosing is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reelbatch.engine.planner import Isolation
from reelbatch.tune.choose import NEAR_BEST, PACKED_MUST_WIN, Choice, Limits
from reelbatch.tune.figures import LEAST_REPEATS, Point

SLACK = 0.10
"""What the spread of the repeats may add to what choosing allows: a choice is within 5 % of the best by its medians,
and must be within 15 % where its own repeats were slow (the slower end of the middle half) and the others' quick."""


class TooLittle(ValueError):
    """What was measured allows no advice; the text says what is missing."""


def check_evidence(points: Sequence[Point], choice: Choice, limits: Limits) -> None:
    """A choice is advice if at least two sizes were measured, and the spread of the repeats does not contradict it.

    Raises:
        TooLittle: for a choice that is not.
    """
    if len({point.batch for point in points}) < 2:
        raise TooLittle(f"Only batch size {points[0].batch} was measured, which says nothing of other sizes.")
    kept = [point for point in points if limits.kept_by(point)]
    exact, packed = _of(kept, "exact"), _of(kept, "packed")
    for own, batch in ((exact, choice.exact_batch), (packed, choice.packed_batch)):
        for chosen in (point for point in own if point.batch == batch):
            _compare(chosen, own, NEAR_BEST - SLACK)
            if choice.isolation == "packed" and chosen.isolation == "packed" and batch == choice.batch:
                _compare(chosen, exact, PACKED_MUST_WIN - SLACK)


def _of(points: Iterable[Point], isolation: Isolation) -> list[Point]:
    return [point for point in points if point.isolation == isolation or point.batch == 1]


def _compare(chosen: Point, others: Iterable[Point], share: float) -> None:
    """Raises TooLittle if, by the spread, the choice may reach less than this share of another's throughput."""
    if chosen.spread.repeats < LEAST_REPEATS:
        times = f"{chosen.spread.repeats} time{'s' if chosen.spread.repeats > 1 else ''}"
        raise TooLittle(
            f"Batch size {chosen.batch}, {chosen.isolation} was measured only {times}: there is no spread yet."
        )
    for other in others:
        if other is not chosen and other.spread.low < share * chosen.spread.high:
            rates = (3600 / chosen.spread.high, 3600 / other.spread.low)
            slow, quick = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}" for rate in rates)
            raise TooLittle(
                f"The repeats are too far apart: batch size {chosen.batch}, {chosen.isolation} gave as few as {slow} "
                f"videos an hour, and {other.batch}, {other.isolation} as many as {quick}."
            )
