"""`reelbatch tune`: what is measured, what is chosen, what is kept and what is shown."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.engine.config import EngineConfig
from reelbatch.loading.inspection import ModelInfo, inspect
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import hunyuanvideo_13b
from reelbatch.memory.estimate import Estimator
from reelbatch.memory.gauge import memory_of
from reelbatch.request import RequestError, VideoRequest
from reelbatch.tune import baseline, bench, comparison, gauges, profiles, repeats, report, run, workload
from reelbatch.tune.choose import NEAR_BEST, PACKED_MUST_WIN, Limits, NothingKept, choose
from reelbatch.tune.figures import MemorySplit, Point, Repeat, Spread, extrapolate, is_steady
from reelbatch.tune.measure import DoesNotFit, Stopped, observe
from reelbatch.tune.quality import Alone, Quality, attributes, compare, psnr, ssim
from reelbatch.tune.results import Check, SweepResult, Update
from reelbatch.tune.sweep import Sweep
from reelbatch.tune.write import write
from reelbatch.video import Video

GIB = 2**30
CPU = EngineConfig(device="cpu")


@pytest.fixture(scope="module")
def info(tiny_folder: Path) -> ModelInfo:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def components(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", "float32")


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MOST_REPEATS", 3)
    monkeypatch.setattr(comparison, "COMPARED", ((2, 1.0), (1, 0.0)))
    monkeypatch.setattr(baseline, "matrix_rate", lambda *_: 1e11)


class Clock:
    """Time that passes only by ticks, each time that it is looked at: by default none, so that no budget ends."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REELBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str | Path):
    return CliRunner().invoke(app, [str(word) for word in words])


# -- choosing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class P:
    isolation: str
    batch: int
    videos_per_hour: float
    last_video_seconds: float = 1.0
    peak_bytes: int = GIB


def points(exact: dict[int, float], packed: dict[int, float] | None = None) -> list[P]:
    return [P("exact", b, v) for b, v in exact.items()] + [P("packed", b, v) for b, v in (packed or {}).items()]


rates = st.floats(0.1, 1e5)
sizes = st.integers(2, 64)
figures = st.builds(
    P, st.sampled_from(["exact", "packed"]), sizes, rates, st.floats(0.01, 1e4), st.integers(1, 80 * GIB)
)
measured = st.tuples(
    st.builds(P, st.just("exact"), st.just(1), rates, st.floats(0.01, 1e4), st.integers(1, 80 * GIB)),
    st.lists(figures, max_size=14, unique_by=lambda p: (p.isolation, p.batch)),
).map(lambda pair: [pair[0], *pair[1]])
limits = st.builds(Limits, st.none() | st.floats(0.01, 1e4), st.none() | st.integers(1, 80 * GIB))


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


# -- extrapolating ---------------------------------------------------------------------------------


def request(**fields) -> VideoRequest:
    return VideoRequest(**{"prompt": "a cat", "seed": 1, "height": 32, "width": 32, "frames": 9, "steps": 10, **fields})


def test_a_full_run_is_text_and_all_steps_and_the_decoding_of_each() -> None:
    waves = [[request(), request()]]
    found = extrapolate(waves, Repeat(((0.5, (2.0, 9.0, 2.0)),)), lambda _: 3.0)
    assert (found.first, found.last) == (0.5 + 20 + 3, 0.5 + 20 + 6)
    assert found.per_video == found.last / 2
    assert found.per_step == 2.0  # a disturbed step does not move a median
    written = extrapolate(waves, Repeat(((0.5, (2.0, 9.0, 2.0)),)), lambda _: 3.0, lambda _: 0.25)
    assert written.per_video == found.per_video + 0.25
    assert (written.first, written.last) == (found.first, found.last)


def test_requests_of_different_length_share_steps_while_the_next_take_free_places() -> None:
    waves = [[request(steps=10), request(steps=30)]]
    found = extrapolate(waves, Repeat(((0.0, (1.0,)),)), lambda _: 0.0)
    assert (found.first, found.last) == (10.0, 30.0)
    assert found.per_video == 10.0  # 40 steps of a sample, two at a time, for two videos


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(1, 50), st.floats(0, 5), st.integers(1, 8))
def test_constant_steps_extrapolate_without_error(step: list[float], steps: int, decode: float, batch: int) -> None:
    waves = [[request(steps=steps)] * batch for _ in step]
    found = extrapolate(waves, Repeat(tuple((0.0, (s, s)) for s in step)), lambda _: decode)
    whole = sum(s * steps + batch * decode for s in step)
    assert found.per_video * batch * len(step) == pytest.approx(whole)


def test_repeats_pool_their_steps_wave_by_wave() -> None:
    pooled = Repeat.pooled([Repeat(((1.0, (2.0,)), (1.0, (5.0,)))), Repeat(((3.0, (4.0,)), (1.0, (6.0,))), watts=7.0)])
    assert pooled.waves == ((2.0, (2.0, 4.0)), (1.0, (5.0, 6.0)))
    assert pooled.watts == 7.0


def test_a_median_is_steady_when_more_repeats_would_hardly_move_it() -> None:
    assert not is_steady([1.0, 1.0])
    assert is_steady([1.0, 1.001, 0.999])
    assert is_steady([1.0, 1.0, 1.001, 9.0])
    assert not is_steady([1.0, 2.0, 3.0])
    assert Spread.of([1.0, 1.1, 1.2, 9.0]).high < 9.0


# -- quality ---------------------------------------------------------------------------------------


def video(frames: np.ndarray, latents: torch.Tensor | None = None) -> Video:
    return Video(request(), frames, {}, latents)


def test_equality_looks_at_every_bit_and_distance_at_the_worst_video() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (3, 32, 32, 3), dtype=np.uint8) for _ in range(2)]
    alone = Alone(tuple(video(f, torch.zeros(2)) for f in frames), 10, True, "float32 alone")
    same = compare([video(f, torch.zeros(2)) for f in frames], alone, alone)
    assert (same.equal, same.largest, same.psnr) == (True, 0, None)
    assert same.ssim == pytest.approx(1, abs=1e-9)
    assert not compare([video(f, torch.full((2,), 1e-7)) for f in frames], alone, alone).equal
    off = frames[1].copy()
    off[0, 0, 0, 0] ^= 1
    found = compare([video(frames[0], torch.zeros(2)), video(off, torch.zeros(2))], alone, alone)
    assert (found.equal, found.largest) == (False, 1)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 * off.size))


def test_distances_are_those_of_the_textbook() -> None:
    black, grey = np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 32, 32, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))
    c1 = (0.01 * 255) ** 2
    assert ssim(black, grey) == pytest.approx(c1 / (51**2 + c1), rel=1e-6)
    assert ssim(black[:, :8, :8], grey[:, :8, :8]) is None


def test_another_dtype_is_compared_with_the_reference_and_equal_to_its_own() -> None:
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    own = Alone((video(frames + 4),), 10, True, "bfloat16 alone")
    reference = Alone((video(frames),), 10, True, "float32 alone")
    found = compare([video(frames + 4)], own, reference)
    assert (found.equal, found.largest, found.against) == (True, 4, "float32 alone")


def test_attributes_are_read_back_from_frames() -> None:
    from reelbatch.demo import shapes

    scene = shapes.Scene("red", "circle", "large", "left", "black")
    clip = shapes.draw(scene, 64, 64, 9)
    assert attributes([clip], [scene]) == 1.0
    assert attributes([clip], [replace(scene, color="blue")]) == 0.8


# -- workloads -------------------------------------------------------------------------------------


def test_a_shape_gives_requests_that_differ_and_waves_of_any_size(info: ModelInfo) -> None:
    one = workload.of_shape(info, {"width": 48, "height": 32, "frames": 5}, 32)
    assert (one.name, one.shapes, one.period) == ("48×32, 5 frames, 3 steps", "48×32×5", 1)
    assert len({(r.prompt, r.seed) for r in one.requests}) == 32
    assert [len(wave) for wave in one.waves(16)] == [16]
    guided = workload.of_shape(info, {"negative_prompt": "", "true_cfg": 2.0}, 2)
    assert guided.shapes == "32×32×9 cfg"
    with pytest.raises(RequestError, match="width=50 must be a multiple of 16"):
        workload.of_shape(info, {"width": 50}, 1)


def test_a_mix_is_represented_with_its_largest_and_every_wave_covers_it(info: ModelInfo) -> None:
    small, large = request(), request(width=64)
    mix = workload.of_mix([small] * 30 + [large] + [small] * 9, "p.csv")
    assert len(mix.requests) == mix.period == 8
    assert sum(r.width == 64 for r in mix.requests) == 1
    assert mix.shapes == "32×32×9 + 64×32×9"
    for batch in (1, 3, 8, 16):
        waves = mix.waves(batch)
        assert all(len(wave) == batch for wave in waves)
        assert any(r.width == 64 for wave in waves for r in wave)
        assert all(len({r.id for r in wave}) == batch for wave in waves)
    assert workload.of_mix([small] * 20, "p.csv").period == 1


@pytest.mark.parametrize("text", ["64", "64x64", "64x64x9x2", "axbxc", ""])
def test_a_shape_that_is_none_is_refused_with_how_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match="expected WIDTHxHEIGHTxFRAMES"):
        workload.parse_shape(text)
    assert workload.parse_shape("1280×720x129") == {"width": 1280, "height": 720, "frames": 129}


# -- gauges ----------------------------------------------------------------------------------------


def test_the_resident_set_sees_a_peak_that_is_gone() -> None:
    memory = memory_of(torch.device("cpu"))
    memory.reset()
    before = memory.used()
    torch.ones(2**26).sum()  # 256 MiB
    assert memory.peak() - before > 200 * 2**20
    assert memory.limit() > memory.used()


def test_the_processors_energy_counts_on_over_a_wrap(tmp_path: Path) -> None:
    assert gauges._cpu_joules(tmp_path / "none") is None
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("999999")
    (package / "energy_uj").write_text("900000")
    joules = gauges._cpu_joules(tmp_path)
    (package / "energy_uj").write_text("400000")
    assert joules() == pytest.approx(0.5)


def test_work_of_our_own_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    times = psutil.cpu_times()
    others = gauges.Neighbours()
    monkeypatch.setattr(others, "_started", time.perf_counter() - 10.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda: times._replace(user=times.user + 1e6))
    assert others.cores() == pytest.approx(1e5, rel=0.1)
    monkeypatch.setattr(psutil, "cpu_times", lambda: times._replace(idle=times.idle + 1e6))
    assert others.cores() < 1.0


def test_the_matrix_rate_is_that_of_some_machine() -> None:
    assert 1e8 < gauges.matrix_rate(torch.device("cpu"), torch.float32, 0.05) < 1e15


def test_flops_are_those_of_the_matrix_products() -> None:
    layer = torch.nn.Linear(32, 64, bias=False)
    with gauges.counting([layer]) as flops, torch.no_grad():
        layer(torch.ones(10, 32))
        assert flops() == 2 * 10 * 32 * 64


# -- measuring -------------------------------------------------------------------------------------


def test_a_run_tells_its_steps_its_decoding_and_its_videos(components: Model, info: ModelInfo) -> None:
    requests = workload.of_shape(info, {}, 4).take(3)
    seen = observe(components, requests, "packed", 3)
    assert len(seen.steps) == 3
    assert set(seen.decodes) == set(seen.videos) == {"0", "1", "2"}
    assert 0 < seen.first < seen.last <= seen.seconds
    few = observe(components, requests, "exact", 3, only_steps=2)
    assert len(few.steps) == 2
    assert not few.videos


def test_a_batch_that_the_engine_had_to_divide_does_not_count(
    components: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    _little_memory(components, 2, monkeypatch)
    requests = workload.of_shape(info, {}, 4).take(4)
    with pytest.raises(DoesNotFit, match="in 3 parts"):
        observe(components, requests, "exact", 4)
    observe(components, requests[:2], "exact", 2)


def _little_memory(components: Model, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which no more than so many samples fit into a step."""
    forward = components.family.transformer.forward

    def limited(*args, packs, **kwargs):
        if sum(map(len, packs)) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, packs=packs, **kwargs)

    monkeypatch.setattr(components.family.transformer, "forward", limited)


def small(info: ModelInfo, largest: int = 4, **fields) -> workload.Workload:
    return workload.of_shape(info, {"frames": 5, **fields}, largest)


def test_a_sweep_measures_both_isolations_and_exact_is_equal_to_the_bit(components: Model, info: ModelInfo) -> None:
    swept = Sweep(components, small(info), budget=1000, largest=3, clock=Clock()).run()
    keys = {(p.isolation, p.batch) for p in swept.points}
    assert {("exact", 1), ("exact", 2), ("packed", 2)} <= keys
    assert ("packed", 1) not in keys
    for point in swept.points:
        assert point.seconds_per_step > 0
        assert point.videos_per_hour == pytest.approx(3600 / point.seconds_per_video)
        assert point.spread.repeats >= 2
        assert 0 < point.first_video_seconds <= point.last_video_seconds
        assert point.memory.weights > 0
        assert point.memory.peak >= point.memory.weights
        assert point.flops > 0
        assert point.joules_per_video is None or point.joules_per_video > 0
        assert point.quality.steps == 3
        assert point.quality.equal or point.isolation == "packed"
        assert point.quality.largest <= 2
    assert swept.choice is not None
    assert swept.chosen in swept.points
    assert swept.check is not None
    assert swept.check.took > 0
    assert swept.check.error == pytest.approx(swept.check.promised / swept.check.took - 1)


def test_growing_stops_before_the_memory_limit(components: Model, info: ModelInfo) -> None:
    found = Sweep(components, small(info), budget=1000, largest=8, memory_limit=2**20, clock=Clock()).run()
    assert {p.batch for p in found.points} == {1}
    assert found.choice.batch == 1
    assert any(
        "stopped before 2: it would take up to" in note and "the limit is 0.00 GiB" in note for note in found.notes
    )


def test_growing_stops_where_memory_ran_out_and_lives(
    components: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    _little_memory(components, 2, monkeypatch)
    found = Sweep(components, small(info), budget=1000, largest=8, clock=Clock()).run()
    assert {p.batch for p in found.points} == {1, 2}
    assert any("stopped before 3: memory ran out" in note for note in found.notes)


def test_a_model_of_which_not_one_video_fits_is_said_to_be_so(
    components: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    _little_memory(components, 0, monkeypatch)
    with pytest.raises(MemoryError, match="not even one video fits"):
        Sweep(components, small(info), budget=10).run()


def test_the_budget_is_kept_and_one_alone_is_measured_whatever_it_is(components: Model, info: ModelInfo) -> None:
    clock = Clock()
    told: list[Update] = []

    def tell(news: Update) -> None:
        told.append(news)
        clock.now += 1.0

    found = Sweep(components, small(info, 32), budget=12, largest=32, on_update=tell, clock=clock).run()
    assert found.points
    assert clock.now < 12 + 4
    assert any("--budget" in note for note in found.notes)
    assert all(0 <= news.left <= 12 for news in told if news.at_most)
    late = Sweep(components, small(info), budget=1, clock=Clock(10.0)).run()
    assert [p.batch for p in late.points] == [1]
    assert late.choice.why.startswith("no larger batch was measured")


def test_on_the_cpu_the_writing_of_files_is_part_of_what_a_video_takes(
    components: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelbatch.tune.comparison.write_seconds", lambda _: 100.0)
    found = Sweep(components, small(info), budget=1000, largest=2, clock=Clock()).run()
    assert all(100 < point.seconds_per_video < 200 for point in found.points)
    assert all(point.last_video_seconds < 100 for point in found.points)


def test_a_limit_of_latency_ends_the_growing(components: Model, info: ModelInfo) -> None:
    found = Sweep(components, small(info), budget=10, limits=Limits(max_latency=1e-6), clock=Clock()).run()
    assert {p.batch for p in found.points} == {1}
    assert found.choice is None
    assert "--max-latency is 1e-06 s" in found.why_none


def test_what_was_measured_is_kept_when_a_person_stops(components: Model, info: ModelInfo) -> None:
    stop = False

    def tell(news: Update) -> None:
        nonlocal stop
        stop |= news.done and "batch size 2, packed" in news.text

    found = Sweep(components, small(info), budget=30, on_update=tell, stopping=lambda: stop).run()
    assert found.interrupted
    assert {(p.isolation, p.batch) for p in found.points} == {("exact", 1), ("exact", 2), ("packed", 2)}
    assert found.choice is not None
    with pytest.raises(Stopped):
        observe(components, small(info).take(1), "exact", 1, stopping=lambda: True)


def test_a_mix_of_shapes_and_steps_is_measured_as_it_is(components: Model, info: ModelInfo) -> None:
    requests = [request(frames=5, steps=2), request(frames=9, steps=4), request(frames=5, steps=4, width=48)]
    mix = workload.of_mix([r.for_model(info.limits) for r in requests], "p.csv")
    found = Sweep(components, mix, budget=1000, largest=2, clock=Clock()).run()
    assert {p.batch for p in found.points} == {1, 2}
    assert all(p.quality.equal for p in found.points if p.isolation == "exact" and p.quality)


# -- profiles --------------------------------------------------------------------------------------


def profile(identity: profiles.Identity, **fields) -> profiles.Profile:
    base = {
        "batch_size": 6,
        "isolation": "packed",
        "exact_batch_size": 2,
        "packed_batch_size": 6,
        "videos_per_hour": 100.0,
        "last_video_seconds": 3.0,
        "peak_bytes": GIB,
        "why": "it is best.",
        "measured": "2026-11-01",
    }
    return profiles.Profile(identity=identity, **{**base, **fields})


@pytest.fixture
def about(tiny_folder: Path) -> profiles.Identity:
    return profiles.identity(tiny_folder, "tiny", "32×32×9", device="cpu", dtype="float32")


def test_a_profile_is_kept_found_and_replaced(cache: Path, about: profiles.Identity) -> None:
    assert profiles.find(about) == (None, None)
    path = profiles.store(profile(about))
    assert path.is_relative_to(cache)
    assert profiles.find(about).profile.batch_size == 6
    profiles.store(profile(about, batch_size=4, packed_batch_size=4))
    assert profiles.find(about).profile.batch_size == 4
    assert len(profiles.stored()) == 1
    assert profiles.stale(profiles.find(about).profile) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"versions": {"torch": "1.0"}}, "it was measured with torch 1.0, and this is"),
        ({"weights": "0" * 64}, "the model's weights are others now"),
        ({"device": "cuda: another"}, "it is of the device 'cuda: another'"),
        ({"dtype": "bfloat16"}, "it is of bfloat16, and this is float32"),
        ({"shapes": "64×64×9"}, "it is of 64×64×9, and this is 32×32×9"),
        ({"attention": "math"}, "it is of --attention math, and this is auto"),
    ],
)
def test_a_stale_or_foreign_profile_is_refused_with_the_reason(
    cache: Path, about: profiles.Identity, change: dict, reason: str
) -> None:
    profiles.store(profile(about.model_copy(update=change)))
    found = profiles.find(about)
    assert found.profile is None
    assert reason in found.refused
    size, line, _ = profiles.advice([about], "exact", 8)
    assert size == 8
    assert reason in line
    if "versions" in change or "device" in change:
        kept = profiles.stored()[0][1]
        assert profiles.stale(kept)
        assert profiles.stale_in_short(kept)
    assert "run `reelbatch tune`" in line


def test_other_models_profiles_are_nothing_to_speak_of(cache: Path, about: profiles.Identity) -> None:
    profiles.store(profile(about.model_copy(update={"model": "another"})))
    assert profiles.find(about) == (None, None)
    assert profiles.advice([about], "exact", 8) == (8, None, "none")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', "\x00", '{"batch_size": 0}'])
def test_a_damaged_profile_is_refused_with_its_name(cache: Path, about: profiles.Identity, text: str) -> None:
    path = profiles.store(profile(about))
    path.write_text(text)
    found = profiles.find(about)
    assert found.profile is None
    assert path.name in found.refused
    assert "is damaged or of another version" in found.refused


def test_a_profile_changes_the_batch_size_and_never_the_isolation(cache: Path, about: profiles.Identity) -> None:
    profiles.store(profile(about))
    size, line, _ = profiles.advice([about], "exact", 8)
    assert size == 2
    assert "packed was faster there (--isolation packed, batch size 6)" in line
    assert profiles.advice([about], "packed", 8)[0] == 6


def test_a_mix_takes_the_smallest_batch_of_its_shapes_if_all_are_known(cache: Path, about: profiles.Identity) -> None:
    parts = [about.model_copy(update={"shapes": shapes}) for shapes in ("32×32×9", "64×64×9")]
    mix = about.model_copy(update={"shapes": "32×32×9 + 64×64×9"})
    profiles.store(profile(parts[0], exact_batch_size=4))
    assert profiles.advice([mix, *parts], "exact", 8)[0] == 8
    profiles.store(profile(parts[1], exact_batch_size=3))
    assert profiles.advice([mix, *parts], "exact", 8)[0] == 3
    profiles.store(profile(mix, exact_batch_size=5))
    assert profiles.advice([mix, *parts], "exact", 8)[0] == 5


def test_other_weights_have_another_hash(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    before = profiles.weights_hash(copy)
    assert before == profiles.weights_hash(tiny_folder)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert profiles.weights_hash(copy) != before


def test_the_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REELBATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profiles.cache_folder().name == "reelbatch"
    monkeypatch.setenv("REELBATCH_CACHE", str(tmp_path / "mine"))
    assert profiles.cache_folder() == tmp_path / "mine"


# -- offload ---------------------------------------------------------------------------------------


def test_the_first_offload_that_fits_by_the_plans_estimate_is_taken(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "from_folder", lambda folder, precision, device: hunyuanvideo_13b(precision, device))
    large = request(height=544, width=960, frames=97)
    asked = [workload.Workload("w", "s", (large,), 1)]
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    bf16, int8 = Precision.parse("bf16", cuda), Precision.parse("int8", cuda)

    def peak(kind: str, device: torch.device) -> int:
        return Estimator(hunyuanvideo_13b(bf16, device), "exact", device, kind).plan([large]).peak

    peaks = [peak(kind, cuda) for kind in ("none", "component", "block")]
    assert sorted(peaks, reverse=True) == peaks
    for available, kind, told in (
        (peaks[0], "none", None),
        (peaks[0] - 1, "component", "Measured with --offload component (bfloat16): one video is estimated to take "),
        (peaks[1] - 1, "block", "Measured with --offload block"),
        (peaks[2] - 1, "none", "One video is estimated to take "),
    ):
        found, why = run.first_that_fits(info, asked, cuda, bf16, Limits(max_memory=available))
        assert found == kind
        assert why == told if told is None else why.startswith(told)
        monkeypatch.setattr(run, "device_memory_bytes", lambda device, have=available: have)
        assert run.first_that_fits(info, asked, cuda, bf16, Limits()) == (found, why)
    monkeypatch.setattr(run, "held_bytes", lambda device: GIB)
    enough = Limits(max_memory=peak("component", cpu) + GIB)  # with what the process holds
    assert run.first_that_fits(info, asked, cpu, bf16, enough)[0] == "block"  # there is no component on the CPU
    assert run.first_that_fits(info, asked, cpu, int8, Limits(max_memory=GIB))[0] == "none"


def test_a_sweep_with_offload_says_so_everywhere_and_keeps_it(
    info: ModelInfo, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: list[str] = []
    first = run.first_that_fits

    def short_of_memory(*args: object) -> tuple[str, str]:
        free.append(first(*args)[0])
        return "block", "Measured with --offload block (float32): one video is estimated to take more."

    monkeypatch.setattr(run, "first_that_fits", short_of_memory)
    found = run.Tuning(info, [small(info, 2)], CPU, dtypes=["fp32"], budget=6, largest=2).run()
    assert free == ["none"]  # this model fits this machine
    (swept,) = found.sweeps
    assert swept.offload == "block"
    assert {point.batch for point in swept.points} >= {1, 2}
    assert all(p.quality.equal for p in swept.points if p.isolation == "exact" and p.quality)
    assert all(point.memory.weights == 0 for point in swept.points)
    assert report.record(found)["sweeps"][0]["offload"] == "block"
    page = write(found, tmp_path / "o")["html"].read_text(encoding="utf-8")
    assert " --offload block</code></p>" in page
    assert "isolation, offload block</div>" in page
    console = Console(width=100, record=True, file=open(tmp_path / "t", "w"))  # noqa: SIM115
    console.print(report.terminal(found, 100))
    text = console.export_text()
    assert ", 3 steps, offload block" in text
    assert f"Use --batch-size {swept.choice.batch} --offload block, " in text
    assert "only the weights of the block at work are on the device" in text
    assert "estimated to take more" in text
    ((_, kept),) = profiles.stored()
    assert kept.offload == "block"
    found = profiles.advice([kept.identity], "exact", 8)
    assert (found.batch_size, found.offload) == (swept.choice.exact_batch, "block")
    assert found.line.startswith(f"batch size {found.batch_size}, offload block: as tuned for 32×32×5 on ")
    other = profiles.advice([kept.identity], "exact", 8, "none")
    assert other.batch_size == 8
    assert other.offload == "none"
    assert "it was measured with --offload block, and this is none" in other.line
    assert profiles.advice([kept.identity], "exact", 8, "block") == found


def test_offload_can_be_asked_for_and_what_cannot_be_is_refused(
    info: ModelInfo, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "first_that_fits", lambda *_: pytest.fail("it was said"))
    found = run.Tuning(info, [small(info, 1)], CPU, budget=3, largest=1, offload="block", keep=False).run()
    assert found.sweeps[0].offload == "block"
    assert not found.notes or "estimated" not in found.notes[0]
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="use offload 'block'"):
        run.Tuning(info, [small(info, 1)], CPU, offload="component").run()
    with pytest.raises(ValueError, match="8-bit weights cannot be offloaded to disk"):
        run.Tuning(info, [small(info, 1)], CPU, dtypes=["fp32", "int8"], offload="block").run()


def test_a_profile_of_before_there_was_offload_is_read_and_a_mix_takes_what_fits_all(
    cache: Path, about: profiles.Identity
) -> None:
    path = profiles.store(profile(about))
    old = json.loads(path.read_text(encoding="utf-8"))
    del old["offload"]
    path.write_text(json.dumps(old), encoding="utf-8")
    assert profiles.find(about).profile.offload == "none"
    assert profiles.advice([about], "exact", 8).offload == "none"
    path.write_text(json.dumps(old | {"offload": "layer"}), encoding="utf-8")
    assert "is damaged or of another version (offload:" in profiles.find(about).refused
    parts = [about.model_copy(update={"shapes": shapes}) for shapes in ("32×32×9", "64×64×9")]
    profiles.store(profile(parts[0], exact_batch_size=4))
    profiles.store(profile(parts[1], exact_batch_size=6, offload="block"))
    mix = about.model_copy(update={"shapes": "32×32×9 + 64×64×9"})
    found = profiles.advice([mix, *parts], "exact", 8)
    assert (found.batch_size, found.offload) == (4, "block")


def test_generate_takes_the_tuned_offload_unless_told_otherwise(tiny_folder: Path, here: Path) -> None:
    tuned = profiles.identity(tiny_folder, inspect(tiny_folder).name, "32×32×5", device="cpu")
    profiles.store(profile(tuned, exact_batch_size=2, isolation="exact", offload="block"))
    asked = ("generate", "a cat", "a dog", "--model", tiny_folder, "--device", "cpu", "--frames", "5", "--json")

    def made(out: str, *words: str) -> tuple[set[str], str]:
        result = call(*asked, *words, "--out", out)
        assert result.exit_code == 0, result.output
        return {json.loads(line)["offload"] for line in result.stdout.splitlines()}, result.stderr

    offload, told = made("o1")
    assert offload == {"block"}
    assert "batch size 2, offload block: as tuned" in told
    assert made("o2", "--batch-size", "2")[0] == {"none"}
    offload, told = made("o3", "--offload", "none")
    assert offload == {"none"}
    assert "the stored profile is not used: it was measured with --offload block" in told
    assert made("o4", "--offload", "block", "--batch-size", "1")[0] == {"block"}
    refused = call(*asked, "--offload", "component", "--out", "o5")
    assert "use offload 'block'" in str(refused.exception)


# -- what is shown ---------------------------------------------------------------------------------


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
    wild = made_up_sweep(points=(replace(made_up(1), spread=Spread(3.6, 2.0, 9.0, 5)),))
    wild = replace(wild, choice=choose(wild.points))
    assert "±97%" in report.unquiet([wild])
    assert report.unquiet([made_up_sweep()]) is None
    off = made_up_sweep(check=Check(4, "exact", 2.0, 3.0, 1))
    assert "a full run took another time than promised, by 33%" in report.unquiet([off])


# -- the command -----------------------------------------------------------------------------------


def test_tune_measures_keeps_and_generate_takes_it(tiny_folder: Path, here: Path) -> None:
    words = ("--model", tiny_folder, "--shape", "32x32x5", "--budget", "4s", "--max-batch", "3", "--out", "t")
    result = call("tune", *words, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["sweeps"]
    assert found["workload"] == "32×32, 5 frames, 3 steps"
    assert "left)" in result.stderr
    assert (here / "t" / "tune.html").is_file()
    asked = ("generate", "a cat", "a dog", "--model", tiny_folder, "--frames", "5", "--out", "o", "--json")
    made = call(*asked)
    assert made.exit_code == 0
    size = found["choice"]["exact_batch"]
    assert f"batch size {size}: as tuned for 32×32×5 on" in made.stderr
    largest = {json.loads(line)["batch"]["largest"] for line in made.stdout.splitlines()}
    assert max(largest) == min(size, 2)
    other = call(*asked[:-3], "--out", "o2", "--json", "--width", "48")
    assert "batch size 8: the stored profile is not used: it is of 32×32×5, and this is 48×32×5" in other.stderr
    own = call(*asked[:-3], "--out", "o3", "--json", "--batch-size", "1")
    assert "batch size" not in own.stderr
    listed = call("tune", "--show")
    assert "32×32×5" in listed.stdout
    assert "usable" in listed.stdout
    (stored,) = json.loads(call("tune", "--show", "--json").stdout)
    assert stored["profile"]["exact_batch_size"] == size
    assert stored["problem"] is None


def test_tune_takes_a_prompt_file_and_several_dtypes(tiny_folder: Path, here: Path) -> None:
    (here / "p.csv").write_text("prompt,frames\na cat,5\na dog,9\n", encoding="utf-8")
    words = (
        "--model",
        tiny_folder,
        "--prompts",
        "p.csv",
        "--dtypes",
        "bf16,fp32",
        "--budget",
        "6s",
        "--max-batch",
        "2",
    )
    result = call("tune", *words)
    assert result.exit_code == 0, result.output
    assert "p.csv: 2 videos of 2 shapes" in result.stdout
    assert "bfloat16" in result.stdout
    saved = json.loads((here / "out" / "tune" / "tune.json").read_text(encoding="utf-8"))
    assert [s["dtype"] for s in saved["sweeps"]] == ["bfloat16", "float32"]
    compared = [p["quality"] for p in saved["sweeps"][0]["points"] if p["quality"]]
    assert {quality["against"] for quality in compared} == {"float32 alone"}
    assert any(quality["largest"] > 0 for quality in compared)


def test_other_dtypes_alone_are_compared_with_fp32_all_the_same(
    info: ModelInfo, cache: Path, tiny_folder: Path
) -> None:
    found = run.Tuning(
        info, [small(info, 1)], dtypes=["bf16"], against_fp32=True, budget=5, largest=1, keep=False
    ).run()
    (point,) = found.sweeps[0].points
    assert point.quality.against == "float32 alone"
    assert not profiles.stored()


def test_ctrl_c_leaves_what_was_measured_and_stores_nothing(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    say = bench.Bench.say

    def stopping(self, text, left=None, at_most=False, done=False):
        say(self, text, left, at_most, done)
        if done:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench.Bench, "say", stopping)
    result = call("tune", "--model", tiny_folder, "--budget", "30s", "--out", "t")
    assert result.exit_code == 130
    assert "stopped; this is what was measured until then, and no profile was stored" in result.stderr
    saved = json.loads((here / "t" / "tune.json").read_text(encoding="utf-8"))
    assert saved["interrupted"]
    assert [p["batch"] for p in saved["sweeps"][0]["points"]] == [1]
    assert not profiles.stored()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--shape", "64"), "expected WIDTHxHEIGHTxFRAMES"),
        (("--shape", "50x64x9"), "width=50 must be a multiple of 16"),
        (("--budget", "soon"), "--budget 'soon': expected a time above 0, such as 90s, 5m or 1h30m"),
        (("--max-latency", "0s"), "--max-latency '0s': expected a time above 0"),
        (("--max-memory", "much"), "memory size 'much' cannot be read"),
        (("--dtypes", ","), "names between commas"),
        (("--dtypes", "fp32,fp31"), "'fp31'"),
        (("--dtypes", "fp32", "--dtype", "bf16"), "give one of them"),
        (("--shape", "64x64x9", "--prompts", "p.txt"), "give one of them"),
        (("--steps", "0"), "steps=0 must be a whole number"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    monkeypatch.setattr("reelbatch.tune.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = call("tune", "--model", tiny_folder, *words)
    assert result.exit_code != 0
    assert told in str(result.exception)


def test_no_profile_is_listed_as_none_and_a_damaged_one_as_damaged(cache: Path, about: profiles.Identity) -> None:
    assert "no profile is stored in" in call("tune", "--show").stderr
    profiles.store(profile(about)).write_text("{")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", "--show"])
    assert "is damaged" in result.stdout


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("1.5 h", 5400)])
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert run.parse_seconds(text, "--budget") == seconds
