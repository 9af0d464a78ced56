"""Which batch size is chosen from what was measured."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning import GIB

from reelbatch.tune.choose import NEAR_BEST, PACKED_MUST_WIN, Limits, NothingKept, choose


@dataclass(frozen=True)
class P:
    isolation: str
    batch: int
    videos_per_hour: float
    last_video_seconds: float = 1.0
    peak_bytes: int = GIB


def points(exact: dict[int, float], packed: dict[int, float] | None = None) -> list[P]:
    return [P("exact", b, v) for b, v in exact.items()] + [P("packed", b, v) for b, v in (packed or {}).items()]


limits = st.builds(Limits, st.none() | st.floats(0.01, 1e4), st.none() | st.integers(1, 80 * GIB))


rates = st.floats(0.1, 1e5)
sizes = st.integers(2, 64)
figures = st.builds(
    P, st.sampled_from(["exact", "packed"]), sizes, rates, st.floats(0.01, 1e4), st.integers(1, 80 * GIB)
)
measured = st.tuples(
    st.builds(P, st.just("exact"), st.just(1), rates, st.floats(0.01, 1e4), st.integers(1, 80 * GIB)),
    st.lists(figures, max_size=14, unique_by=lambda p: (p.isolation, p.batch)),
).map(lambda pair: [pair[0], *pair[1]])


@given(measured, limits)
def test_the_choice_keeps_the_limits_is_the_smallest_near_the_best_and_packed_only_if_it_earns_it(
    found: list[P], bounds: Limits
) -> None:
    kept = [p for p in found if bounds.kept_by(p)]
    if not kept:
        with pytest.raises(NothingKept):
            choose(found, bounds)
        return
    choice = choose(found, bounds)
    exact = [p for p in kept if p.isolation == "exact"]
    packed = [p for p in kept if p.isolation == "packed" or p.batch == 1]
    best = {
        "exact": max((p.videos_per_hour for p in exact), default=0.0),
        "packed": max((p.videos_per_hour for p in packed), default=0.0),
    }
    own = exact if choice.isolation == "exact" else packed
    (chosen,) = [p for p in own if p.batch == choice.batch]
    assert bounds.kept_by(chosen)
    assert chosen.videos_per_hour >= NEAR_BEST * best[choice.isolation]
    assert all(p.videos_per_hour < NEAR_BEST * best[choice.isolation] for p in own if p.batch < choice.batch)
    assert (choice.isolation == "packed") == (best["packed"] > PACKED_MUST_WIN * best["exact"])
    assert choice.batch == (choice.exact_batch if choice.isolation == "exact" else choice.packed_batch)
    assert choice.why.endswith(".")


def test_large_videos_run_alone_and_the_sentence_says_why() -> None:
    choice = choose(points({1: 100, 2: 103, 4: 104}, {2: 102, 4: 101}))
    assert (choice.batch, choice.isolation) == (1, "exact")
    assert "one video keeps the device busy already: the best of the larger ones gives only 4% more" in choice.why


def test_packed_must_win_by_more_than_ten_percent() -> None:
    assert choose(points({1: 100}, {2: 110})).isolation == "exact"
    choice = choose(points({1: 100}, {2: 112}))
    assert (choice.isolation, choice.batch, choice.exact_batch) == ("packed", 2, 1)
    assert "packed is 12% faster than exact" in choice.why


def test_the_smallest_batch_near_the_best_is_chosen_not_the_best() -> None:
    choice = choose(points({1: 100, 2: 180, 4: 196, 8: 200}))
    assert choice.batch == 4
    assert "1.96 times the throughput of one alone, and 98% of the best, which takes a batch of 8" in choice.why


def test_limits_that_nothing_keeps_are_refused_with_what_there_is() -> None:
    found = [P("exact", 1, 100, 36.0, 3 * GIB), P("exact", 2, 150, 50.0, 4 * GIB)]
    with pytest.raises(NothingKept, match=r"--max-latency is 10 s, and even batch size 1 takes 36 s"):
        choose(found, Limits(max_latency=10))
    with pytest.raises(NothingKept, match=r"--max-memory is 2 GiB, and even batch size 1 takes 3 GiB"):
        choose(found, Limits(max_memory=2 * GIB))
    assert choose(found, Limits(max_latency=40)).batch == 1
    assert "larger ones break a limit (2)" in choose(found, Limits(max_latency=40)).why
    with pytest.raises(ValueError, match="--max-latency is 0"):
        Limits(max_latency=0)
    with pytest.raises(ValueError, match="nothing was measured"):
        choose([])
