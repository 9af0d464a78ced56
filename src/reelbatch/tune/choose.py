"""Which batch size to use, of those that were measured, and why. Pure: numbers in, a choice and a sentence out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from reelbatch.engine.planner import Isolation

ISOLATIONS: tuple[Isolation, ...] = ("exact", "packed")
NEAR_BEST = 0.95
"""The smallest batch that reaches this share of the best throughput is chosen: larger ones cost more than they give."""
PACKED_MUST_WIN = 1.10
"""How much more throughput packed must give than exact to be advised: it gives up equality to the last bit."""


class Measured(Protocol):
    """What choosing looks at."""

    @property
    def isolation(self) -> Isolation: ...
    @property
    def batch(self) -> int: ...
    @property
    def videos_per_hour(self) -> float: ...
    @property
    def last_video_seconds(self) -> float: ...
    @property
    def peak_bytes(self) -> int: ...


P = TypeVar("P", bound=Measured)


@dataclass(frozen=True)
class Limits:
    """What a person can bear: seconds from asking to the last video of a batch, and bytes at the peak."""

    max_latency: float | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("--max-latency", self.max_latency), ("--max-memory", self.max_memory)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")

    def kept_by(self, point: Measured) -> bool:
        late = self.max_latency is not None and point.last_video_seconds > self.max_latency
        large = self.max_memory is not None and point.peak_bytes > self.max_memory
        return not late and not large


@dataclass(frozen=True)
class Choice:
    """The advice. `exact_batch` and `packed_batch`: the best of each isolation, for a run that has settled on one."""

    batch: int
    isolation: Isolation
    exact_batch: int
    packed_batch: int
    why: str


class NothingKept(ValueError):
    """No batch size that was measured keeps to the limits; the text says by how much."""


NO_LIMITS = Limits()


def choose(points: Sequence[P], limits: Limits = NO_LIMITS) -> Choice:
    """The smallest batch within 5 % of the best throughput that keeps to the limits; packed if it wins by over 10 %.

    A batch of one is the same in both isolations and counts for both.

    Raises:
        NothingKept: if no point keeps to the limits.
        ValueError: if there is no point.
    """
    if not points:
        raise ValueError("nothing was measured: there is nothing to choose from")
    kept = [point for point in points if limits.kept_by(point)]
    if not kept:
        raise NothingKept(_nothing_kept(points, limits))
    exact, packed = (
        [point for point in kept if point.isolation == isolation or point.batch == 1] for isolation in ISOLATIONS
    )
    best_exact, best_packed = _best(exact), _best(packed)
    exact_point, packed_point = _smallest_near_best(exact), _smallest_near_best(packed)
    takes_packed = best_packed > PACKED_MUST_WIN * best_exact
    chosen = packed_point if takes_packed else exact_point
    assert chosen is not None
    return Choice(
        batch=chosen.batch,
        isolation="packed" if takes_packed else "exact",
        exact_batch=exact_point.batch if exact_point else 1,
        packed_batch=packed_point.batch if packed_point else 1,
        why=_why(chosen, points, kept, best_exact, best_packed),
    )


def _best(points: Iterable[Measured]) -> float:
    """Videos an hour; 0 without points."""
    return max((point.videos_per_hour for point in points), default=0.0)


def _smallest_near_best(points: Sequence[P]) -> P | None:
    near = [point for point in points if point.videos_per_hour >= NEAR_BEST * _best(points)]
    return min(near, key=lambda point: point.batch, default=None)


# -- words -----------------------------------------------------------------------------------------


def _why(chosen: P, points: Sequence[P], kept: Sequence[P], best_exact: float, best_packed: float) -> str:
    own = [point for point in points if point.isolation == chosen.isolation or point.batch == 1]
    allowed = [point for point in kept if point in own]
    reasons = [_against_others(chosen, allowed, own)]
    if len(allowed) < len(own):
        reasons.append(f"larger ones break a limit ({', '.join(str(p.batch) for p in own if p not in kept)})")
    reasons.append(_isolations(chosen, best_exact, best_packed))
    return "; ".join(filter(None, reasons)) + "."


def _against_others(chosen: Measured, allowed: Sequence[Measured], own: Sequence[Measured]) -> str:
    best = max(allowed, key=lambda point: point.videos_per_hour)
    alone = next((point for point in own if point.batch == 1), None)
    if chosen.batch == 1:
        if max(point.batch for point in own) == 1:
            return "no larger batch was measured"
        gain = best.videos_per_hour / chosen.videos_per_hour - 1
        others = f"the best of the larger ones gives only {gain:.0%} more" if gain >= 0.005 else ""
        return f"one video keeps the device busy already: {others or 'larger ones give no more'}"
    share = chosen.videos_per_hour / best.videos_per_hour
    of_best = f"{share:.0%} of the best, which takes a batch of {best.batch}"
    more = "the best measured" if chosen.batch == best.batch else of_best
    if alone is None:
        return more
    return f"{chosen.videos_per_hour / alone.videos_per_hour:.2f} times the throughput of one alone, and {more}"


def _isolations(chosen: Measured, best_exact: float, best_packed: float) -> str:
    if not best_exact:
        return "only packed keeps to the limits"
    if not best_packed:
        return ""
    gain = best_packed / best_exact - 1
    if chosen.isolation == "packed" and chosen.batch > 1:
        must = f"the {PACKED_MUST_WIN - 1:.0%} that giving up equality must earn"
        return f"packed is {gain:.0%} faster than exact, more than {must}"
    if gain > PACKED_MUST_WIN - 1:
        return ""
    words = f"packed would give {gain:.0%} more" if gain >= 0.005 else "packed gives no more"
    return f"{words}, so every video stays bit for bit the one it is alone"


def _nothing_kept(points: Sequence[Measured], limits: Limits) -> str:
    quickest = min(points, key=lambda point: point.last_video_seconds)
    least = min(points, key=lambda point: point.peak_bytes)
    reasons = []
    if limits.max_latency is not None and quickest.last_video_seconds > limits.max_latency:
        reasons.append(
            f"--max-latency is {limits.max_latency:g} s, and even batch size {quickest.batch} takes "
            f"{quickest.last_video_seconds:.3g} s to its last video"
        )
    if limits.max_memory is not None and least.peak_bytes > limits.max_memory:
        reasons.append(
            f"--max-memory is {limits.max_memory / 2**30:.3g} GiB, and even batch size {least.batch} takes "
            f"{least.peak_bytes / 2**30:.3g} GiB"
        )
    why = "; ".join(reasons) or "no batch size keeps to --max-latency and --max-memory together"
    return f"{why}. Raise the limit, or ask for smaller, shorter videos or fewer steps."
