"""Gauges, one measured run, and its extrapolation to full videos."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tuning import little_memory, request

from reelbatch.loading.inspection import ModelInfo
from reelbatch.loading.model import Model
from reelbatch.memory.gauge import memory_of
from reelbatch.tune import gauges, workload
from reelbatch.tune.figures import Repeat, Spread, extrapolate, is_steady
from reelbatch.tune.measure import DoesNotFit, observe


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


def test_a_run_tells_its_steps_its_decoding_and_its_videos(model: Model, info: ModelInfo) -> None:
    requests = workload.of_shape(info, {}, 4).take(3)
    seen = observe(model, requests, "packed", 3)
    assert len(seen.steps) == 3
    assert set(seen.decodes) == set(seen.videos) == {"0", "1", "2"}
    assert 0 < seen.first < seen.last <= seen.seconds
    few = observe(model, requests, "exact", 3, only_steps=2)
    assert len(few.steps) == 2
    assert not few.videos


def test_a_batch_that_the_engine_had_to_divide_does_not_count(
    model: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_memory(model, 2, monkeypatch)
    requests = workload.of_shape(info, {}, 4).take(4)
    with pytest.raises(DoesNotFit, match="in 3 parts"):
        observe(model, requests, "exact", 4)
    observe(model, requests[:2], "exact", 2)


class Scripted:
    """A gauge that reads what it is given, one peak after the other."""

    what = "a script"

    def __init__(self, used: int, peaks: list[int]) -> None:
        self._used, self._peaks = used, iter(peaks)

    def used(self) -> int:
        return self._used

    def reset(self) -> None: ...

    def peak(self) -> int:
        return next(self._peaks)


def test_peaks_are_those_of_each_phase_above_what_was_held(model: Model, info: ModelInfo) -> None:
    requests = workload.of_shape(info, {}, 4).take(2)
    gauge = Scripted(1000, [1010, 1020, *(1300, 1200, 1100), 1050, 1070])  # two texts, three steps, two decodings
    trace = observe(model, requests, "exact", 2, gauge=gauge)
    assert trace.peaks == {"text": 20, "step": 300, "decode": 70}


def test_a_run_in_which_memory_ran_out_anywhere_does_not_count(
    model: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine makes the video all the same; what that took says nothing of a run with enough memory."""
    decode, calls = model.family.decode, 0

    def short(*given):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*given)

    monkeypatch.setattr(model.family, "decode", short)
    (one,) = workload.of_shape(info, {}, 1).take(1)
    with pytest.raises(DoesNotFit, match=r"memory ran out in decoding of 0, which was tried again after memory was"):
        observe(model, [one], "exact", 1)
    assert calls == 2
