"""models/text.py against Diffusers' own encode_prompt, and its promise that prompts do not depend on each other."""

from __future__ import annotations

import itertools
import warnings

import pytest
import tiny
import torch
from diffusers import HunyuanVideoPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from reelbatch.models.hunyuan_video.text import DEFAULT_TEMPLATE, PromptCutWarning, PromptTemplate, TextEncoder

PROMPTS = [
    "",
    "a",
    "a red cat",
    "  a cat in the rain",
    "\n\n\na dog",
    "two large horses, running at night; zigzag 1234 éàü 猫",
    " ".join(tiny.WORDS),
    "<|eot_id|> braces {} {0} stay",
]
NO_CROP = PromptTemplate("{}", 0)
SHORT = PromptTemplate("<|start_header_id|>\n\n{}<|eot_id|>", None)


@pytest.fixture
def encoder(tiny_pipeline: HunyuanVideoPipeline) -> TextEncoder:
    return make(tiny_pipeline)


def make(pipeline: HunyuanVideoPipeline, template: PromptTemplate = DEFAULT_TEMPLATE, **options) -> TextEncoder:
    return TextEncoder(
        pipeline.text_encoder, pipeline.tokenizer, pipeline.text_encoder_2, pipeline.tokenizer_2, template, **options
    )


def reference(pipeline: HunyuanVideoPipeline, prompt: str, template: PromptTemplate = DEFAULT_TEMPLATE, length=256):
    """Diffusers' states of the valid tokens, and its pooled vector."""
    with torch.no_grad():
        states, pooled, mask = pipeline.encode_prompt(
            prompt,
            prompt_template={"template": template.template, "crop_start": template.crop_start},
            max_sequence_length=length,
        )
    return states[0][mask[0].bool()], pooled[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max()


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, NO_CROP, SHORT], ids=["default", "no crop", "crop computed"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_equals_diffusers(tiny_pipeline, prompt, template):
    conditioning = make(tiny_pipeline, template).encode(prompt)
    states, pooled = reference(tiny_pipeline, prompt, template)
    assert_close(conditioning.text, states)
    assert_close(conditioning.pooled, pooled)


@pytest.mark.parametrize("words", range(1, 90, 8))
def test_equals_diffusers_at_every_length(tiny_pipeline, encoder, words):
    prompt = " ".join(itertools.islice(itertools.cycle(tiny.WORDS[:40]), words))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCutWarning)
        conditioning = encoder.encode(prompt)
    states, pooled = reference(tiny_pipeline, prompt)
    assert len(conditioning.text) == words + 1  # and the closing token
    assert_close(conditioning.text, states)
    assert_close(conditioning.pooled, pooled)


def test_default_template_crops_exactly_the_instructions(tiny_pipeline, encoder):
    assert encoder.crop_start == 95
    assert len(encoder.encode("").text) == 1
    assert len(encoder.encode("a red cat").text) == 4


def test_right_padding_changes_nothing(tiny_pipeline):
    """The reason why the prompts may go unpadded: both encoders are causal."""
    ids = tiny_pipeline.tokenizer("a red cat").input_ids
    for token in (tiny_pipeline.tokenizer.pad_token_id, ids[1]):
        padded = torch.tensor([ids + [token] * 40])
        plain = tiny_pipeline.text_encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-3]
        long = tiny_pipeline.text_encoder(padded, output_hidden_states=True).hidden_states[-3]
        assert_close(plain[0], long[0, : len(ids)])


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=6))
def test_what_came_before_changes_no_bit(tiny_pipeline, prompts):
    used = make(tiny_pipeline, cache_size=1)
    for prompt in prompts:
        ours, fresh = used.encode(prompt), make(tiny_pipeline).encode(prompt)
        assert torch.equal(ours.text, fresh.text)
        assert torch.equal(ours.pooled, fresh.pooled)


def test_prefix_is_run_once_and_equal_prompts_are_encoded_once(tiny_pipeline, encoder):
    lengths = []
    hook = tiny_pipeline.text_encoder.embed_tokens.register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    try:
        first = encoder.encode("a red cat")
        encoder.encode("a dog")
        again = encoder.encode("a red cat")
    finally:
        hook.remove()
    assert lengths == [95, 4, 3]
    assert again.text is first.text
    assert again.pooled is first.pooled


def test_prompt_that_merges_into_the_prefix_is_run_whole(tiny_pipeline):
    """Newlines before the prompt join the template's own: the ids are those of the whole text, not of two halves."""
    encoder = make(tiny_pipeline)
    whole = tiny_pipeline.tokenizer(DEFAULT_TEMPLATE.template.format("\n\na dog")).input_ids
    assert whole[:95] != encoder.states.prefix_ids
    assert_close(encoder.encode("\n\na dog").text, reference(tiny_pipeline, "\n\na dog")[0])


def test_failed_prompt_leaves_the_prefix_whole(tiny_pipeline, encoder):
    encoder.encode("a dog")

    def fail(module, inputs):
        raise RuntimeError("out of memory")

    hook = tiny_pipeline.text_encoder.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        encoder.encode("a red cat")
    hook.remove()
    assert torch.equal(encoder.encode("a red cat").text, make(tiny_pipeline).encode("a red cat").text)


def test_long_prompt_is_cut_as_diffusers_cuts_it_and_the_words_are_quoted(tiny_pipeline):
    encoder = make(tiny_pipeline, max_tokens=8)
    prompt = "a small red cat and two large dogs running slowly"
    with pytest.warns(PromptCutWarning, match="8 tokens.*cut: 'dogs running slowly'"):
        text = encoder.encode(prompt).text
    assert_close(text, reference(tiny_pipeline, prompt, length=8)[0])


def test_only_the_closing_token_cut_is_no_loss(tiny_pipeline):
    encoder = make(tiny_pipeline, max_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = encoder.encode("a red cat").text
    assert_close(text, reference(tiny_pipeline, "a red cat", length=3)[0])


def test_clip_cut_is_quoted(tiny_pipeline, encoder):
    prompt = "cat " * 75 + "dog in the rain"
    with pytest.warns(PromptCutWarning, match="77 tokens.*cut: 'dog in the rain'"):
        pooled = encoder.encode("a cat", prompt).pooled
    assert_close(pooled, reference(tiny_pipeline, prompt)[1])


def test_prompt_2_goes_to_clip_only(tiny_pipeline, encoder):
    plain, other = encoder.encode("a red cat"), encoder.encode("a red cat", "night, rain")
    assert torch.equal(plain.text, other.text)
    assert not torch.allclose(plain.pooled, other.pooled)
    assert_close(other.pooled, reference(tiny_pipeline, "night, rain")[1])
    assert torch.equal(encoder.encode("a red cat", "").pooled, encoder.encode("").pooled)


def test_bad_templates_are_refused(tiny_pipeline):
    for template in ("no place", "{} twice {}", "{name}", "{"):
        with pytest.raises(ValueError, match="prompt template"):
            PromptTemplate(template)
    with pytest.raises(ValueError, match="crop_start is -1"):
        PromptTemplate("{}", -1)
    with pytest.raises(ValueError, match=r"2 tokens long.*crop_start is 95"):
        make(tiny_pipeline, PromptTemplate("{}<|eot_id|>", 95))


def test_no_token_left_is_an_error(tiny_pipeline):
    with pytest.raises(ValueError, match="no token at all"):
        make(tiny_pipeline, PromptTemplate("{}", 1)).encode("")
