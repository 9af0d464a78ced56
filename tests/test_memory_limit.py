"""The memory limit: samples wait rather than overrun it. Offload: one fetch of the weights serves the whole batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reelbatch import VideoRequest
from reelbatch.device import OutOfMemory
from reelbatch.engine import engine as engine_room
from reelbatch.engine.engine import Engine, FailedRequests
from reelbatch.loading.load import load
from reelbatch.memory.estimate import decode_peak_bytes, step_peak_bytes
from reelbatch.memory.placement import counting_fetches, offload

HELD = 3 * 2**30


def requests(count: int, **fields) -> list[VideoRequest]:
    return [
        VideoRequest(prompt="a red cat", **{"seed": i, "id": f"r{i}", "steps": 2 + i % 2, "frames": 5, **fields})
        for i in range(count)
    ]


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_room, "held_bytes", lambda device: HELD)


def estimate(engine: Engine, shapes: list) -> int:
    transformer = engine.components.family.transformer
    return HELD + step_peak_bytes(transformer.config, shapes, transformer.dtype, engine.isolation)


@pytest.mark.usefixtures("holds")
@pytest.mark.parametrize("isolation", ["exact", "packed"])
def test_no_step_is_estimated_above_the_limit_and_every_video_is_made(tiny_folder: Path, isolation: str) -> None:
    components = load(tiny_folder, "cpu", torch.float32)
    free = Engine(components, isolation=isolation)
    free.submit(requests(1, steps=2)[0])
    free.step()
    at_most = tuple(free._shapes_at_most(free._running[0].request))
    limit = estimate(free, [free._running[0].shapes] * 2 + [at_most])  # room for a third beside two
    list(free.run())
    engine = Engine(components, isolation=isolation, max_batch_size=12, max_memory=limit)
    seen: list[int] = []

    def watch(module: torch.nn.Module, args: object) -> None:
        seen.append(len(engine._running))
        assert estimate(engine, [sample.shapes for sample in engine._running]) <= limit

    handle = components.family.transformer.register_forward_pre_hook(watch)
    try:
        made = engine.generate(requests(7))
    finally:
        handle.remove()
    assert max(seen) == 3
    if isolation == "exact":
        for video, expected in zip(made, free.generate(requests(7)), strict=True):
            assert np.array_equal(video.frames, expected.frames)


@pytest.mark.usefixtures("holds")
def test_estimates_of_a_step_are_corrected_by_what_was_measured(tiny_folder: Path) -> None:
    components = load(tiny_folder, "cpu", torch.float32)
    asked = requests(4, steps=2)
    at_most = tuple(Engine(components)._shapes_at_most(asked[0].for_model(components.limits)))
    limit = estimate(Engine(components), [at_most] * 3)

    def together(correct) -> int:
        engine = Engine(components, max_memory=limit)
        engine.correct_step = correct
        for request in asked:
            engine.submit(request)
        engine.step()
        return engine.running

    alone = estimate(Engine(components), [at_most]) - HELD
    assert together(int) >= 3
    assert together(lambda estimated: estimated if estimated <= alone else limit) == 1


@pytest.mark.usefixtures("holds")
def test_what_does_not_fit_alone_fails_alone_and_says_what_it_needs(tiny_folder: Path) -> None:
    components = load(tiny_folder, "cpu", torch.float32)
    free = Engine(components)
    small, large = requests(1)[0], VideoRequest(prompt="a blue dog", height=1024, width=1024, frames=33, id="large")
    limit = estimate(free, [tuple(free._shapes_at_most(small.for_model(free.limits)))]) + 2**20
    with pytest.raises(FailedRequests) as caught:
        Engine(components, max_memory=limit).generate([large, small])
    assert [video.request.id for video in caught.value.videos] == ["r0"]
    (failure,) = caught.value.failures
    assert isinstance(failure.error, OutOfMemory)
    for part in ("'large' (1024×1024, 33 frames)", "3.00 GiB are held already", "memory limit is 3."):
        assert part in str(failure.error)


@pytest.mark.usefixtures("holds")
def test_the_vae_decodes_in_tiles_what_would_overrun_the_limit(tiny_folder: Path) -> None:
    components = load(tiny_folder, "cpu", torch.float32)
    request = VideoRequest(prompt="a cat", height=512, width=512, frames=1, steps=1)
    shape = Engine(components)._latent_shape(request)
    whole = decode_peak_bytes(components.family.decoder.vae.config, shape, torch.float32)
    (video,) = Engine(components, max_memory=HELD + whole - 1).generate([request])
    assert video.provenance["vae_tiles"] is True
    (video,) = Engine(components, max_memory=HELD + whole).generate([request])
    assert video.provenance["vae_tiles"] is False


@pytest.mark.parametrize("isolation", ["exact", "packed"])
def test_one_fetch_of_the_weights_serves_the_whole_batch(tiny_folder: Path, tmp_path: Path, isolation: str) -> None:
    components = load(tiny_folder, "cpu", torch.float32)
    expected = Engine(components, isolation=isolation, max_batch_size=8).generate(requests(8, steps=2))
    networks = {"transformer": components.family.transformer}
    offload(networks, torch.device("cpu"), "disk", tmp_path)
    fetched = {}
    for batch in (1, 2, 4, 8):
        with counting_fetches() as counted:
            made = Engine(components, isolation=isolation, max_batch_size=batch).generate(requests(8, steps=2))
        fetched[batch] = counted.bytes / 8
    for batch in (2, 4, 8):
        assert fetched[batch] == pytest.approx(fetched[1] / batch)
    for video, undisturbed in zip(made, expected, strict=True):
        assert np.array_equal(video.frames, undisturbed.frames)
    blocks = [*components.family.transformer.transformer_blocks, *components.family.transformer.single_transformer_blocks]
    assert fetched[8] * 8 >= 2 * sum(p.nbytes for block in blocks for p in block.parameters())


def test_offload_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="this one is the CPU: use 'disk'"):
        offload({}, torch.device("cpu"), "cpu")
    with pytest.raises(ValueError, match="needs a folder"):
        offload({}, torch.device("cpu"), "disk")
