"""The seam: a family that is nothing like HunyuanVideo keeps every promise of the engine, which knows a `Family`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from reelbatch import Video, VideoRequest
from reelbatch.device import OutOfMemory
from reelbatch.engine import flow
from reelbatch.engine.engine import Engine, Failure, Progress
from reelbatch.engine.fallback import Fallback
from reelbatch.engine.planner import Planner
from reelbatch.engine.runner import Runner
from reelbatch.loading.model import Model
from reelbatch.memory.placement import Placement
from reelbatch.memory.streaming import counting_fetches, groups_of
from reelbatch.models.family import Family, Phase
from reelbatch.request import RequestError

MODEL = toy.model()
FAMILY: Family = MODEL.family  # mypy: it is one

REQUESTS = st.builds(
    VideoRequest,
    prompt=st.text("abc xyz", min_size=1, max_size=12).filter(str.strip),
    negative_prompt=st.sampled_from([None, "", "bad"]),
    true_cfg=st.sampled_from([1.0, 1.5, 4.0]),
    seed=st.integers(0, 2**64 - 1),
    height=st.sampled_from([4, 8, 20]),
    width=st.sampled_from([4, 12, 36]),
    frames=st.sampled_from([1, 3, 5, 11]),
    steps=st.integers(1, 5),
    flow_shift=st.sampled_from([None, 1.0, 5.0]),
)
BATCHES = st.lists(REQUESTS, min_size=1, max_size=6, unique_by=lambda request: request.id)


def request(index: int, **fields: object) -> VideoRequest:
    return VideoRequest.model_validate({"prompt": "abcdefgh"[index], "seed": index, "id": f"r{index}"} | fields)


def make(requests: list[VideoRequest], model: Model = MODEL, **options: object) -> dict[str, Video]:
    engine = Engine(model, keep_latents=True, **options)
    return {video.request.id: video for video in engine.generate(requests)}


def ends(engine: Engine) -> dict[str, Video | Failure]:
    results = list(engine.run())
    assert len({result.request.id for result in results}) == len(results)
    return {result.request.id: result for result in results}


def assert_alone(result: Video | Failure, model: Model = MODEL) -> None:
    """It is the video that its request gives alone, bit for bit."""
    assert isinstance(result, Video), result.error
    (alone,) = make([result.request], model).values()
    assert result.latents is not None and alone.latents is not None
    assert torch.equal(result.latents, alone.latents)
    assert np.array_equal(result.frames, alone.frames)


@contextmanager
def checked(check: Callable[[Phase, list[int]], None]) -> Iterator[None]:
    """While entered, the toy asks `check` before each piece of work."""
    family = MODEL.family
    assert isinstance(family, toy.Toy)
    before, family.check = family.check, check
    try:
        yield
    finally:
        family.check = before


# -- every video in a batch is the video alone -----------------------------------------------------


def test_everything_in_a_request_shows_in_its_video() -> None:
    base = request(0)
    changes: list[dict[str, object]] = [
        {},
        {"prompt": "b"},
        {"seed": 1},
        {"steps": 2},
        {"flow_shift": 1.0},
        {"negative_prompt": "bad", "true_cfg": 3.0},
        {"negative_prompt": "worse", "true_cfg": 3.0},
        {"width": 16},
    ]
    videos = make([request(0, id=str(i), **fields) for i, fields in enumerate(changes)])
    assert videos["0"].frames.shape == (5, 8, 12, 3) and videos["0"].request.steps == 3  # the toy's own defaults
    assert len({video.frames_sha256 for video in videos.values()}) == len(changes)
    with pytest.raises(RequestError, match="width=6 must be a multiple of 4"):
        Engine(MODEL).submit(base.model_copy(update={"width": 6}))


def test_a_step_is_guided_by_both_branches() -> None:
    """`u + scale (c - u)`, one Euler step from sigma 1 to 0."""
    conditional, unconditional, guided = (
        make([request(0, steps=1, **fields)])["r0"].latents
        for fields in ({}, {"prompt": "bad"}, {"negative_prompt": "bad", "true_cfg": 3.0})
    )
    assert conditional is not None and unconditional is not None and guided is not None
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    requests=BATCHES,
    batch=st.integers(1, 6),
    tokens=st.none() | st.integers(1, 500),
    joins=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    beside=st.integers(0, 2),
)
def test_exact_gives_bit_for_bit_what_a_request_gives_alone_whenever_it_joins(
    requests: list[VideoRequest], batch: int, tokens: int | None, joins: list[int], beside: int
) -> None:
    engine = Engine(MODEL, max_batch_size=batch, max_batch_tokens=tokens, keep_latents=True, decode_beside=beside)
    late = sorted(zip(joins, requests, strict=False), key=lambda pair: pair[0])
    results: list[Video | Failure] = []
    step = 0
    while late or engine.busy:
        while late and late[0][0] <= step:
            engine.submit(late.pop(0)[1])
        results += engine.step()
        step += 1
    assert sorted(result.request.id for result in results) == sorted(one.id for one in requests)
    for result in results:
        assert_alone(result)


@settings(max_examples=15, deadline=None)
@given(requests=BATCHES)
def test_packed_gives_it_to_rounding(requests: list[VideoRequest]) -> None:
    packed = make(requests, isolation="packed")
    for one in requests:
        (alone,) = make([one]).values()
        video = packed[one.id]
        assert video.latents is not None and alone.latents is not None
        torch.testing.assert_close(video.latents, alone.latents, rtol=1e-4, atol=1e-4)
        assert np.abs(video.frames.astype(int) - alone.frames).max() <= 1


def test_a_short_video_leaves_and_another_takes_its_place() -> None:
    engine = Engine(MODEL, max_batch_size=2, keep_latents=True)
    for one in (request(0, steps=6), request(1, steps=2), request(2, steps=2, width=20)):
        engine.submit(one)
    results = ends(engine)
    assert list(results) == ["r1", "r2", "r0"]
    for result in results.values():
        assert_alone(result)
        assert isinstance(result, Video) and result.provenance["batch"]["largest"] == 2


# -- cancel, save, resume --------------------------------------------------------------------------


def test_cancelled_while_it_waits_runs_or_is_decoded_and_the_others_go_on() -> None:
    engine = Engine(MODEL, max_batch_size=3, keep_latents=True, decode_beside=2)
    go_on = threading.Event()

    def check(phase: Phase, widths: list[int]) -> None:
        if phase == "decode" and widths == [16]:
            assert go_on.wait(60)

    for one in (request(0, steps=1, width=16), request(1, steps=5), request(2, steps=5), request(3)):
        engine.submit(one)
    with checked(check):
        assert engine.step() == []  # r0 is decoded, r1 and r2 run, r3 waits
        assert (engine.running, engine.waiting) == (2, 1)
        for id in ("r0", "r1", "r3"):
            engine.cancel(id)
        results = {result.request.id: result for result in engine.step()}
        go_on.set()
        results |= ends(engine)
    cancelled = {id for id, result in results.items() if isinstance(result, Failure) and result.cancelled}
    assert cancelled == {"r0", "r1", "r3"}
    assert_alone(results["r2"])


def test_a_run_that_stops_goes_on_in_another_engine_of_another_process_or_model() -> None:
    first = Engine(MODEL, keep_latents=True)
    requests = [request(0, steps=5), request(1, steps=4, negative_prompt="bad", true_cfg=2.0), request(2, steps=3)]
    for one in requests:
        first.submit(one)
    assert first.step() == first.step() == []
    states = first.states()
    assert {id: state.step for id, state in states.items()} == {"r0": 2, "r1": 2, "r2": 2}
    second = Engine(toy.model(), keep_latents=True)
    for one in requests[1:]:
        second.submit(one, states[one.id])
    second.submit(request(3))
    with pytest.raises(ValueError, match="saved latents are"):
        second.submit(request(4, width=20), states["r0"])
    results = ends(second)
    assert set(results) == {"r1", "r2", "r3"}
    for result in results.values():
        assert_alone(result)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["text", "step", "decode"])
@pytest.mark.parametrize("beside", [0, 2])
def test_memory_that_runs_out_once_changes_no_bit(phase: Phase, beside: int) -> None:
    left = [1]

    def check(now: Phase, widths: list[int]) -> None:
        if now == phase and left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Engine(MODEL, keep_latents=True, decode_beside=beside)
    for one in (request(0), request(1, width=20), request(2, steps=5)):
        engine.submit(one)
    with checked(check):
        results = ends(engine)
    assert not left and set(results) == {"r0", "r1", "r2"}
    for result in results.values():
        assert_alone(result)


def test_memory_that_runs_out_where_a_step_ends_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    euler_step, left = flow.euler_step, [MemoryError()]

    def scarce(*args: Any) -> torch.Tensor:
        if left:
            raise left.pop()
        return euler_step(*args)

    monkeypatch.setattr(flow, "euler_step", scarce)
    videos = make([request(0), request(1, width=20)])
    assert not left
    for video in videos.values():
        assert_alone(video)


@pytest.mark.parametrize("phase", ["text", "step", "decode"])
def test_what_never_fits_ends_alone(phase: Phase) -> None:
    def check(now: Phase, widths: list[int]) -> None:
        if now == phase and 20 in widths:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Engine(MODEL, keep_latents=True)
    for one in (request(0), request(1, width=20), request(2, steps=5)):
        engine.submit(one)
    with checked(check):
        results = ends(engine)
    failure = results.pop("r1")
    assert isinstance(failure, Failure) and isinstance(failure.error, OutOfMemory)
    assert "20×8, 5 frames) runs out of memory even alone: CUDA out of memory" in str(failure.error)
    for result in results.values():
        assert_alone(result)
    assert_alone(*make([request(1, width=20)]).values())  # and nothing is left changed


def test_what_runs_out_beside_others_takes_no_step_twice() -> None:
    engine, steps = Engine(MODEL, keep_latents=True), {"r0": [], "r1": []}

    def note(progress: Progress) -> None:
        if progress.phase == "denoise":
            steps[progress.id].append(progress.step)

    def check(phase: Phase, widths: list[int]) -> None:
        if phase == "step" and 20 in widths and engine.running > 1 and len(steps["r1"]) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.on_progress = note
    for one in (request(0, steps=6), request(1, width=20, steps=5)):
        engine.submit(one)
    with checked(check):
        results = ends(engine)
    assert steps == {"r0": [1, 2, 3, 4, 5, 6], "r1": [1, 2, 3, 4, 5]}
    assert list(results) == ["r0", "r1"]
    for result in results.values():
        assert_alone(result)


def test_a_step_too_large_is_done_in_parts() -> None:
    sizes: list[int] = []

    def check(phase: Phase, widths: list[int]) -> None:
        if phase == "step":
            sizes.append(len(widths))
            if len(widths) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    with checked(check):
        videos = make([request(i) for i in range(4)])
    assert sizes[0] == 4 and max(sizes[1:]) == 2
    for video in videos.values():
        assert_alone(video)


def test_weights_that_come_block_by_block_change_no_bit() -> None:
    requests = [request(0), request(1, width=20, steps=4), request(2, negative_prompt="bad", true_cfg=2.0)]
    model = toy.model("block")
    family = model.family
    assert groups_of(family.parts["denoiser"]) and not groups_of(family.parts["letters"])
    with counting_fetches() as fetched:
        videos = make(requests, model)
    assert fetched.bytes > 0
    for video in videos.values():
        assert_alone(video)


def test_a_memory_limit_refuses_what_cannot_fit_and_changes_no_bit() -> None:
    engine = Engine(MODEL, max_memory="1KiB")
    for i in range(2):
        engine.submit(request(i))
    for result in ends(engine).values():
        assert isinstance(result, Failure) and isinstance(result.error, OutOfMemory)
        assert "the memory limit is 1.00 KiB" in str(result.error)
    for video in make([request(0), request(1, width=20)], max_memory="1000GiB").values():
        assert_alone(video)
        assert video.provenance["batch"]["largest"] == 2


@pytest.mark.parametrize("phase", ["text", "decode"])
def test_what_changes_pixels_is_the_last_that_is_tried_and_not_tried_where_they_are_to_be_kept(phase: Phase) -> None:
    on_a_gpu = Model("toy", MODEL.folder, FAMILY, MODEL.precision, Placement(torch.device("cuda")))
    runner = Runner(on_a_gpu, "exact")
    allowed = Fallback(runner, Planner(1)).reliefs(phase)
    assert [relief.exact for relief in allowed] == sorted([relief.exact for relief in allowed], reverse=True)
    assert allowed[-1].what == "on the CPU" and not allowed[-1].exact
    assert Fallback(runner, Planner(1), keep_pixels=True).reliefs(phase) == allowed[:-1]
