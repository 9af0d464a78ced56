"""The repaired HunyuanVideo 1.5 transformer: samples of a batch are as alone, to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from video15 import (
    GLYPH_LENGTHS,
    HAS_IMAGE,
    IMAGE,
    TEXT_LENGTHS,
    differences,
    make_transformer,
    mixed_batch,
    repair,
    run,
    solo,
)

VIDEO = 3 * 4 * 2
"""Video tokens of a sample at patch 1."""
VALID = tuple(n + m + IMAGE * i for n, m, i in zip(TEXT_LENGTHS, GLYPH_LENGTHS, HAS_IMAGE, strict=True))


@pytest.mark.parametrize(
    "changes",
    [{}, {"patch_size": 2, "num_layers": 1}, {"use_meanflow": True, "num_layers": 1}],
    ids=["patch1", "patch2", "meanflow"],
)
@torch.no_grad()
def test_every_sample_is_its_solo_one(changes):
    model, batch = make_transformer(**changes), mixed_batch()
    if "use_meanflow" in changes:
        batch["timestep_r"] = batch["timestep"] - 50
    expected = solo(model, batch)
    unrepaired = run(model, batch)
    repair(transformer=model)
    found = run(model, batch)
    assert max(differences(found, expected)) <= 1e-5
    # the fault: samples 0 and 2 are text-to-video ones beside others with an image
    faulty = differences(unrepaired, expected)
    assert faulty[0] > 1e-3
    assert faulty[2] > 1e-3


@torch.no_grad()
def test_text_to_video_alone_and_samples_of_one_length(transformer):
    batch = mixed_batch()
    batch["image_embeds"].zero_()
    same = {name: tensor[[1, 1]] for name, tensor in batch.items()}
    expected, expected_same = solo(transformer, batch), solo(transformer, same)
    repair(transformer=transformer)
    assert max(differences(run(transformer, batch), expected)) <= 1e-5
    assert max(differences(run(transformer, same), expected_same)) <= 1e-5


@torch.no_grad()
def test_one_image_for_the_videos_of_a_prompt(transformer):
    """Diffusers' text-to-video pipeline makes image embeddings for the prompts, not for their videos."""
    batch = mixed_batch()
    batch["image_embeds"] = batch["image_embeds"][[0, 0, 1, 1]]
    expected = solo(transformer, batch)
    batch["image_embeds"] = batch["image_embeds"][[0, 2]]
    with pytest.raises(RuntimeError):
        run(transformer, batch)
    repair(transformer=transformer)
    assert max(differences(run(transformer, batch), expected)) <= 1e-5


@torch.no_grad()
def test_no_mask_and_only_valid_tokens(transformer, attention_calls):
    batch = mixed_batch()
    run(transformer, batch)
    assert {mask is None for mask, *_ in attention_calls} == {False}  # the fault
    attention_calls.clear()
    repair(transformer=transformer)
    run(transformer, batch)
    refined = [(None, 1, n, n) for n in TEXT_LENGTHS]
    joint = [(None, 1, VIDEO + n, VIDEO + n) for n in VALID]
    assert attention_calls == 2 * refined + 2 * joint
    # samples of one length go in one call
    attention_calls.clear()
    run(transformer, {name: tensor[[1, 1]] for name, tensor in batch.items()})
    n = VIDEO + VALID[1]
    assert attention_calls == 2 * [(None, 2, TEXT_LENGTHS[1], TEXT_LENGTHS[1])] + 2 * [(None, 2, n, n)]


@torch.no_grad()
def test_what_is_padded_does_not_matter(transformer):
    repair(transformer=transformer)
    batch = mixed_batch()
    expected = run(transformer, batch)
    for tokens, mask in (
        ("encoder_hidden_states", "encoder_attention_mask"),
        ("encoder_hidden_states_2", "encoder_attention_mask_2"),
    ):
        batch[tokens] = batch[tokens].masked_fill(batch[mask][..., None] == 0, float("nan"))
    assert torch.equal(run(transformer, batch), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_solo_runs(transformer, checkpointing):
    batch, unrepaired = mixed_batch(), copy.deepcopy(transformer)
    repair(transformer=transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    solo(unrepaired, batch).square().sum().backward()
    run(transformer, batch).square().sum().backward()
    for (name, found), expected in zip(
        transformer.named_parameters(), (p.grad for p in unrepaired.parameters()), strict=True
    ):
        if expected is None:  # what Diffusers does not use either
            assert found.grad is None or not found.grad.any(), name
        else:
            assert (found.grad - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-9, name


@torch.no_grad()
def test_bfloat16():
    """Within the rounding of bfloat16: no further from fp32 than Diffusers' own solo run."""
    model, batch = make_transformer(), mixed_batch()
    exact = solo(model, batch)
    model, batch = model.to(torch.bfloat16), mixed_batch(torch.bfloat16)
    rounding = max(differences(solo(model, batch).float(), exact))
    repair(transformer=model)
    assert max(differences(run(model, batch).float(), exact)) <= 1.5 * rounding


@torch.no_grad()
def test_parts_still_take_masks(transformer):
    """Whoever calls a part by itself with a mask, as Diffusers does, gets what Diffusers gives."""
    batch = mixed_batch()
    mask, timestep = batch["encoder_attention_mask"], batch["timestep"]

    def parts() -> tuple[torch.Tensor, ...]:
        text = transformer.context_embedder(batch["encoder_hidden_states"], timestep, mask)
        video = transformer.x_embedder(batch["hidden_states"])
        rotary, temb = transformer.rope(batch["hidden_states"]), transformer.time_embed(timestep)
        unmasked = transformer.context_embedder(batch["encoder_hidden_states"], timestep)
        return unmasked, text, *transformer.transformer_blocks[0](video, text, temb, mask, rotary)

    expected = parts()
    repair(transformer=transformer)
    assert all(torch.equal(*pair) for pair in zip(parts(), expected, strict=True))


@torch.no_grad()
def test_keeps_attention_backend(transformer):
    transformer.set_attention_backend("_native_math")
    repair(transformer=transformer)
    processor = transformer.transformer_blocks[0].attn.processor
    assert processor._attention_backend == "_native_math"
    expected = solo(make_transformer(), mixed_batch())
    assert max(differences(run(transformer, mixed_batch()), expected)) <= 1e-5


@torch.no_grad()
def test_compiled(transformer):
    """One that `torch.compile` wrapped and ran before is found inside, and compiled anew."""
    batch = mixed_batch()
    expected = solo(transformer, batch)
    compiled = torch.compile(transformer, backend="eager")
    run(compiled, batch)
    repair(transformer=compiled)
    assert max(differences(run(compiled, batch), expected)) <= 1e-5


def test_what_is_missing_is_named(transformer):
    repair(transformer=transformer)
    batch = mixed_batch()
    del batch["image_embeds"]
    with pytest.raises(ValueError, match="image_embeds"):
        run(transformer, batch)
