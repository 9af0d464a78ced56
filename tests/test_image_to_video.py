"""HunyuanVideo-I2V and SkyReels V1: each video of a batch is the video alone, and Diffusers' own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny
import tiny_i2v
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny15 import picture
from tiny_i2v import IMAGE_KINDS, KINDS, Kind, mixed
from torch import Tensor

from reelbatch import Video, VideoRequest
from reelbatch.engine.engine import Engine, Failure
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.llava import BLACK, ImageTextEncoder
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.images import Source
from reelbatch.models.prompts import PromptTemplate

DTYPES = ("float32", "transformer=bfloat16,text=bfloat16,vae=float32")
"""A VAE in bfloat16 takes a CPU a hundred times as long."""
EVERY = [(kind, DTYPES[0]) for kind in KINDS] + [(kind, DTYPES[1]) for kind in IMAGE_KINDS]
Models = dict[tuple[Kind, str], Model]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """Read only."""
    return {kind: tiny_i2v.make_folder(tmp_path_factory.mktemp("tiny"), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders: dict[Kind, Path]) -> Models:
    return {(kind, dtype): load(folders[kind], dtype=dtype) for kind, dtype in EVERY}


def videos(model: Model, requests: list[VideoRequest], **options: Any) -> dict[str, Video]:
    return {video.request.id: video for video in Engine(model, keep_latents=True, **options).generate(requests)}


def assert_same(video: Video, expected: Video) -> None:
    assert video.latents is not None and expected.latents is not None
    assert torch.equal(video.latents, expected.latents)
    assert np.array_equal(video.frames, expected.frames)


@pytest.mark.parametrize(("kind", "dtype"), EVERY)
def test_every_video_of_a_batch_is_the_video_alone(models: Models, kind: Kind, dtype: str) -> None:
    model, requests = models[kind, dtype], mixed(kind)
    together, pairs = videos(model, requests), videos(model, requests[::-1], max_batch_size=2)
    neighbours = [request.model_copy(update={"prompt": "night", "seed": 9}) for request in requests]
    late = joined_late(model, [neighbours[0], *requests[1:]])
    for number, request in enumerate(requests):
        model.family.release()
        expected = videos(model, [request])[request.id]
        assert expected.frames.shape[:3] == (request.frames or 5, *expected.frames.shape[1:3])
        for found in (together, pairs, *([late] if number else [])):
            assert_same(found[request.id], expected)


def joined_late(model: Model, requests: list[VideoRequest]) -> dict[str, Video]:
    """Each request is submitted a step after the one before it."""
    engine, results = Engine(model, keep_latents=True), list[Video | Failure]()
    for request in requests:
        engine.submit(request)
        results += engine.step()
    results += engine.run()
    assert all(isinstance(video, Video) for video in results)
    return {video.request.id: video for video in results if isinstance(video, Video)}


SHAPES = [(64, 96), (96, 64), (40, 100), (64, 64)]


@settings(max_examples=4, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(["a red cat", "night", "\n\nthe sea", "a"]),
            st.sampled_from(SHAPES),
            st.sampled_from([(32, 32), (32, 48), (48, 16)]),
            st.sampled_from([1, 5, 9]),
            st.sampled_from([1.0, 3.0]),
        ),
        min_size=2,
        max_size=4,
    ),
    kind=st.sampled_from(IMAGE_KINDS),
    order=st.randoms(use_true_random=False),
)
def test_any_batch_of_images_is_exact(models: Models, asked: list[Any], kind: Kind, order: Any) -> None:
    requests = [
        VideoRequest(
            prompt=prompt,
            image=picture(*shape),
            height=height,
            width=width,
            frames=frames,
            true_cfg=cfg,
            guidance=cfg,
            negative_prompt="blurry",
            steps=1 + number % 2,
            seed=number,
            id=str(number),
        )
        for number, (prompt, shape, (height, width), frames, cfg) in enumerate(asked)
    ]
    order.shuffle(requests)
    model = models[kind, DTYPES[0]]
    for id, video in videos(model, requests).items():
        assert_same(video, videos(model, [request for request in requests if request.id == id])[id])


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_packed_equals_exact_to_rounding(models: Models, kind: Kind) -> None:
    model = models[kind, DTYPES[0]]
    exact = videos(model, mixed(kind))
    for id, video in videos(model, mixed(kind), isolation="packed").items():
        assert video.latents is not None and exact[id].latents is not None
        torch.testing.assert_close(video.latents, exact[id].latents, rtol=1e-4, atol=1e-4)


# -- the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_videos_are_those_of_diffusers_pipeline(models: Models, kind: Kind, cfg: float) -> None:
    """With an image of the video's shape: the reference stretches others."""
    pipe, content = tiny_i2v.pipeline(kind), picture(96, 64)
    skyreels = kind.startswith("skyreels")
    options: dict[str, Any] = {"guidance_scale": 1.0 if skyreels else 5.0}
    if kind in IMAGE_KINDS:
        options["image"] = PIL.Image.open(io.BytesIO(content))
    if not skyreels:
        options["prompt_template"] = tiny_i2v.prompt_template(pipe.tokenizer)
    latents: list[Tensor] = []
    frames = pipe(
        prompt="a red cat",
        negative_prompt="blurry",
        true_cfg_scale=cfg,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=lambda pipe, step, t, tensors: latents.append(tensors["latents"]) or {},
        output_type="pt",
        **options,
    ).frames[0]
    request = VideoRequest(
        prompt="a red cat",
        negative_prompt="blurry",
        image=content if kind in IMAGE_KINDS else None,
        true_cfg=cfg,
        guidance=cfg if skyreels else 5.0,
        seed=3,
        height=32,
        width=48,
        frames=5 if kind == "latent_concat" else 9,  # its first four are not shown
        steps=8,
        id="r",
    )
    video = videos(models[kind, DTYPES[0]], [request])["r"]
    assert video.latents is not None
    assert (video.latents - latents[-1][0]).abs().max() <= 1e-4 * latents[-1].abs().max()
    assert np.abs(video.frames - frames.permute(0, 2, 3, 1).numpy() * 255).max() <= 1


def branch(channels: int, guided: bool, seed: int) -> Branch:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frames, height, text = 1 + seed, 4 + 2 * seed, 9 + 5 * seed
    timestep, guidance = torch.tensor(900.0 - 300 * seed), torch.tensor(5000.0)
    return Branch(
        noise(channels, frames, height, 6), noise(text, 32), noise(24), timestep, guidance if guided else None
    )


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@torch.no_grad()
def test_the_transformer_is_diffusers(kind: Kind) -> None:
    theirs = tiny.transformer(**tiny_i2v.TRANSFORMERS[kind])
    ours = HunyuanVideoTransformer3DModel.from_config(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    channels, guided = theirs.config.in_channels, theirs.config.guidance_embeds
    branches = [branch(channels, guided, seed) for seed in range(3)]
    for velocity, one in zip(ours(packs=[branches])[0], branches, strict=True):
        expected = theirs(
            one.latents[None],
            one.timestep[None],
            one.text[None],
            torch.ones(1, len(one.text)),
            one.pooled[None],
            None if one.guidance is None else one.guidance[None],
        ).sample[0]
        assert (velocity - expected).abs().max() <= 1e-5 * expected.abs().max()


PROMPTS = ["", "a red cat", "\n\n\na dog", "cat " * 300, "a <|end_header_id|> horse", "night " * 255 + "\nsea"]


@pytest.mark.filterwarnings("ignore::reelbatch.models.prompts.PromptCutWarning")
@pytest.mark.parametrize("stride", [2, 4])
@torch.no_grad()
def test_states_are_diffusers_at_true_length(stride: int) -> None:
    pipe = tiny_i2v.pipeline("token_replace")
    theirs, template = tiny_i2v.pipeline("token_replace"), tiny_i2v.prompt_template(pipe.tokenizer)
    encoder = ImageTextEncoder(
        pipe.text_encoder.model,
        pipe.tokenizer,
        pipe.image_processor,
        pipe.text_encoder_2,
        pipe.tokenizer_2,
        stride,
        PromptTemplate(template["template"], template["crop_start"]),
    )
    image = PIL.Image.open(io.BytesIO(picture(90, 64)))
    for source, shown in ((Source(lambda: image, "image"), image), (BLACK, PIL.Image.new("RGB", (90, 64)))):
        for prompt in PROMPTS:
            expected, pooled, mask = theirs.encode_prompt(
                shown, prompt, prompt_template=template, image_embed_interleave=stride
            )
            states = encoder.encode(prompt, source, stride)
            torch.testing.assert_close(states.text, expected[0][mask[0].bool()], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(states.pooled, pooled[0], rtol=1e-4, atol=1e-5)
