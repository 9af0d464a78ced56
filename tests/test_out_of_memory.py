"""Memory runs out at any place and any time: nothing is lost, nothing is made twice, and every frame is the same."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import Folder

from reelbatch import Video, VideoRequest
from reelbatch.device import OutOfMemory, is_out_of_memory
from reelbatch.engine.engine import Engine, FailedRequests, Failure
from reelbatch.engine.planner import Planner
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.video import read_video

RUNS = int(os.environ.get("REELBATCH_FAULT_RUNS", "16"))
"""Runs with random faults; the full measure is 200."""
ERRORS: tuple[Callable[[], Exception], ...] = (
    MemoryError,
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
)


@pytest.fixture(scope="module")
def components(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", torch.float32)


def requests() -> list[VideoRequest]:
    fields = ({"frames": 5}, {"width": 48}, {}, {"true_cfg": 2.0, "negative_prompt": "blurry"}, {"steps": 3})
    words = ("a red cat", "a blue dog on the background", "circle", "a small star moving left", "standing still")
    return [
        VideoRequest(**{"prompt": prompt, "seed": i, "id": f"r{i}", "height": 32, "width": 32, "steps": 2, **each})
        for i, (prompt, each) in enumerate(zip(words, fields, strict=True))
    ]


@pytest.fixture(scope="module")
def undisturbed(components: Model) -> dict[str, Video]:
    return {video.request.id: video for video in Engine(components, keep_latents=True).generate(requests())}


@contextmanager
def faults(components: Model, raises: Callable[[str], bool], rng: random.Random) -> Iterator[list[str]]:
    """Asks `raises` at every allocation point, by its name, and runs out of memory there if it says so."""
    struck: list[str] = []
    transformer = components.family.transformer
    networks = {
        "encode": components.family.text.llama,
        "encode clip": components.family.text.clip,
        "step": transformer,
        "decode": components.family.decoder.vae.decoder,
        **{f"block {i}": block for i, block in enumerate(transformer.transformer_blocks)},
        **{f"single block {i}": block for i, block in enumerate(transformer.single_transformer_blocks)},
    }

    def hook(name: str) -> Callable[..., None]:
        def strike(*_: object) -> None:
            if raises(name):
                struck.append(name)
                raise rng.choice(ERRORS)()

        return strike

    handles = [network.register_forward_pre_hook(hook(name)) for name, network in networks.items()]
    components.family.text.forget()
    try:
        yield struck
    finally:
        for handle in handles:
            handle.remove()


TRIES_BEFORE_TILES = 3
"""Of a decode that changes no pixel: as it is, after memory was freed, with the other networks elsewhere."""


@contextmanager
def failed_decodes(model: Model) -> Iterator[list[torch.Tensor]]:
    """The latents of every decode that ran out of memory."""
    failed: list[torch.Tensor] = []
    decode = model.family.decode

    def watched(latents: torch.Tensor, tile_side: int | None) -> torch.Tensor:
        try:
            return decode(latents, tile_side)
        except Exception:
            failed.append(latents.clone())
            raise

    model.family.decode = watched
    try:
        yield failed
    finally:
        del model.family.decode


@pytest.mark.parametrize("seed", range(RUNS))
def test_whatever_runs_out_when_every_request_ends_once_and_right(
    components: Model,
    undisturbed: dict[str, Video],
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(seed)
    share = rng.choice([0.02, 0.05, 0.15, 0.4])
    engine = Engine(
        components,
        keep_latents=True,
        max_batch_size=rng.randint(1, 5),
        decode_beside=rng.choice([0, 2]),
        keep_pixels=rng.choice([False, True]),
    )
    folder = Folder(tmp_path, engine)
    made: dict[str, Video] = {}
    written_aside = Video.written_aside

    def write(video: Video, *args: object) -> object:
        made[video.request.id] = video
        if rng.random() < share:
            raise rng.choice(ERRORS)()
        return written_aside(video, *args)

    monkeypatch.setattr(Video, "written_aside", write)
    with faults(components, lambda name: rng.random() < share, rng), failed_decodes(components) as failed:
        outcomes = folder.make([request.for_model(engine.limits) for request in requests()])
    assert sorted(outcome.request.id for outcome in outcomes) == sorted(undisturbed)
    rows = {row.id: row for row in folder.manifest.rows()}
    for outcome in outcomes:
        id, row = outcome.request.id, rows[outcome.request.id]
        if outcome.error is not None:
            assert isinstance(outcome.error, OutOfMemory), outcome.error
            assert row.state == "failed"
            assert not outcome.path.exists()
            continue
        expected, video = undisturbed[id], made[id]
        assert row.state == "done"
        assert read_video(outcome.path).shape == expected.frames.shape
        assert video.latents is not None and expected.latents is not None
        assert torch.equal(video.latents, expected.latents)
        tries = sum(latents.shape == video.latents.shape and torch.equal(latents, video.latents) for latents in failed)
        if tries < TRIES_BEFORE_TILES or engine.config.keep_pixels:
            assert row.frames_sha256 == expected.frames_sha256
            assert video.provenance["fallbacks"] == []
        elif row.frames_sha256 != expected.frames_sha256:  # the last resort is recorded
            assert video.provenance["fallbacks"] == [f"decoded in VAE tiles of {video.provenance['vae_tiles']} pixels"]
            assert np.abs(video.frames.astype(int) - expected.frames).mean() < 2


def test_a_batch_that_is_too_large_is_split_and_not_tried_again(
    components: Model, undisturbed: dict[str, Video]
) -> None:
    sizes: list[int] = []

    def limited(module: torch.nn.Module, args: object, kwargs: dict) -> None:
        sizes.append(len(kwargs["packs"]))
        if len(kwargs["packs"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = components.family.transformer.register_forward_pre_hook(limited, with_kwargs=True)
    try:
        engine = Engine(components, keep_latents=True)
        made = engine.generate(requests())
    finally:
        handle.remove()
    for video in made:
        assert np.array_equal(video.frames, undisturbed[video.request.id].frames)
    assert sizes[0] == 5
    assert max(sizes[1:]) <= 3  # its halves, and never so many again


def test_groups_stay_below_what_failed_and_grow_back_together() -> None:
    class Piece:
        def __init__(self, tokens: int) -> None:
            self.tokens = tokens

    planner, pieces = Planner(8), [Piece(10) for _ in range(5)]
    assert planner.groups(pieces) == [pieces]
    planner.limit_forward(planner.halves(pieces))
    assert [len(group) for group in planner.groups(pieces)] == [3, 2]
    planner.limit_forward(planner.halves(pieces[:3]))
    assert [len(group) for group in planner.groups(pieces)] == [2, 2, 1]
    assert planner.groups(pieces[:2]) == [pieces[:2]]
    planner.limit_forward(planner.halves(pieces[:2]))
    assert [len(group) for group in planner.groups(pieces)] == [1] * 5
    assert planner.groups([]) == []


def whole_is_too_much(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    if args[0].shape[-1] * 8 > 64:
        raise MemoryError


def test_a_decode_that_never_fits_whole_is_done_in_tiles_and_says_so(
    components: Model, caplog: pytest.LogCaptureFixture
) -> None:
    vae = components.family.decoder.vae
    request = VideoRequest(prompt="a cat", height=192, width=192, frames=1, steps=1, id="large")

    handle = vae.decoder.register_forward_pre_hook(whole_is_too_much)
    try:
        (video,) = Engine(components).generate([request])
    finally:
        handle.remove()
    assert video.provenance["vae_tiles"] == 64
    assert video.frames.shape == (1, 192, 192, 3)
    assert video.provenance["fallbacks"] == ["decoded in VAE tiles of 64 pixels"]
    assert not vae.use_tiling
    assert caplog.records[-1].message == "out of memory in decoding of large: tried again in VAE tiles of 64 pixels"


def test_a_video_whose_pixels_are_to_be_kept_fails_rather_than_be_decoded_in_smaller_tiles(components: Model) -> None:
    request = VideoRequest(prompt="a cat", height=192, width=192, frames=1, steps=1, id="large")
    handle = components.family.decoder.vae.decoder.register_forward_pre_hook(whole_is_too_much)
    engine = Engine(components, keep_pixels=True)
    try:
        with pytest.raises(FailedRequests, match="decoding of request 'large'"):
            engine.generate([request])
    finally:
        handle.remove()


def test_a_decode_that_fits_once_the_others_are_through_is_as_it_is_alone(
    components: Model, undisturbed: dict[str, Video]
) -> None:
    """The pixels of a video do not depend on who still runs when it is decoded."""
    for beside in (0, 2):
        engine = Engine(components, keep_latents=True, decode_beside=beside)

        def crowded(*_: object, engine: Engine = engine) -> None:
            if engine.running:
                raise MemoryError

        handle = components.family.decoder.vae.decoder.register_forward_pre_hook(crowded)
        try:
            made = engine.generate([*requests(), VideoRequest(prompt="a cat", seed=9, steps=6, frames=5, id="long")])
        finally:
            handle.remove()
        for video in made:
            assert video.provenance["fallbacks"] == []
            if video.request.id in undisturbed:
                assert np.array_equal(video.frames, undisturbed[video.request.id].frames)


def test_a_step_that_does_not_fit_beside_others_goes_on_when_it_is_alone(
    components: Model, undisturbed: dict[str, Video]
) -> None:
    engine = Engine(components, keep_latents=True)

    def crowded(module: torch.nn.Module, args: object, kwargs: dict) -> None:
        wide = any(branch.latents.shape[-1] == 48 // 8 for pack in kwargs["packs"] for branch in pack)
        if wide and engine.running > 1:
            raise MemoryError

    handle = components.family.transformer.register_forward_pre_hook(crowded, with_kwargs=True)
    try:
        made = engine.generate(requests())
    finally:
        handle.remove()
    for video in made:
        assert np.array_equal(video.frames, undisturbed[video.request.id].frames)


def test_a_decode_beside_the_steps_that_runs_out_does_not_change_its_batch_mates(components: Model) -> None:
    """The decoder's thread and the engine's decode at the same time, one in smaller tiles: each has its own."""
    wide = VideoRequest(prompt="a cat", height=192, width=192, frames=1, steps=1, seed=1, id="wide")
    others = [
        VideoRequest(prompt="a dog", height=160, width=160, frames=1, steps=2, seed=i, id=f"o{i}") for i in (2, 3)
    ]
    expected = {v.request.id: v.frames for v in Engine(components).generate(others)}
    decoder = components.family.decoder.vae.decoder

    def whole(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[-1] * 8 == 192:
            raise MemoryError

    handle = decoder.register_forward_pre_hook(whole)
    try:
        made = {v.request.id: v for v in Engine(components, decode_beside=2).generate([wide, *others])}
    finally:
        handle.remove()
    assert made["wide"].provenance["vae_tiles"] == 128
    for id, frames in expected.items():
        assert np.array_equal(made[id].frames, frames)
        assert made[id].provenance["vae_tiles"] is False


def test_what_never_fits_fails_alone_with_what_it_needs(components: Model, undisturbed: dict[str, Video]) -> None:
    def never(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if (
            args[0].shape[-1] == 48 // components.family.decoder.vae.spatial_compression_ratio
        ):  # the request that is 48 wide
            raise MemoryError("cannot allocate 9 GiB")

    handle = components.family.decoder.vae.decoder.register_forward_pre_hook(never)
    engine = Engine(components)
    try:
        for request in requests():
            engine.submit(request)
        ends = {end.request.id: end for end in engine.run()}
    finally:
        handle.remove()
    failure = ends.pop("r1")
    assert isinstance(failure, Failure)
    for part in ("decoding of request 'r1'", "48×32", "cannot allocate 9 GiB", "GiB in all", "smaller or shorter"):
        assert part in str(failure.error)
    for id, video in ends.items():
        assert isinstance(video, Video)
        assert np.array_equal(video.frames, undisturbed[id].frames)


def test_a_text_that_does_not_fit_beside_running_videos_waits_for_them(
    components: Model, undisturbed: dict[str, Video]
) -> None:
    engine = Engine(components)

    def crowded(*_: object) -> None:
        if engine.running:
            raise MemoryError

    components.family.text.forget()
    handle = components.family.text.llama.register_forward_pre_hook(crowded)
    try:
        made = engine.generate(requests())
    finally:
        handle.remove()
    for video in made:
        assert video.provenance["batch"]["largest"] == 1
        assert np.array_equal(video.frames, undisturbed[video.request.id].frames)


def test_a_file_is_written_after_all_when_memory_is_free_again(
    components: Model, undisturbed: dict[str, Video], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_aside, refused = Video.written_aside, set()

    def scarce(video: Video, *args: object) -> object:
        if video.request.id not in refused:
            refused.add(video.request.id)
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return written_aside(video, *args)

    monkeypatch.setattr(Video, "written_aside", scarce)
    engine = Engine(components)
    outcomes = Folder(tmp_path, engine).make([request.for_model(engine.limits) for request in requests()])
    assert len(refused) == len(outcomes) == 5
    for outcome in outcomes:
        assert outcome.error is None
        frames = undisturbed[outcome.request.id].frames
        assert read_video(outcome.path).shape == frames.shape


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((make(), True) for make in ERRORS),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution forward"), False),
        (RuntimeError("size mismatch"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_an_allocators_refusal_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
