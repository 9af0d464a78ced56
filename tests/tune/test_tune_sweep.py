"""A sweep over batch sizes: growing, limits, offload, and what a stop leaves."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tuning import AMPLE, CPU, GIB, little_memory, request, small

from reelbatch.loading.inspection import ModelInfo
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.loading.published import HUNYUANVIDEO_13B
from reelbatch.loading.skeleton import from_published
from reelbatch.memory.estimate import Estimator
from reelbatch.tune import profiles, report, run, workload
from reelbatch.tune.baseline import prepare
from reelbatch.tune.choose import Limits
from reelbatch.tune.measure import Stopped, observe
from reelbatch.tune.results import Update
from reelbatch.tune.sweep import Sweep
from reelbatch.tune.workload import frames_of
from reelbatch.tune.write import write

SHALLOW = {
    **HUNYUANVIDEO_13B.configs,
    "transformer": {"num_layers": 4, "num_single_layers": 8, "num_refiner_layers": 1},
    "text_encoder": {**HUNYUANVIDEO_13B.configs["text_encoder"], "num_hidden_layers": 4},
    "text_encoder_2": {**HUNYUANVIDEO_13B.configs["text_encoder_2"], "num_hidden_layers": 2},
}
"""HunyuanVideo with fewer layers of the same width: enough weights that each offload takes less, and traced sooner."""


class Clock:
    """Time that passes only by ticks, each time that it is looked at: by default none, so that no budget ends."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_a_sweep_measures_both_isolations_and_exact_is_equal_to_the_bit(model: Model, info: ModelInfo) -> None:
    swept = Sweep(model, small(info, frames=5), budget=1000, largest=3, clock=Clock()).run()
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


def test_growing_stops_before_the_memory_limit(model: Model, info: ModelInfo) -> None:
    found = Sweep(model, small(info), budget=1000, largest=8, memory_limit=2**20, clock=Clock()).run()
    assert {p.batch for p in found.points} == {1}
    assert found.choice is None
    assert "Only batch size 1 was measured" in found.why_none and "give --batch-size 1" in found.why_none
    assert any(
        "stopped before 2: it would take up to" in note and "the limit is 1.00 MiB" in note for note in found.notes
    )


def test_growing_stops_where_memory_ran_out_and_lives(
    model: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_memory(model, 2, monkeypatch)
    found = Sweep(model, small(info), budget=1000, largest=8, clock=Clock()).run()
    assert {p.batch for p in found.points} == {1, 2}
    assert any("stopped before 3: memory ran out" in note for note in found.notes)


def test_a_model_of_which_not_one_video_fits_is_said_to_be_so(
    model: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_memory(model, 0, monkeypatch)
    with pytest.raises(MemoryError, match="not even one video fits"):
        Sweep(model, small(info), budget=10).run()


def test_the_budget_is_kept_and_one_alone_is_measured_whatever_it_is(model: Model, info: ModelInfo) -> None:
    clock = Clock()
    told: list[Update] = []

    def tell(update: Update) -> None:
        told.append(update)
        clock.now += 1.0

    found = Sweep(model, small(info, 32), budget=12, largest=32, on_update=tell, clock=clock).run()
    assert found.points
    assert clock.now < 12 + 4
    assert any("--budget" in note for note in found.notes)
    assert all(0 <= update.left <= 12 for update in told if update.at_most)
    late = Sweep(model, small(info), budget=1, clock=Clock(10.0)).run()
    assert [p.batch for p in late.points] == [1]
    assert late.choice is None and late.too_little
    assert "Only batch size 1 was measured, which says nothing of other sizes" in late.why_none
    assert re.search(r"reelbatch tune --budget \d+m$", late.why_none)


def test_on_the_cpu_the_writing_of_files_is_part_of_what_a_video_takes(
    model: Model, info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelbatch.tune.comparison.write_seconds", lambda _: 100.0)
    found = Sweep(model, small(info), budget=1000, largest=2, clock=Clock()).run()
    assert all(100 < point.seconds_per_video < 200 for point in found.points)
    assert all(point.last_video_seconds < 100 for point in found.points)


def test_a_limit_of_latency_ends_the_growing(model: Model, info: ModelInfo) -> None:
    found = Sweep(model, small(info), budget=10, limits=Limits(max_latency=1e-6), clock=Clock()).run()
    assert {p.batch for p in found.points} == {1}
    assert found.choice is None
    assert "--max-latency is 1e-06 s" in found.why_none


def test_what_was_measured_is_kept_when_a_person_stops(model: Model, info: ModelInfo) -> None:
    stop = False

    def tell(update: Update) -> None:
        nonlocal stop
        stop |= update.done and "batch size 2, packed" in update.text

    found = Sweep(model, small(info), budget=1000, on_update=tell, stopping=lambda: stop, clock=Clock()).run()
    assert found.interrupted
    assert {(p.isolation, p.batch) for p in found.points} == {("exact", 1), ("exact", 2), ("packed", 2)}
    assert "measured only" in found.why_none  # two repeats have no spread
    with pytest.raises(Stopped):
        observe(model, small(info).take(1), "exact", 1, stopping=lambda: True)


def test_a_mix_of_shapes_and_steps_is_measured_as_it_is(model: Model, info: ModelInfo) -> None:
    requests = [request(frames=1, steps=2), request(frames=5, steps=4), request(frames=1, steps=4, width=48)]
    mix = workload.of_mix([r.for_model(info.limits) for r in requests], "p.csv")
    sweep = Sweep(model, mix, budget=1000, largest=2, clock=Clock())
    prepare(sweep)
    assert set(sweep.measured.decodes) == {frames_of(r) for r in mix.requests}  # no matter what repeats come to
    found = sweep.run()
    assert {p.batch for p in found.points} == {1, 2}
    assert all(p.quality.equal for p in found.points if p.isolation == "exact" and p.quality)


def test_the_first_offload_that_fits_by_the_plans_estimate_is_taken(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = cache(partial(from_published, replace(HUNYUANVIDEO_13B, configs=SHALLOW)))
    monkeypatch.setattr(run, "from_folder", lambda folder, precision, device: family(precision, device))
    monkeypatch.setattr(run, "Estimator", cache(Estimator))  # traced once, as it takes seconds
    large = request(height=256, width=256, frames=17, vae_tiling=0)
    asked = [workload.Workload("w", "s", (large,), 1)]
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    bf16, int8 = Precision.parse("bf16", cuda), Precision.parse("int8", cuda)

    def peak(kind: str, device: torch.device) -> int:
        return run.Estimator(family(bf16, device), "exact", device).plan([large], kind).peak

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
    enough = Limits(max_memory=peak("block", cpu) + GIB)  # with what the process holds
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
    found = run.Tuning(info, [small(info, 2)], CPU, dtypes=["fp32"], budget=AMPLE, largest=2).run()
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
    assert found.line.startswith(f"batch size {found.batch_size}, offload block: as tuned for 32×32×1 on ")
    other = profiles.advice([kept.identity], "exact", 8, "none")
    assert other.batch_size == 8
    assert other.offload == "none"
    assert "it was measured with --offload block, and this is none" in other.line
    assert profiles.advice([kept.identity], "exact", 8, "block") == found


def test_offload_can_be_asked_for_and_what_cannot_be_is_refused(
    info: ModelInfo, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "first_that_fits", lambda *_: pytest.fail("it was said"))
    found = run.Tuning(info, [small(info, 1)], CPU, budget=AMPLE, largest=1, offload="block", keep=False).run()
    assert found.sweeps[0].offload == "block"
    assert not found.notes or "estimated" not in found.notes[0]
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="use offload 'block'"):
        run.Tuning(info, [small(info, 1)], CPU, offload="component").run()
    with pytest.raises(ValueError, match="8-bit weights cannot be offloaded to disk"):
        run.Tuning(info, [small(info, 1)], CPU, dtypes=["fp32", "int8"], offload="block").run()
