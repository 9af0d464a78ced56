"""HunyuanVideo 1.5's towers against the pipelines' own encoding, and that no prompt or image depends on another."""

from __future__ import annotations

import warnings

import PIL.Image
import pytest
import tiny15
import torch
from addresses import ODD_OFFSETS, bits_by_address, place_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageDraw
from torch import Tensor

from reelbatch.models.hunyuan_video15.images import ImageEncoder
from reelbatch.models.hunyuan_video15.text import DEFAULT_TEMPLATE, TextEncoder, glyph_text
from reelbatch.models.hunyuan_video15.vae import VideoDecoder
from reelbatch.models.images import fit, nearest_size
from reelbatch.models.prompts import PromptCutWarning, PromptTemplate

PIPE = tiny15.pipeline()
PROMPTS = [
    "",
    " ",
    "a red cat",
    "\n\n\na dog",
    'a large sign that says "go slowly" at night',
    'a robot, “Open” and "in", “Open” again',
    'nothing in "" quotes',
    "two horses; zigzag 1234 éàü 猫 “猫”",
    "<|im_end|> braces {} {0} stay",
]


def make(**options: object) -> TextEncoder:
    return TextEncoder(PIPE.text_encoder, PIPE.tokenizer, PIPE.text_encoder_2, PIPE.tokenizer_2, **options)


@torch.no_grad()
def reference(prompt: str) -> tuple[Tensor, Tensor]:
    """Diffusers' states of the valid tokens, of Qwen and of ByT5."""
    text, text_mask, glyphs, glyph_mask = PIPE.encode_prompt(prompt)
    return text[0][text_mask[0].bool()], glyphs[0][glyph_mask[0].bool()]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 5e-6 * theirs.abs().max()


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_equals_diffusers_at_true_length(prompt: str) -> None:
    """Also where the beginning of the template is not run again: cached keys and values give the same to rounding."""
    states, (text, glyphs) = make().encode(prompt), reference(prompt)
    assert_close(states.text, text)
    if states.glyphs is None:
        assert len(glyphs) == 0
    else:
        assert_close(states.glyphs, glyphs)


def test_the_template_is_the_references_to_the_space() -> None:
    chat = [{"role": "system", "content": PIPE.system_message}, {"role": "user", "content": "a cat"}]
    rendered = PIPE.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert DEFAULT_TEMPLATE.template.format("a cat") == rendered
    assert make().crop_start == PIPE.prompt_template_encode_start_idx == 108


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("no quotes", None),
        ('one " alone', None),
        ('"across\nlines"', None),
        ('say "go"', 'Text "go". '),
        ('say “go” or "stop", “go”', 'Text "go". Text "stop". '),
        ('""', 'Text "". '),
        ('“mixed"', None),
    ],
)
def test_glyph_text_is_what_stands_in_either_pair_of_quotes(prompt: str, expected: str | None) -> None:
    assert glyph_text(prompt) == expected


@given(st.text(st.sampled_from('ab"“” \n'), max_size=24))
def test_glyph_text_is_diffusers(prompt: str) -> None:
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

    assert glyph_text(prompt) == extract_glyph_texts(prompt)


@settings(max_examples=8, deadline=None)
@given(prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=5))
def test_what_came_before_changes_no_bit(prompts: list[str]) -> None:
    used = make(cache_size=1)
    for prompt in prompts:
        ours, fresh = used.encode(prompt), make().encode(prompt)
        assert torch.equal(ours.text, fresh.text)
        assert ours.glyphs is None if fresh.glyphs is None else torch.equal(ours.glyphs, fresh.glyphs)


def test_the_prefix_is_run_once_and_equal_prompts_and_glyphs_are_encoded_once() -> None:
    lengths, encoder = [], make()
    hooks = [
        table.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
        for table in (PIPE.text_encoder.embed_tokens, PIPE.text_encoder_2.encoder.embed_tokens)
    ]
    first = encoder.encode('a red "go"')
    other = encoder.encode('a blue "go"')
    again = encoder.encode('a red "go"')
    for hook in hooks:
        hook.remove()
    assert lengths == [108, len(first.text), len('Text "go". ') + 1, len(other.text)]
    assert again.text is first.text
    assert again.glyphs is first.glyphs is other.glyphs


def test_bits_do_not_depend_on_addresses() -> None:
    expected = [make().encode(prompt) for prompt in ('"', 'a "')]
    expected.append(make().encode('""'))
    pipe = tiny15.pipeline("text")
    for network in (pipe.text_encoder, pipe.text_encoder_2):
        place_weights(network, *ODD_OFFSETS)
    encoder = TextEncoder(pipe.text_encoder, pipe.tokenizer, pipe.text_encoder_2, pipe.tokenizer_2)
    with bits_by_address() as calls:
        found = [encoder.encode(prompt) for prompt in ('"', 'a "', '""')]
    assert not calls
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.text, theirs.text)
    assert torch.equal(found[2].glyphs, expected[2].glyphs)


def test_long_prompts_are_cut_as_diffusers_cuts_them_and_the_words_are_quoted() -> None:
    long = "a small red cat " * 260
    with pytest.warns(PromptCutWarning, match="1000 tokens.*cut: 'a small red cat"):
        text = make().encode(long).text
    assert len(text) == 1000
    assert_close(text, reference(long)[0])

    with pytest.warns(PromptCutWarning, match=r"256 tokens.*cut: 'x+stop\"\.'"):
        glyphs = make().encode(f'"{"x" * 250}stop"').glyphs
    assert len(glyphs) == 256
    assert_close(glyphs, reference(f'"{"x" * 250}stop"')[1])


def test_only_the_end_of_the_template_cut_is_no_loss() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(make(max_tokens=3).encode("a red cat").text) == 3


def test_another_template_can_be_given() -> None:
    encoder = make(template=PromptTemplate("<|im_start|>{}<|im_end|>"))
    assert encoder.crop_start == 1
    assert len(encoder.encode("a red cat").text) == 4
    with pytest.raises(ValueError, match="crop_start is 9"):
        make(template=PromptTemplate("{}<|im_end|>", 9))


# -- images ----------------------------------------------------------------------------------------


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    image = PIL.Image.fromarray(noise.numpy())
    ImageDraw.Draw(image).rectangle((2, 2, width // 2, height // 2), fill=(200, 30, 60))
    return image.convert(mode)


def encoder() -> ImageEncoder:
    return ImageEncoder(PIPE.image_encoder, PIPE.feature_extractor, VideoDecoder(tiny15.vae(0)))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (200, 30), (64, 64), (48, 80)])
@torch.no_grad()
def test_an_image_equals_diffusers(size: tuple[int, int]) -> None:
    image = picture(*size)
    height, width = nearest_size(image.height, image.width, 64, 16)
    assert (height, width) == PIPE.video_processor.calculate_default_height_width(image.height, image.width, 64)
    cropped = PIPE.video_processor.resize(image, height=height, width=width, resize_mode="crop")
    states = PIPE.encode_image(cropped, 1, torch.device("cpu"), torch.float32)[0]
    args = (PIPE.video_processor, cropped, height, width, torch.device("cpu"))
    latents = PIPE._get_image_latents(PIPE.vae, *args)[0, :, 0]

    ours = encoder().encode(lambda: image, "one", height, width)
    assert ours.latents.shape == (4, height // 16, width // 16)
    assert ours.states.shape == (9, 20)
    assert (ours.states - states).abs().max() <= 5e-6 * states.abs().max()
    assert (ours.latents - latents).abs().max() <= 1e-5


def test_an_image_is_opened_and_encoded_once_a_size() -> None:
    opened, images = [], encoder()

    def source() -> PIL.Image.Image:
        opened.append(1)
        return picture(60, 40)

    first = images.encode(source, "one", 48, 64)
    assert images.encode(source, "one", 48, 64) is first
    other_size, other_image = images.encode(source, "one", 64, 48), images.encode(source, "two", 48, 64)
    assert len(opened) == 3
    assert other_size.latents.shape != first.latents.shape
    assert torch.equal(other_image.states, first.states)
    images.forget()
    again = images.encode(source, "one", 48, 64)
    assert again is not first
    assert torch.equal(again.states, first.states)
    assert torch.equal(again.latents, first.latents)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 6), st.integers(1, 6))
def test_any_image_covers_any_frame(width: int, height: int, rows: int, columns: int) -> None:
    fitted = fit(picture(width + 4, height + 4), 16 * rows, 16 * columns)
    assert fitted.size == (16 * columns, 16 * rows)
    assert fitted.mode == "RGB"


@pytest.mark.parametrize(
    ("image", "target", "size"),
    [
        ((1280, 720), 640, (480, 848)),
        ((1000, 1000), 640, (640, 640)),
        ((1280, 720), 960, (720, 1280)),
        ((3, 4000), 640, (1280, 320)),
    ],
)
def test_the_nearest_size(image: tuple[int, int], target: int, size: tuple[int, int]) -> None:
    assert nearest_size(image[1], image[0], target, 16) == size
