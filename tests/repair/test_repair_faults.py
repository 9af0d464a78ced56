"""Faults of Diffusers' batches: each is first shown on the unrepaired pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pipelines import PROMPTS, SCALES, SEEDS, TOKENS, difference, generate
from torch import Tensor

import reelbatch


def text_lengths(pipe: Any, prompts: list[str]) -> list[int]:
    mask = pipe.encode_prompt(prompts, max_sequence_length=TOKENS)[2]
    return [int(row.sum()) for row in mask]


def test_padded_text_and_masks(pipe, attention_calls):
    lengths = text_lengths(pipe, PROMPTS[:3])
    assert len(set(lengths)) == 3
    video = 2 * 2 * 2
    generate(pipe, PROMPTS[:3], SEEDS[:3], num_inference_steps=1)
    calls = [(mask is not None, *sizes) for mask, *sizes in attention_calls]
    # the fault: a mask in every call, and the padding in every block
    assert set(calls[-4:]) == {(True, 3, video + TOKENS, video + TOKENS)}
    assert calls[-6:-4] == 2 * [(True, 3, TOKENS, TOKENS)]
    reelbatch.repair(pipe)
    attention_calls.clear()
    generate(pipe, PROMPTS[:3], SEEDS[:3], num_inference_steps=1)
    refined = [(None, 1, n, n) for n in lengths for _ in range(2)]
    joint = [(None, 1, video + n, video + n) for n in lengths]
    assert attention_calls[-18:] == refined + 4 * joint


@pytest.mark.parametrize("place", ["left", "holes"])
def test_padding_leaks(pipe, place):
    states, pooled, _ = pipe.encode_prompt(PROMPTS[1], max_sequence_length=TOKENS)
    length = text_lengths(pipe, PROMPTS[1:2])[0]
    at = torch.arange(TOKENS - length, TOKENS) if place == "left" else 2 * torch.arange(length)
    room = int(at[-1]) + 1
    mask = torch.zeros(1, room).index_fill(1, at, 1.0)

    def run(padding: float) -> Tensor:
        embeds = torch.full((1, room, 32), padding).index_copy(1, at, states[:, :length])
        return generate(pipe, prompt_embeds=embeds, pooled_prompt_embeds=pooled, prompt_attention_mask=mask)

    alone = {"prompt_embeds": states[:, :length], "pooled_prompt_embeds": pooled}
    expected = generate(pipe, **alone, prompt_attention_mask=torch.ones(1, length))
    assert difference(generate(pipe, PROMPTS[1]), expected) <= 1e-5  # right padding was right
    assert difference(run(0.0), expected) > 1e-3  # the fault
    assert difference(run(0.0), run(5.0)) > 1e-3
    reelbatch.repair(pipe)
    trimmed = generate(pipe, **alone, prompt_attention_mask=torch.ones(1, length))
    assert difference(trimmed, expected) <= 1e-5
    for padding in (0.0, 5.0, float("nan")):
        assert torch.equal(run(padding), trimmed)
    assert torch.equal(generate(pipe, PROMPTS[1]), trimmed)


def test_prompt_2_is_ignored(pipe):
    states, _, mask = pipe.encode_prompt(PROMPTS[0], max_sequence_length=TOKENS)
    pooled = pipe.encode_prompt(PROMPTS[1])[1]
    given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
    expected = generate(pipe, **given)
    plain = generate(pipe, PROMPTS[0])
    assert difference(expected, plain) > 1e-3
    assert torch.equal(generate(pipe, PROMPTS[0], prompt_2=PROMPTS[1]), plain)  # the fault
    reelbatch.repair(pipe)
    found = generate(pipe, PROMPTS[0], prompt_2=PROMPTS[1])
    assert difference(found, expected) <= 1e-5
    assert difference(generate(pipe, PROMPTS[0]), plain) <= 1e-5
    # one for all prompts, or one each
    several = generate(pipe, PROMPTS[:2], SEEDS[:2], prompt_2=PROMPTS[1])
    assert torch.equal(several, generate(pipe, PROMPTS[:2], SEEDS[:2], prompt_2=[PROMPTS[1]] * 2))
    assert torch.equal(several[:1], found)


def test_prompt_2_of_the_negative_prompt_and_wrong_counts(pipe):
    reelbatch.repair(pipe)
    options = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
    plain = generate(pipe, PROMPTS[0], **options)
    other = generate(pipe, PROMPTS[0], negative_prompt_2="low quality", **options)
    assert difference(other, plain) > 1e-4
    assert torch.equal(generate(pipe, PROMPTS[0], negative_prompt_2="blurry", **options), plain)
    for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
        for prompt, seeds in ((PROMPTS[:2], SEEDS[:2]), (PROMPTS[0], SEEDS[:1])):
            with pytest.raises(ValueError, match=f"{name} has 3 texts for {len(seeds)} prompts: give one, or one"):
                generate(pipe, prompt, seeds, **{**options, name: PROMPTS[:3]})


def test_embeddings_with_several_videos(pipe):
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    given = dict(zip(names, pipe.encode_prompt(PROMPTS[:2], max_sequence_length=TOKENS), strict=True))
    negative = pipe.encode_prompt(["blurry", "grey"], max_sequence_length=TOKENS)
    given |= {f"negative_{name}": value for name, value in zip(names, negative, strict=True)}
    several = {"seeds": SEEDS, "num_videos_per_prompt": 2, "true_cfg_scale": 3.0}
    expected = generate(pipe, PROMPTS[:2], negative_prompt=["blurry", "grey"], **several)
    with pytest.raises(RuntimeError):  # the fault
        generate(pipe, **given, **several)
    reelbatch.repair(pipe)
    found = generate(pipe, **given, **several)
    assert difference(found, expected) <= 1e-5
    # no two of the four videos are of the same prompt and seed, and each is at its place
    assert min(difference(found[[i]], expected[[k]]) for i in range(4) for k in range(4) if i != k) > 1e-2


def test_embeddings_without_a_mask(pipe):
    states, pooled, mask = pipe.encode_prompt(PROMPTS[1], max_sequence_length=TOKENS)
    trimmed = states[:, : int(mask.sum())]
    given = {"prompt_embeds": trimmed, "pooled_prompt_embeds": pooled}
    expected = generate(pipe, PROMPTS[1])
    with pytest.raises(AttributeError, match="NoneType"):  # the fault
        generate(pipe, **given)
    reelbatch.repair(pipe)
    assert difference(generate(pipe, **given), expected) <= 1e-5
    both = generate(pipe, **given, seeds=SEEDS[:2], num_videos_per_prompt=2)
    assert torch.equal(both[:1], generate(pipe, **given))
    with pytest.raises(ValueError, match="without pooled_prompt_embeds"):
        generate(pipe, prompt_embeds=trimmed)


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_a_list_of_guidance_scales(pipe, kind):
    alone = [
        generate(pipe, prompt, [seed], guidance_scale=scale)
        for prompt, seed, scale in zip(PROMPTS, SEEDS, SCALES, strict=True)
    ]
    assert difference(alone[0], generate(pipe, PROMPTS[0], guidance_scale=SCALES[1])) > 1e-3
    with pytest.raises((AssertionError, ValueError, TypeError)):  # the fault
        generate(pipe, PROMPTS, SEEDS, guidance_scale=kind(SCALES))
    reelbatch.repair(pipe)
    assert difference(generate(pipe, PROMPTS, SEEDS, guidance_scale=kind(SCALES)), torch.cat(alone)) <= 1e-5


def test_a_scale_for_a_prompt_or_for_a_video(pipe):
    reelbatch.repair(pipe)
    order = [(PROMPTS[0], 0), (PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[1], 1)]

    def expected(scales: list[float]) -> Tensor:
        return torch.cat(
            [
                generate(pipe, prompt, [seed], guidance_scale=scale)
                for (prompt, _), seed, scale in zip(order, SEEDS, scales, strict=True)
            ]
        )

    several = {"prompt": PROMPTS[:2], "seeds": SEEDS, "num_videos_per_prompt": 2}
    a, b, c, d = SCALES
    assert torch.equal(generate(pipe, guidance_scale=[a, b], **several), expected([a, a, b, b]))
    assert torch.equal(generate(pipe, guidance_scale=[a, b, c, d], **several), expected([a, b, c, d]))
    both = generate(pipe, PROMPTS[0], SEEDS[:2], num_videos_per_prompt=2, guidance_scale=[a, b])
    assert torch.equal(both, expected([a, b, c, d])[:2])
    for scales in ([a], [a, b, c], [], SCALES + SCALES):
        with pytest.raises(
            ValueError, match=rf"guidance_scale has {len(scales)} scales for 2 prompts of 2 videos .*2 \(one a pro"
        ):
            generate(pipe, guidance_scale=scales, **several)
    number = generate(pipe, PROMPTS[0], guidance_scale=a)
    for same in (np.float32(a), torch.tensor(a), [a]):
        assert torch.equal(generate(pipe, PROMPTS[0], guidance_scale=same), number)


def test_one_negative_prompt_for_several_prompts(pipe):
    options = {"true_cfg_scale": 3.0}
    expected = generate(pipe, PROMPTS[:2], SEEDS[:2], negative_prompt=["blurry"] * 2, **options)
    with pytest.raises(RuntimeError):  # the fault
        generate(pipe, PROMPTS[:2], SEEDS[:2], negative_prompt="blurry", **options)
    encoded = dict(
        zip(
            ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
            pipe.encode_prompt(PROMPTS[:2], max_sequence_length=TOKENS),
            strict=True,
        )
    )
    reelbatch.repair(pipe)
    found = generate(pipe, PROMPTS[:2], SEEDS[:2], negative_prompt="blurry", **options)
    assert difference(found, expected) <= 1e-5
    assert torch.equal(generate(pipe, **encoded, seeds=SEEDS[:2], negative_prompt="blurry", **options), found)
    four = {"seeds": SEEDS, "num_videos_per_prompt": 2, **options}
    assert torch.equal(
        generate(pipe, PROMPTS[:2], negative_prompt="blurry", **four),
        generate(pipe, PROMPTS[:2], negative_prompt=["blurry"] * 2, **four),
    )


def test_what_was_done_is_told_once(pipe):
    done = reelbatch.repair(pipe)
    assert len(done) == 2
    assert "flash" in str(done[0]) and " → " in str(done[0])
    assert "prompt_2" in done[1].fault and "prompt_2" in done[1].cure
    assert reelbatch.repair(pipe) == []
