"""A request is at every moment in one state: whatever raises, and whoever asks from another thread, none is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelbatch import Video, VideoRequest
from reelbatch.engine.engine import Cancelled, Engine, FailedRequests, Failure, Progress
from reelbatch.engine.events import Event, Worked
from reelbatch.engine.scheduler import Entry, Scheduler
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.models.noise import draw_noise

PHASES = ("text", "denoise", "decode", "done")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", torch.float32)


def requests(count: int = 6) -> list[VideoRequest]:
    return [
        VideoRequest(prompt="a red cat", seed=i, id=f"r{i}", height=16, width=16, frames=1, steps=1 + i % 3)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def expected(model: Model) -> dict[str, Video]:
    return {video.request.id: video for video in Engine(model).generate(requests())}


class Stop(Exception):
    """What a callback raises."""


def raising_once(phase: str, number: int, error: type[BaseException]) -> Callable[[Progress], None]:
    """A callback that raises at the `number`th progress of a phase."""
    left = [number]

    def callback(progress: Progress) -> None:
        if progress.phase == phase:
            left[0] -= 1
            if left[0] == 0:
                raise error

    return callback


def all_of(engine: Engine, ends: list[Video | Failure] | None = None) -> dict[str, Video | Failure]:
    """Everything that ends, each once."""
    results = [*(ends or []), *engine.run()]
    assert len({end.request.id for end in results}) == len(results)
    return {end.request.id: end for end in results}


def assert_all_right(results: dict[str, Video | Failure], expected: dict[str, Video]) -> None:
    assert set(results) == set(expected)
    for id, video in results.items():
        assert isinstance(video, Video), video
        assert np.array_equal(video.frames, expected[id].frames)


# -- callbacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_a_callback_that_raises_loses_no_request(
    model: Model, expected: dict[str, Video], phase: str, number: int, error: type[BaseException]
) -> None:
    engine = Engine(model, max_batch_size=3)
    engine.on_progress = raising_once(phase, number, error)
    for request in requests():
        engine.submit(request)
    ended: list[Video | Failure] = []

    def steps() -> None:
        while engine.busy:
            ended.extend(engine.step())

    with pytest.raises(error):
        steps()
    assert_all_right(all_of(engine, ended), expected)


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupted_generate_goes_on_when_it_is_called_again(
    model: Model, expected: dict[str, Video], phase: str
) -> None:
    engine = Engine(model, max_batch_size=3)
    engine.on_progress = raising_once(phase, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests())
    steps: list[tuple[str, int]] = []
    engine.on_progress = lambda p: steps.append((p.id, p.step)) if p.phase == "denoise" else None
    assert_all_right({video.request.id: video for video in engine.generate(requests())}, expected)
    assert len(steps) == len(set(steps))  # no step was taken twice
    assert not engine.busy


def test_what_a_generate_left_comes_out_of_run_while_another_call_gets_its_own(
    model: Model, expected: dict[str, Video]
) -> None:
    engine = Engine(model, max_batch_size=2)
    engine.on_progress = raising_once("done", 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests()[:3])
    others = engine.generate(requests()[3:])
    assert [video.request.id for video in others] == ["r3", "r4", "r5"]
    assert_all_right({**all_of(engine), **{video.request.id: video for video in others}}, expected)


@settings(max_examples=12, deadline=None)
@given(raises=st.lists(st.tuples(st.sampled_from(PHASES), st.integers(1, 9)), min_size=1, max_size=4))
def test_whatever_listeners_raise_whenever_every_request_ends_once(
    model: Model, expected: dict[str, Video], raises: list[tuple[str, int]]
) -> None:
    engine = Engine(model, max_batch_size=2, decode_beside=len(raises) % 3)
    callbacks = [raising_once(phase, number, Stop) for phase, number in raises]
    for callback in callbacks:
        engine.subscribe(lambda event, callback=callback: callback(event) if isinstance(event, Progress) else None)
    for request in requests():
        engine.submit(request)
    ended: list[Video | Failure] = []
    for _ in range(100):
        try:
            while engine.busy:
                ended += engine.step()
            break
        except Stop:
            continue
    assert_all_right(all_of(engine, ended), expected)


@pytest.mark.parametrize("phase", PHASES)
def test_every_listener_sees_every_event_once_though_another_raises(model: Model, phase: str) -> None:
    """Nothing is reported twice, as nothing is done twice; and nothing goes unreported."""
    seen: list[list[tuple[str, str, int]]] = []
    for raises in (False, True):
        engine = Engine(model, max_batch_size=3)
        engine.on_progress = raising_once(phase, 2, Stop) if raises else None
        for listener in (raising_once(phase, 3, Stop) if raises else None, None):
            events: list[tuple[str, str, int]] = []
            seen.append(events)

            def listen(event: Event, own: list = events, callback: Callable | None = listener) -> None:
                if isinstance(event, Progress):
                    if event.phase != "text":  # which begins, and begins again after an interruption
                        own.append((event.id, event.phase, event.step))
                    if callback is not None:
                        callback(event)

            engine.subscribe(listen)
        for request in requests():
            engine.submit(request)
        stops = 0
        while engine.busy:
            try:
                engine.step()
            except Stop:
                stops += 1
        assert stops == (2 if raises else 0)
    assert len(set(seen[0])) == len(seen[0])
    for events in seen[1:]:
        assert sorted(events) == sorted(seen[0])


def test_who_takes_results_one_by_one_may_stop_and_lose_none(model: Model, expected: dict[str, Video]) -> None:
    engine = Engine(model)
    for request in requests():
        engine.submit(request)
    ended: list[Video | Failure] = []
    while engine.busy:
        for end in engine.run():
            ended.append(end)
            break
    assert_all_right(all_of(engine, ended), expected)


@pytest.mark.parametrize("place", ["encode", "velocities", "decode"])
def test_an_interrupt_in_the_middle_of_the_work_loses_nothing(
    model: Model, expected: dict[str, Video], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, calls = getattr(model.family, place), [0]

    def interrupted(*args: object) -> object:
        calls[0] += 1
        if calls[0] % 3 == 2:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(model.family, place, interrupted)
    engine = Engine(model, max_batch_size=3)
    for request in requests():
        engine.submit(request)
    ended: list[Video | Failure] = []
    interrupts = 0
    while engine.busy:
        try:
            ended += engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 2
    assert_all_right(all_of(engine, ended), expected)


# -- what generate takes ---------------------------------------------------------------------------


def test_generate_takes_a_prompt_or_one_request(model: Model) -> None:
    engine = Engine(model)
    (by_text,) = engine.generate("a red cat")
    assert by_text.request.prompt == "a red cat"
    request = requests()[2]
    (one,) = engine.generate(request)
    (of_list,) = engine.generate([request])
    assert np.array_equal(one.frames, of_list.frames)
    assert [video.request.prompt for video in engine.generate(["a cat", requests()[0]])] == ["a cat", "a red cat"]


@pytest.mark.parametrize("given", [[{"prompt": "a cat"}], [1], [None], ["a cat", b"a dog"]])
def test_generate_says_what_it_takes(model: Model, given: list[object]) -> None:
    engine = Engine(model)
    with pytest.raises(TypeError, match=r"VideoRequests, or prompts as text; number \d is a \w+"):
        engine.generate(given)  # type: ignore[arg-type]
    assert not engine.busy


def test_two_requests_of_one_id_are_refused_before_any_is_in_line(model: Model) -> None:
    engine, request = Engine(model), requests()[0]
    with pytest.raises(ValueError, match="'r0' in two of these requests"):
        engine.generate([request, request])
    assert not engine.busy
    assert len(engine.generate([request])) == 1


# -- cancelling ------------------------------------------------------------------------------------


def test_a_video_is_cancelled_in_whatever_state_it_is(model: Model, expected: dict[str, Video]) -> None:
    engine = Engine(model, max_batch_size=3, decode_beside=2)
    release = threading.Event()
    decode = model.family.decode

    def slow(latents: torch.Tensor, tile_side: int | None) -> torch.Tensor:
        assert release.wait(60)
        return decode(latents, tile_side)

    model.family.decode = slow  # type: ignore[method-assign]
    try:
        for request in requests():
            engine.submit(request)
        ended = engine.step()  # r0 has one step, and is being decoded
        engine.cancel("r0")
        engine.cancel("r1")
        engine.cancel("r5")
        release.set()
        results = all_of(engine, ended)
    finally:
        del model.family.decode
    for id in ("r0", "r1", "r5"):
        end = results.pop(id)
        assert isinstance(end, Failure) and end.cancelled and isinstance(end.error, Cancelled)
    assert_all_right(results, {id: video for id, video in expected.items() if id in results})


def test_cancelling_an_id_that_is_not_here_does_not_cancel_one_that_comes_later(model: Model) -> None:
    engine = Engine(model)
    engine.cancel("r0")
    assert len(engine.generate(requests()[:1])) == 1
    engine.cancel("r0")  # it has ended
    assert len(engine.generate(requests()[:1])) == 1


def test_a_cancel_that_comes_too_late_does_not_cancel_a_later_request_of_that_id(model: Model) -> None:
    engine = Engine(model)
    engine.on_progress = lambda progress: engine.cancel(progress.id) if progress.phase == "decode" else None
    assert len(engine.generate(requests()[:1])) == 1
    engine.on_progress = None
    assert len(engine.generate(requests()[:1])) == 1


def test_a_cancel_that_comes_while_others_are_cancelled_is_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asking = Engine(model), threading.Thread(target=lambda: engine.cancel("r1"))
    for request in requests():
        engine.submit(request)
    engine.cancel("r0")
    put = Scheduler._put

    def meanwhile(scheduler: Scheduler, *entries: Entry) -> None:
        if not asking.ident:
            asking.start()
            asking.join(0.2)  # it waits for the scheduler, or is through
        put(scheduler, *entries)

    monkeypatch.setattr(Scheduler, "_put", meanwhile)
    ended = engine.step()
    asking.join()
    assert {end.request.id for end in all_of(engine, ended).values() if isinstance(end, Failure)} == {"r0", "r1"}


def test_should_cancel_is_one_way_with_cancel(model: Model) -> None:
    engine = Engine(model, max_batch_size=1)
    engine.should_cancel = lambda id: id in ("r0", "r4")
    with pytest.raises(FailedRequests) as raised:
        engine.generate(requests())
    assert {failure.request.id for failure in raised.value.failures} == {"r0", "r4"}


def test_requests_come_and_are_cancelled_from_other_threads(model: Model) -> None:
    engine = Engine(model, max_batch_size=4)
    per_thread, threads = 12, 4
    errors: list[BaseException] = []
    cancelled: set[str] = set()

    def ask(thread: int) -> None:
        try:
            for i in range(per_thread):
                id = f"t{thread}-{i}"
                engine.submit(VideoRequest(prompt="a cat", seed=i, id=id, height=16, width=16, frames=1, steps=2))
                if i % 3 == 0:
                    engine.cancel(id)
                    cancelled.add(id)
        except BaseException as error:
            errors.append(error)

    asking = [threading.Thread(target=ask, args=(i,)) for i in range(threads)]
    for thread in asking:
        thread.start()
    ended: list[Video | Failure] = []
    while any(thread.is_alive() for thread in asking) or engine.busy:
        ended += engine.step()
    assert not errors
    assert sorted(end.request.id for end in ended) == sorted(
        f"t{thread}-{i}" for thread in range(threads) for i in range(per_thread)
    )
    failed = {end.request.id for end in ended if isinstance(end, Failure)}
    assert failed <= cancelled  # one that had ended before it was cancelled has its video


# -- events ----------------------------------------------------------------------------------------


def test_events_say_what_was_done(model: Model) -> None:
    engine = Engine(model, max_batch_size=3)
    events: list[Event] = []
    engine.subscribe(events.append)
    engine.generate(requests(3))
    worked = [event for event in events if isinstance(event, Worked)]
    assert [event.ids for event in worked if event.phase == "text"] == [("r0",), ("r1",), ("r2",)]
    assert [event.ids for event in worked if event.phase == "step"] == [("r0", "r1", "r2"), ("r1", "r2"), ("r2",)]
    assert sorted(event.ids for event in worked if event.phase == "decode") == [("r0",), ("r1",), ("r2",)]
    assert all(event.seconds > 0 and event.calls == 1 and event.peak_bytes is None for event in worked)


# -- noise -----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), high=st.integers(1, 2**32 - 1), bit=st.integers(0, 31))
def test_different_seeds_give_different_noise_and_small_ones_that_of_diffusers(seed: int, high: int, bit: int) -> None:
    shape = (4, 1, 2, 3)
    noise = draw_noise(seed, shape)
    assert torch.equal(noise, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    large = seed + (high << 32)
    other = draw_noise(large, shape)
    assert other.dtype == torch.float32 and not torch.equal(noise, other)
    assert torch.equal(other, draw_noise(large, shape))
    for flipped in (1 << bit, 1 << bit + 32, 1 << bit | 1 << bit + 32):
        assert not torch.equal(other, draw_noise(large ^ flipped, shape))


def test_noise_of_large_seeds_is_standard_normal() -> None:
    noise = draw_noise(2**40 + 5, (16, 9, 32, 32)).double()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise**4).mean() - 3) < 0.1
