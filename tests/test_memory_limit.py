"""The memory limit: requests wait rather than overrun it, by estimate, and no pixel depends on it."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from reelbatch import Video, VideoRequest
from reelbatch.device import OutOfMemory
from reelbatch.engine import limit as limit_room
from reelbatch.engine.engine import Engine, FailedRequests
from reelbatch.engine.events import Event, Worked
from reelbatch.loading.identity import identity
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.memory.calibration import Calibration, Correction
from reelbatch.memory.estimate import Estimator
from reelbatch.memory.streaming import counting_fetches

HELD = 3 * 2**30


def requests(count: int, **fields) -> list[VideoRequest]:
    return [
        VideoRequest(prompt="a red cat", **{"seed": i, "id": f"r{i}", "steps": 2 + i % 2, "frames": 5, **fields})
        for i in range(count)
    ]


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds is the same in every run."""
    monkeypatch.setattr(limit_room, "held_bytes", lambda device: HELD)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", torch.float32)


def step_bytes(model: Model, count: int, isolation: str = "exact") -> int:
    """Held at the peak of a step of so many of `requests`."""
    alike = [request.for_model(model.limits) for request in requests(count)]
    return HELD + Estimator(model.family, isolation, model.device).step(alike)


def together(engine: Engine, asked: list[VideoRequest]) -> tuple[list[int], list[Video]]:
    """How many shared each step, and the videos."""
    shared: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Worked) and event.phase == "step":
            shared.append(len(event.ids))

    engine.subscribe(listen)
    return shared, engine.generate(asked)


def calibration(model: Model, scale: float, offset: int = 0) -> Calibration:
    """Steps corrected so; decoding takes next to nothing, so that steps alone decide."""
    return Calibration(
        identity=identity(model.folder, model.name, "any shape", device=model.device, dtype=model.precision),
        step=Correction(scale=scale, offset=offset),
        decode=Correction(scale=1e-6, offset=0),
        errors={"step": (0.0,), "decode": (0.0,)},
        measured=date.today(),
    )


@pytest.mark.usefixtures("holds")
@pytest.mark.parametrize("isolation", ["exact", "packed"])
def test_no_step_is_estimated_above_the_limit_and_every_video_is_made(model: Model, isolation: str) -> None:
    limit = step_bytes(model, 3, isolation)
    known = calibration(model, 1.0)
    engine = Engine(model, isolation=isolation, max_batch_size=12, max_memory=limit, calibration=known)
    shared, made = together(engine, requests(7))
    assert max(shared) == 3
    assert step_bytes(model, 4, isolation) > limit
    if isolation == "exact":
        for video, expected in zip(made, Engine(model).generate(requests(7)), strict=True):
            assert np.array_equal(video.frames, expected.frames)


@pytest.mark.usefixtures("holds")
def test_estimates_are_corrected_by_what_was_measured(model: Model) -> None:
    limit = step_bytes(model, 3)
    one, three = step_bytes(model, 1) - HELD, step_bytes(model, 3) - HELD
    as_estimated = Engine(model, max_memory=limit, calibration=calibration(model, 1.0))
    assert max(together(as_estimated, requests(6))[0]) == 3
    doubled = calibration(model, 2.0, offset=three - 2 * one)  # one fits as before, and each further one counts twice
    shared, _ = together(Engine(model, max_memory=limit, calibration=doubled), requests(6))
    assert max(shared) < 3
    halved = calibration(model, 0.5)
    shared, _ = together(Engine(model, max_memory=limit, calibration=halved), requests(6))
    assert max(shared) > 3


@pytest.mark.usefixtures("holds")
def test_what_does_not_fit_alone_fails_alone_and_says_what_it_needs(model: Model) -> None:
    large = VideoRequest(prompt="a blue dog", height=512, width=1024, frames=33, id="large")
    limit = step_bytes(model, 1) + 2**20
    with pytest.raises(FailedRequests) as caught:
        Engine(model, max_memory=limit).generate([large, *requests(1)])
    assert [video.request.id for video in caught.value.videos] == ["r0"]
    (failure,) = caught.value.failures
    assert isinstance(failure.error, OutOfMemory)
    for part in ("'large' (1024×512, 33 frames)", "3.00 GiB are held already", "memory limit is 3."):
        assert part in str(failure.error)


@pytest.mark.usefixtures("holds")
def test_whether_a_decode_fits_does_not_depend_on_who_else_runs(model: Model) -> None:
    large = VideoRequest(prompt="a blue dog", height=272, width=272, frames=5, steps=1, id="large")
    estimate = Estimator(model.family, "exact", model.device)
    asked = [request.for_model(model.limits) for request in (*requests(1), large)]
    limit = HELD + estimate.decode(asked[1]) - 2**20
    assert HELD + estimate.step(asked) < limit
    for before in ([], requests(1)):
        with pytest.raises(FailedRequests, match="decoding of request 'large'") as caught:
            Engine(model, max_memory=limit).generate([*before, large])
        assert [video.request.id for video in caught.value.videos] == [request.id for request in before]


def test_no_pixel_depends_on_the_limit_or_on_what_else_the_process_holds(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are decided from the request: neither a limit nor ballast in the process has a say."""
    request = VideoRequest(prompt="a cat", height=272, width=272, frames=5, steps=1, seed=3)
    (expected,) = Engine(model).generate(request)
    assert expected.provenance["vae_tiles"] is False
    decode = Estimator(model.family, "exact", model.device).decode(request.for_model(model.limits))
    for held in (HELD, HELD + 60 * 2**20):
        monkeypatch.setattr(limit_room, "held_bytes", lambda device, held=held: held)
        (video,) = Engine(model, max_memory=held + 2 * decode).generate(request)
        assert np.array_equal(video.frames, expected.frames)
        assert video.provenance["vae_tiles"] is False
    with pytest.raises(FailedRequests, match=r"decoding of request .*\(vae_tiling\)"):
        Engine(model, max_memory=held + decode - 2**20).generate(request)
    (tiled,) = Engine(model, max_memory=held + 2 * decode).generate(request.model_copy(update={"vae_tiling": 128}))
    assert tiled.provenance["vae_tiles"] == 128


@pytest.mark.parametrize("isolation", ["exact", "packed"])
def test_one_fetch_of_the_weights_serves_the_whole_batch(tiny_folder: Path, model: Model, isolation: str) -> None:
    expected = Engine(model, isolation=isolation, max_batch_size=8).generate(requests(8, steps=2))
    offloaded = load(tiny_folder, "cpu", torch.float32, offload="block")
    offloaded.family.encode(requests(1)[0])  # else the fetches of the text encoder would count
    fetched = {}
    for batch in (1, 2, 4, 8):
        with counting_fetches() as counted:
            made = Engine(offloaded, isolation=isolation, max_batch_size=batch).generate(requests(8, steps=2))
        fetched[batch] = counted.bytes / 8
    transformer = model.family.parts["transformer"]
    assert fetched[1] > fetched[2] > fetched[4] > fetched[8]
    assert fetched[8] * 8 >= 2 * sum(p.nbytes for p in transformer.transformer_blocks.parameters())
    for video, undisturbed in zip(made, expected, strict=True):
        assert np.array_equal(video.frames, undisturbed.frames)
