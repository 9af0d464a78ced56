"""HunyuanVideo 1.5 in the engine: each video of a mixed batch is the video alone, and Diffusers' own."""

from __future__ import annotations

import io
from typing import Any

import PIL.Image
import pytest
import tiny
import tiny15
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny15 import mixed, picture
from torch import Tensor

from reelbatch import VideoRequest
from reelbatch.engine.engine import Engine
from reelbatch.loading.model import Model
from reelbatch.video import Video


@pytest.fixture(scope="module", params=[False, True], ids=["guided", "meanflow"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny15.model(tiny15.pipeline(use_meanflow=request.param))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_video_of_a_mixed_batch_is_the_video_alone(model: Model, dtype: torch.dtype) -> None:
    family = model.family
    family.transformer.to(dtype)
    try:
        together = Engine(model).generate(mixed())
        backwards = Engine(model, max_batch_size=2).generate(mixed()[::-1])[::-1]
        for video, again, request in zip(together, backwards, mixed(), strict=True):
            family.forget()
            (alone,) = Engine(model).generate(request)
            assert video.frames_sha256 == alone.frames_sha256 == again.frames_sha256, request.prompt
    finally:
        family.transformer.to(torch.float32)


WORDS = st.sampled_from([*tiny.WORDS[:12], '"go"', "“stop”", '"a" "b"', '""', "Straße", "夜"])
PROMPTS = st.lists(WORDS, max_size=6).map(" ".join)
IMAGES = st.builds(picture, st.integers(4, 90), st.integers(4, 90), st.integers(0, 3))
SIZES = st.none() | st.tuples(st.sampled_from([16, 32, 48]), st.sampled_from([16, 32]))


@st.composite
def requests(draw: st.DrawFn, id: str) -> VideoRequest:
    """Text to video, or image to video of an image of any shape, with a size or without."""
    image, size = draw(st.none() | IMAGES), draw(SIZES)
    return VideoRequest(
        id=id,
        prompt=draw(PROMPTS.filter(str.strip)),
        negative_prompt=draw(st.none() | PROMPTS),
        guidance=draw(st.sampled_from([None, 1.0, 2.5])),
        seed=draw(st.integers(0, 2**32)),
        frames=draw(st.sampled_from([1, 5, 9])),
        steps=draw(st.integers(1, 3)),
        image=image,
        height=size[0] if size else None,
        width=size[1] if size else None,
    )


@settings(max_examples=4, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), order=st.permutations(range(3)), late=st.integers(0, 3))
def test_any_batch_gives_every_request_the_bits_that_it_gives_alone(
    model: Model, data: st.DataObject, batch: int, order: list[int], late: int
) -> None:
    """Sizes, prompts and images of any shape, in any order, some of them submitted while others run."""
    asked = [data.draw(requests(str(number)), label=f"request {number}") for number in range(3)]
    waiting = [asked[number] for number in order]
    engine = Engine(model, max_batch_size=batch)
    for request in waiting[late:]:
        engine.submit(request)
    videos = list(engine.step()) if late < 3 else []
    for request in waiting[:late]:
        engine.submit(request)
    while engine.waiting or engine.running:
        videos += engine.step()
    together = {video.request.id: video.frames_sha256 for video in videos if isinstance(video, Video)}
    for request in asked:
        model.family.forget()
        (alone,) = Engine(model).generate(request)
        assert together[request.id] == alone.frames_sha256


def test_packed_equals_exact_to_rounding(model: Model) -> None:
    packed = Engine(model, isolation="packed").generate(mixed())
    for video, exact in zip(packed, Engine(model).generate(mixed()), strict=True):
        assert (torch.as_tensor(video.frames).int() - torch.as_tensor(exact.frames).int()).abs().max() <= 1


@pytest.mark.parametrize("guidance", [1.0, tiny15.GUIDANCE])
@pytest.mark.parametrize("kind", ["text", "image", "meanflow"])
@torch.no_grad()
def test_a_video_is_that_of_diffusers_pipeline(kind: str, guidance: float) -> None:
    """Mean-flow of its image pipeline: the text pipeline forgets the second timestep; ours gives it to both."""
    image, changes = kind != "text", {"use_meanflow": kind == "meanflow"}
    pipe = tiny15.pipeline("image" if image else "text", **changes)
    pipe.guider = pipe.guider.new(guidance_scale=guidance)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"prompt": 'a red cat "go"', "negative_prompt": "blurry"}
    content = picture(64, 40)
    theirs = {"image": PIL.Image.open(io.BytesIO(content))} if image else {"height": 48, "width": 64}
    expected: Tensor = pipe(
        **options,
        **theirs,
        num_frames=9,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).frames
    decoded = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
    frames = pipe.video_processor.postprocess_video(decoded, output_type="pt")[0].permute(0, 2, 3, 1)

    ours = tiny15.model(tiny15.pipeline(**changes))
    request = VideoRequest(
        **options,
        seed=3,
        frames=9,
        steps=8,
        guidance=guidance,
        **({"image": content} if image else {"height": 48, "width": 64}),
    )
    latents = []
    decode = ours.family.decode
    ours.family.decode = lambda latent, side: latents.append(latent) or decode(latent, side)  # type: ignore[method-assign]
    (video,) = Engine(ours).generate(request)
    assert latents[0].shape == expected[0].shape
    assert (latents[0] - expected[0]).abs().max() <= 1e-4 * expected.abs().max()
    assert (torch.as_tensor(video.frames) - frames * 255).abs().max() <= 0.6
