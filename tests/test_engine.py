"""The engine: every video in a batch is the video its request gives alone, and is Diffusers' video."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from reelbatch import Video, VideoRequest
from reelbatch.engine import flow
from reelbatch.engine.engine import Cancelled, Engine, FailedRequests, Failure, Progress
from reelbatch.engine.planner import Planner
from reelbatch.loading.load import load
from reelbatch.loading.model import Model

WORDS = [
    "a",
    "large",
    "red",
    "circle",
    "moving",
    "left",
    "on",
    "the",
    "black",
    "background",
    "small",
    "blue",
    "star",
    "standing",
    "still",
]

REQUESTS = st.builds(
    VideoRequest,
    prompt=st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join),
    negative_prompt=st.sampled_from([None, "", "blurry", "low quality and slow"]),
    true_cfg=st.sampled_from([1.0, 1.5, 4.0]),
    seed=st.integers(0, 2**64 - 1),
    height=st.sampled_from([16, 32, 48]),
    width=st.sampled_from([16, 32]),
    frames=st.sampled_from([1, 5, 9]),
    steps=st.integers(1, 3),
    guidance=st.floats(1, 12),
    flow_shift=st.sampled_from([None, 1.0, 3.0]),
    attention_rule=st.sampled_from([None, None, "own-frame", "spatial-temporal", "sliding-tile"]),
)
UNIQUE_REQUESTS = st.lists(REQUESTS, min_size=1, max_size=5, unique_by=lambda request: request.id)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def components(request: pytest.FixtureRequest, tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", request.param)


@pytest.fixture(scope="module")
def fp32(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", torch.float32)


def make(components: Model, requests: Iterable[VideoRequest], **options) -> dict[str, Video]:
    engine = Engine(components, keep_latents=True, **options)
    return {video.request.id: video for video in engine.generate(list(requests))}


def alone(components: Model, request: VideoRequest, **options) -> Video:
    return make(components, [request], **options)[request.id]


def simple(index: int = 0, **fields) -> VideoRequest:
    return VideoRequest(**{"prompt": WORDS[index % len(WORDS)], "seed": index, "id": f"r{index}", "steps": 3, **fields})


def assert_bit_identical(found: Video, expected: Video) -> None:
    assert found.latents is not None and expected.latents is not None
    assert torch.equal(found.latents, expected.latents)
    assert np.array_equal(found.frames, expected.frames)


# -- every video in a batch is the video alone -----------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    requests=UNIQUE_REQUESTS,
    batch=st.integers(1, 5),
    tokens=st.none() | st.integers(1, 2000),
    joins=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_exact_gives_every_request_bit_for_bit_what_it_gives_alone(
    components: Model, requests: list[VideoRequest], batch: int, tokens: int | None, joins: list[int], order
) -> None:
    order.shuffle(requests)
    engine = Engine(components, max_batch_size=batch, max_batch_tokens=tokens, keep_latents=True)
    late = sorted(zip(joins, requests, strict=False), key=lambda pair: pair[0])
    videos: list[Video | Failure] = []
    step = 0
    while late or engine.waiting or engine.running:
        while late and late[0][0] <= step:
            engine.submit(late.pop(0)[1])
        videos += engine.step()
        step += 1
    assert {video.request.id for video in videos} == {request.id for request in requests}
    for video in videos:
        assert isinstance(video, Video)
        original = next(request for request in requests if request.id == video.request.id)
        assert_bit_identical(video, alone(components, original))


@settings(max_examples=12, deadline=None)
@given(requests=UNIQUE_REQUESTS)
def test_packed_equals_the_request_alone_to_rounding(fp32: Model, requests: list[VideoRequest]) -> None:
    for id, video in make(fp32, requests, isolation="packed").items():
        expected = alone(fp32, next(request for request in requests if request.id == id))
        assert video.latents is not None and expected.latents is not None
        scale = expected.latents.abs().max()
        assert (video.latents - expected.latents).abs().max() / scale < 1e-5
        assert np.abs(video.frames.astype(int) - expected.frames).max() <= 1


def test_threads_do_not_make_a_batch_differ_from_its_samples_alone(components: Model) -> None:
    requests = [
        simple(i, height=32, width=16 * (1 + i % 2), frames=1 + 4 * (i % 2), steps=2, prompt=" ".join(WORDS[: 3 + i]))
        for i in range(3)
    ]
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            for id, video in make(components, requests).items():
                assert_bit_identical(video, alone(components, next(r for r in requests if r.id == id)))
    finally:
        torch.set_num_threads(threads)


def test_half_precision_runs_and_is_exact_too(tiny_folder: Path) -> None:
    components = load(tiny_folder, "cpu", torch.float16)
    requests = [simple(i, steps=2, frames=1 + 4 * i) for i in range(2)]
    for id, video in make(components, requests).items():
        assert_bit_identical(video, alone(components, next(r for r in requests if r.id == id)))
        assert video.latents is not None
        assert video.latents.dtype == torch.float32


# -- and it is Diffusers' video --------------------------------------------------------------------


def reference_frames(pipeline: HunyuanVideoPipeline, request: VideoRequest) -> np.ndarray:
    return pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        true_cfg_scale=request.true_cfg,
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).frames[0]


@pytest.mark.parametrize("isolation", ["exact", "packed"])
def test_latents_after_20_steps_are_the_pipelines(
    fp32: Model, tiny_pipeline: HunyuanVideoPipeline, isolation: str
) -> None:
    sizes = {"height": 32, "width": 48, "frames": 9, "steps": 20, "guidance": 6.0}
    requests = [
        simple(0, **sizes, prompt="a large red circle"),
        simple(1, **sizes, prompt="a small blue star on the sea", negative_prompt="low quality", true_cfg=3.0),
        simple(2, **sizes, prompt="two cats", negative_prompt="", true_cfg=2.0),
    ]
    found = make(fp32, requests, isolation=isolation)
    for request in requests:
        expected = reference_frames(tiny_pipeline, request)
        latents = found[request.id].latents
        assert latents is not None
        assert ((latents - expected).abs().max() / expected.abs().max()).item() < 1e-4


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 100), shift=st.floats(0.5, 20))
def test_sigmas_and_timesteps_are_the_schedulers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    schedule = flow.schedule(steps, shift, torch.device("cpu"))
    assert torch.equal(schedule.sigmas, scheduler.sigmas)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    latents, velocity = torch.randn(2, 3), torch.randn(2, 3)
    expected = latents
    for step, timestep in enumerate(scheduler.timesteps):
        latents = flow.euler_step(latents, velocity, schedule, step)
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
    assert torch.equal(latents, expected)


# -- one request's trouble is its own --------------------------------------------------------------


def failing_on(components: Model, monkeypatch: pytest.MonkeyPatch, guidance: float, error: Exception) -> None:
    """The transformer raises whenever a request of this guidance is in the batch."""
    forward = components.family.transformer.forward

    def failing(packs, **kwargs):
        if any(float(branch.guidance) == guidance * 1000 for pack in packs for branch in pack):
            raise error
        return forward(packs=packs, **kwargs)

    monkeypatch.setattr(components.family.transformer, "forward", failing)


def test_a_request_that_fails_in_a_step_ends_alone(fp32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [simple(i) for i in range(4)]
    expected = make(fp32, good)
    failing_on(fp32, monkeypatch, 3.0, RuntimeError("bad adapter"))
    engine = Engine(fp32, keep_latents=True)
    with pytest.raises(FailedRequests, match="1 of 5 requests failed: r9: bad adapter") as raised:
        engine.generate([*good[:2], simple(9, guidance=3.0), *good[2:]])
    assert [failure.request.id for failure in raised.value.failures] == ["r9"]
    assert [video.request.id for video in raised.value.videos] == [request.id for request in good]
    for video in raised.value.videos:
        assert_bit_identical(video, expected[video.request.id])


@pytest.mark.parametrize("isolation", ["exact", "packed"])
def test_latents_that_overflow_end_their_request_alone(fp32: Model, isolation: str) -> None:
    broken = simple(9, negative_prompt="", true_cfg=1e38)
    engine = Engine(fp32, isolation=isolation)
    with pytest.raises(FailedRequests, match="'r9' are no longer finite after step") as raised:
        engine.generate([simple(0), broken, simple(1)])
    assert [video.request.id for video in raised.value.videos] == ["r0", "r1"]


def test_a_request_that_cannot_be_decoded_ends_alone(fp32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = fp32.family.decode

    def failing(latents, tile_side):
        if latents.shape[1] == 1:
            raise RuntimeError("undecodable")
        return decode(latents, tile_side)

    monkeypatch.setattr(fp32.family, "decode", failing)
    with pytest.raises(FailedRequests) as raised:
        Engine(fp32).generate([simple(0), simple(1, frames=1), simple(2)])
    assert [failure.request.id for failure in raised.value.failures] == ["r1"]
    assert [video.request.id for video in raised.value.videos] == ["r0", "r2"]


def test_a_request_that_cannot_be_encoded_ends_alone(fp32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = fp32.family.text.encode

    def failing(prompt, prompt_2=None):
        if prompt == "cat":
            raise RuntimeError("no such words")
        return encode(prompt, prompt_2)

    monkeypatch.setattr(fp32.family.text, "encode", failing)
    with pytest.raises(FailedRequests) as raised:
        Engine(fp32).generate([simple(0), simple(1, prompt="cat"), simple(2)])
    assert [failure.request.id for failure in raised.value.failures] == ["r1"]
    assert len(raised.value.videos) == 2


def test_a_step_too_large_for_memory_is_split_and_nothing_is_lost(fp32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [simple(i, steps=2 + i % 3) for i in range(5)]
    expected = make(fp32, requests)
    forward = fp32.family.transformer.forward

    def small_memory(packs, **kwargs):
        if sum(len(pack) for pack in packs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(packs=packs, **kwargs)

    monkeypatch.setattr(fp32.family.transformer, "forward", small_memory)
    for id, video in make(fp32, requests).items():
        assert_bit_identical(video, expected[id])


def test_cancelling_ends_one_request_and_leaves_the_others_as_they_were(fp32: Model) -> None:
    requests = [simple(i, steps=4) for i in range(4)]
    expected = make(fp32, requests)
    engine = Engine(fp32, max_batch_size=3, keep_latents=True)
    for request in requests:
        engine.submit(request)
    ended = engine.step()
    engine.cancel("r1")  # running
    engine.cancel("r3")  # waiting
    ended += list(engine.run())
    cancelled = {end.request.id: end for end in ended if isinstance(end, Failure)}
    assert set(cancelled) == {"r1", "r3"}
    assert all(isinstance(end.error, Cancelled) and end.cancelled for end in cancelled.values())
    for end in ended:
        if isinstance(end, Video):
            assert_bit_identical(end, expected[end.request.id])
    assert len(ended) == 4


def test_should_cancel_is_asked_for_each_request_before_each_step(fp32: Model) -> None:
    engine = Engine(fp32)
    steps = {"r0": 0, "r1": 0}
    engine.on_progress = lambda progress: steps.update({progress.id: progress.step})
    engine.should_cancel = lambda id: id == "r1" and steps[id] == 2
    with pytest.raises(FailedRequests, match="r1: cancelled"):
        engine.generate([simple(0, steps=4), simple(1, steps=4)])
    assert steps["r0"] == 4


# -- how it goes about it --------------------------------------------------------------------------


def test_a_short_video_leaves_while_a_long_one_goes_on_and_another_takes_its_place(fp32: Model) -> None:
    engine = Engine(fp32, max_batch_size=2)
    seen: list[Progress] = []
    engine.on_progress = seen.append
    for request in (simple(0, steps=6), simple(1, steps=2), simple(2, steps=2)):
        engine.submit(request)
    assert [end.request.id for end in engine.run()] == ["r1", "r2", "r0"]
    steps = [(progress.id, progress.step, progress.batch_size) for progress in seen if progress.phase == "denoise"]
    assert steps[:4] == [("r0", 1, 2), ("r1", 1, 2), ("r0", 2, 2), ("r1", 2, 2)]
    assert steps[4:6] == [("r0", 3, 2), ("r2", 1, 2)]
    phases = [progress.phase for progress in seen if progress.id == "r1"]
    assert phases == ["text", "denoise", "denoise", "decode", "done"]


def test_decoding_beside_the_next_steps_gives_the_same_videos(fp32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [simple(i, steps=1 + i, frames=(1, 5, 9)[i % 3]) for i in range(5)]
    expected = make(fp32, requests)
    decode, stepped, threads = fp32.family.decode, threading.Event(), []

    def beside(latents, tile_side):
        threads.append(threading.current_thread())
        if threads[-1] is not threading.main_thread():
            assert stepped.wait(60)  # the first decode ends only after a step that was taken meanwhile
        return decode(latents, tile_side)

    monkeypatch.setattr(fp32.family, "decode", beside)
    engine = Engine(fp32, max_batch_size=2, keep_latents=True, decode_beside=2)
    engine.on_progress = lambda progress: stepped.set() if (progress.id, progress.step) == ("r2", 1) else None
    ended = {video.request.id: video for video in engine.generate(requests)}
    assert len(threads) == 5 and threading.main_thread() not in threads
    for id, video in ended.items():
        assert_bit_identical(video, expected[id])


def test_a_video_tells_where_it_came_from(fp32: Model) -> None:
    video = make(fp32, [simple(i) for i in range(3)])["r1"]
    assert video.request.height == fp32.limits.defaults.height
    assert video.provenance["isolation"] == "exact"
    assert video.provenance["batch"] == {"largest": 3, "mates": ["r0", "r2"]}
    assert set(video.provenance["versions"]) == {"reelbatch", "torch", "diffusers", "transformers"}
    assert video.provenance["seconds"]["denoise"] > 0


def test_a_separate_prompt_for_clip_is_used(fp32: Model) -> None:
    plain, other = alone(fp32, simple(0)), alone(fp32, simple(0, prompt_2="horse running in the night"))
    assert plain.latents is not None and other.latents is not None
    assert not torch.equal(plain.latents, other.latents)


def test_two_requests_of_one_id_are_refused(fp32: Model) -> None:
    engine = Engine(fp32)
    engine.submit(simple(0))
    with pytest.raises(ValueError, match="'r0', which another request in line has"):
        engine.submit(simple(0))


def test_an_id_is_free_again_once_its_request_has_ended(fp32: Model) -> None:
    engine = Engine(fp32)
    engine.generate([simple(0)])
    engine.submit(simple(0))
    assert [end.request.id for end in engine.run()] == ["r0"]


def test_an_unknown_isolation_is_refused(fp32: Model) -> None:
    with pytest.raises(ValueError, match="'exact' or 'packed'"):
        Engine(fp32, isolation="padded")  # type: ignore[arg-type]


# -- the planner -----------------------------------------------------------------------------------


class Piece:
    def __init__(self, tokens: int, steps: int = 1) -> None:
        self.tokens, self.steps = tokens, steps


@given(
    pieces=st.lists(st.builds(Piece, st.integers(1, 500), st.integers(1, 5)), max_size=30),
    batch=st.integers(1, 8),
    tokens=st.none() | st.integers(1, 1000),
)
def test_the_planner_keeps_its_limits_serves_in_order_and_starves_nobody(
    pieces: list[Piece], batch: int, tokens: int | None
) -> None:
    planner, waiting, running, admitted = Planner(batch, tokens), list(pieces), [], []
    steps = 0
    while waiting or running:
        while waiting and planner.admits(waiting[0].tokens, running):
            running.append(waiting.pop(0))
            admitted.append(running[-1])
        assert 1 <= len(running) <= batch
        assert tokens is None or len(running) == 1 or sum(piece.tokens for piece in running) <= tokens
        assert planner.packs(running, "exact") == [[piece] for piece in running]
        assert planner.packs(running, "packed") == [running]
        for piece in running:
            piece.steps -= 1
        running = [piece for piece in running if piece.steps > 0]
        steps += 1
        assert steps <= 5 * len(pieces)
    assert admitted == pieces


@pytest.mark.parametrize("limits", [(0, None), (1, 0), (-1, None)])
def test_a_planner_without_room_for_anything_is_refused(limits: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Planner(*limits)
