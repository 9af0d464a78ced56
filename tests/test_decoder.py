"""The decoder and its thread: who is waited for, what is handed out when, and that no memory is held for nothing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from reelbatch import VideoRequest
from reelbatch.engine.engine import Engine
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.models import vae

MODEL = toy.model()


@pytest.fixture(scope="module")
def tiny_model(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", torch.float32)


def request(index: int, **fields: Any) -> VideoRequest:
    return VideoRequest.model_validate({"prompt": "a", "seed": index, "id": f"r{index}", "steps": 1} | fields)


@contextmanager
def decoding(decode: Callable[[Callable[..., Tensor], Tensor, int | None], Tensor]) -> Iterator[None]:
    """While entered, decoding is this, given what it was."""
    before = MODEL.family.decode
    MODEL.family.decode = lambda latents, tile_side: decode(before, latents, tile_side)
    try:
        yield
    finally:
        del MODEL.family.decode


def submitted(*requests: VideoRequest) -> Engine:
    engine = Engine(MODEL, decode_beside=2)
    for one in requests:
        engine.submit(one)
    return engine


def width(latents: Tensor) -> int:
    return latents.shape[-1] * MODEL.family.geometry.spatial


def test_whoever_is_cancelled_while_it_is_decoded_is_waited_for_before_weights_move() -> None:
    started, go_on, through = threading.Event(), threading.Event(), threading.Event()

    def decode(before: Callable[..., Tensor], latents: Tensor, tile_side: int | None) -> Tensor:
        started.set()
        assert go_on.wait(60)
        frames = before(latents, tile_side)
        through.set()
        return frames

    engine = submitted(request(0), request(1, steps=9))
    with decoding(decode):
        engine.step()
        assert started.wait(60)
        engine.cancel("r0")
        assert [end.request.id for end in engine.step()] == ["r0"]
        later = threading.Timer(0.05, go_on.set)
        later.start()
        engine._loop._decoder.wait()  # as before a relief
        assert through.is_set()
        later.join()
        list(engine.run())
    assert not engine._loop._decoder._forgotten  # nor are its frames held


def test_whoever_is_cancelled_before_the_thread_begins_is_not_decoded() -> None:
    go_on, decoded = threading.Event(), []

    def decode(before: Callable[..., Tensor], latents: Tensor, tile_side: int | None) -> Tensor:
        decoded.append(width(latents))
        assert go_on.wait(60)
        return before(latents, tile_side)

    engine = submitted(request(0, width=8), request(1, width=16), request(2, steps=9, width=20))
    with decoding(decode):
        engine.step()
        engine.cancel("r1")
        engine.step()
        go_on.set()
        ends = {end.request.id for end in engine.run()}
    assert ends == {"r0", "r2"}
    assert decoded == [8, 20]


def test_a_video_is_handed_out_while_one_before_it_in_line_is_still_decoded() -> None:
    """It was done first: it has fewer steps."""
    go_on = threading.Event()

    def decode(before: Callable[..., Tensor], latents: Tensor, tile_side: int | None) -> Tensor:
        if width(latents) == 16:
            assert go_on.wait(60)
        return before(latents, tile_side)

    engine = submitted(request(0, steps=2, width=16), request(1), request(2, steps=1000))
    ends: list[str] = []
    with decoding(decode):
        deadline = time.monotonic() + 60
        while not ends and time.monotonic() < deadline:
            ends += [end.request.id for end in engine.step()]
            time.sleep(0.01)
        assert ends == ["r1"]
        engine.cancel("r2")
        go_on.set()
        assert {end.request.id for end in engine.run()} == {"r0", "r2"}


def test_what_a_decode_that_ran_out_had_allocated_is_free_when_it_is_tried_again() -> None:
    allocated: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def decode(before: Callable[..., Tensor], latents: Tensor, tile_side: int | None) -> Tensor:
        gc.collect()
        alive.append(any(reference() is not None for reference in allocated))
        if len(alive) < 3:
            activations = torch.empty(1000)
            allocated.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return before(latents, tile_side)

    for beside in (2, 0):
        engine = Engine(MODEL, decode_beside=beside)
        engine.submit(request(0))
        with decoding(decode):
            (video,) = engine.run()
        assert len(alive) == 3 and len(allocated) == 2
        assert alive == [False] * 3
        assert video.request.id == "r0"
        alive.clear()
        allocated.clear()


def test_videos_that_were_handed_out_are_not_held() -> None:
    engine = Engine(MODEL, decode_beside=2)
    frames = [weakref.ref(video.frames) for video in engine.generate([request(0), request(1)])]
    gc.collect()
    assert [reference() for reference in frames] == [None] * 2


def test_frames_become_8_bit_where_they_are_decoded(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    to_frames = vae.to_frames

    def watched(video: Tensor) -> Tensor:
        threads.append(threading.current_thread().name.partition("_")[0])
        return to_frames(video)

    monkeypatch.setattr(vae, "to_frames", watched)
    fields = {"height": 16, "width": 16, "frames": 1}
    for beside, expected in ((0, "MainThread"), (2, "decoder")):
        engine = Engine(tiny_model, decode_beside=beside)
        handed_over: list[torch.dtype] = []
        decode = tiny_model.family.decode

        def family_decode(*args: Any, decode: Any = decode, handed_over: Any = handed_over) -> Tensor:
            frames = decode(*args)
            handed_over.append(frames.dtype)
            return frames

        with monkeypatch.context() as patch:
            patch.setattr(tiny_model.family, "decode", family_decode)
            engine.generate([request(0, **fields), request(1, **fields)])
        assert handed_over == [torch.uint8] * 2
        assert threads == [expected] * 2
        threads.clear()


@pytest.mark.parametrize("beside", [0, 2])
def test_tiles_that_a_request_asks_for_are_those_it_gets_in_either_thread(tiny_model: Model, beside: int) -> None:
    fields = {"height": 160, "width": 144, "frames": 1}
    asked = [request(i, seed=0, vae_tiling=side, **fields) for i, side in enumerate((None, 0, 64, 128))]
    videos = Engine(tiny_model, decode_beside=beside).generate(asked)
    assert [video.provenance["vae_tiles"] for video in videos] == [False, False, 64, 128]
    assert len({video.frames_sha256 for video in videos}) == 3
    (whole,) = Engine(tiny_model, keep_latents=True).generate(asked[0])
    for video, side in zip(videos, (None, None, 64, 128), strict=True):
        assert (video.frames == tiny_model.family.decode(whole.latents, side).numpy()).all()
