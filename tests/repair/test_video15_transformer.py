"""The repaired HunyuanVideo 1.5 transformer: samples of a batch are as alone."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from video15 import (
    GLYPH_LENGTHS,
    GLYPHS,
    HAS_IMAGE,
    IMAGE,
    TEXT,
    TEXT_LENGTHS,
    differences,
    make_transformer,
    mixed_batch,
    repair,
    run,
    solo,
)

from reelbatch.attention import HeadRules, own_frame
from reelbatch.models import hunyuan_video15

VIDEO = 3 * 4 * 2
"""Video tokens of a sample at patch 1."""
PADDED = IMAGE + GLYPHS + TEXT
VALID = tuple(n + m + IMAGE * i for n, m, i in zip(TEXT_LENGTHS, GLYPH_LENGTHS, HAS_IMAGE, strict=True))


def test_signature_is_that_of_diffusers():
    theirs, ours = (
        list(inspect.signature(kind.forward).parameters.values())
        for kind in (HunyuanVideo15Transformer3DModel, hunyuan_video15.HunyuanVideo15Transformer3DModel)
    )
    assert [each.name for each in ours] == [*(each.name for each in theirs), "packs"]
    assert [each.kind for each in ours[:-1]] == [each.kind for each in theirs]
    assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY
    for mine, their in zip(ours, theirs, strict=False):
        assert their.default in (mine.default, inspect.Parameter.empty)


@torch.no_grad()
def test_our_own_class_takes_what_diffusers_takes(transformer):
    ours = hunyuan_video15.HunyuanVideo15Transformer3DModel.from_config(transformer.config)
    ours.load_state_dict(transformer.state_dict())
    batch = mixed_batch()
    expected = solo(transformer, batch)
    by_position = [batch[name] for name in list(batch)[:4]]
    (sample,) = ours(*by_position, None, *(batch[name] for name in list(batch)[4:]), None, False)
    assert max(differences(sample, expected)) <= 1e-5
    found = ours(**batch)
    assert type(found) is Transformer2DModelOutput
    assert torch.equal(found.sample, sample)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bit_for_bit_whoever_else_is_there(transformer, dtype):
    transformer.to(dtype)
    repair(transformer=transformer)
    batch = mixed_batch(dtype)
    alone = solo(transformer, batch)
    for order in ([0, 1, 2, 3], [3, 1, 0], [2, 2]):
        assert torch.equal(run(transformer, {name: tensor[order] for name, tensor in batch.items()}), alone[order])
    transformer.isolation = "packed"
    assert max(differences(run(transformer, batch).float(), alone.float())) <= (
        1e-5 if dtype == torch.float32 else 5e-2
    )


@torch.no_grad()
def test_alignment_of_a_batch_does_not_matter(transformer):
    """A row of a batch begins where a tensor of its own would not."""
    repair(transformer=transformer)
    batch = mixed_batch()
    batch["hidden_states"] = torch.randn(4, 9, 1, 3, 5)[..., :3]
    for name, tensor in batch.items():
        if tensor.is_floating_point():
            batch[name] = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].reshape(tensor.shape)
    singles = [{name: tensor[[i]].clone() for name, tensor in batch.items()} for i in range(4)]
    assert torch.equal(run(transformer, batch), torch.cat([run(transformer, single) for single in singles]))


@torch.no_grad()
def test_meanflow_without_the_next_timestep():
    """Diffusers' text-to-video pipeline never gives it."""
    model, batch = make_transformer(use_meanflow=True, num_layers=1), mixed_batch()
    expected = solo(model, batch)
    repair(transformer=model)
    assert max(differences(run(model, batch), expected)) <= 1e-5


@torch.no_grad()
def test_projections_of_glyphs_and_images_are_made_once(transformer):
    calls = []
    for part in (transformer.image_embedder, transformer.context_embedder_2):
        part.register_forward_hook(lambda *_: calls.append(1))
    repair(transformer=transformer)
    batch = mixed_batch()
    for _ in range(3):
        found = run(transformer, batch)
    assert len(calls) == sum(HAS_IMAGE) + sum(n > 0 for n in GLYPH_LENGTHS)
    batch["encoder_hidden_states_2"].normal_()  # is seen
    assert min(differences(run(transformer, batch)[1:3], found[1:3])) > 1e-4


@torch.no_grad()
def test_masks_and_rules(transformer):
    repair(transformer=transformer)
    batch = mixed_batch()
    plain, rules = run(transformer, batch), HeadRules({range(0, 1): own_frame})
    only = run(transformer, batch, attention_kwargs={"attention_rules": [None, rules, None, None]})
    assert torch.equal(only[[0, 2, 3]], plain[[0, 2, 3]])
    assert differences(only[1:2], plain[1:2])[0] > 1e-4
    mask = torch.rand(4, 1, VIDEO + PADDED, VIDEO + PADDED, generator=torch.Generator().manual_seed(1)) < 0.7
    masked = run(transformer, batch, attention_kwargs={"attention_mask": mask})
    assert min(differences(masked, plain)) > 1e-4
    for i, padded in enumerate(batch["encoder_attention_mask"]):
        # each sample's own rows and columns are found, wherever its padding is
        glyphs = torch.arange(GLYPHS) < GLYPH_LENGTHS[i]
        real = torch.cat([torch.ones(VIDEO), torch.full((IMAGE,), float(HAS_IMAGE[i])), glyphs, padded]).bool()
        noise = mask[[i]] ^ ~(real[:, None] & real)
        single = {name: tensor[[i]] for name, tensor in batch.items()}
        assert torch.equal(run(transformer, single, attention_kwargs={"attention_mask": noise}), masked[[i]])


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
    refined = [(None, 1, n, n) for n in TEXT_LENGTHS for _ in range(2)]
    joint = [(None, 1, VIDEO + n, VIDEO + n) for n in VALID]
    assert attention_calls == refined + 2 * joint


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
def test_keeps_attention_backend(transformer):
    transformer.set_attention_backend("_native_math")
    repair(transformer=transformer)
    assert transformer.attention_backend == "math"
    expected = solo(make_transformer(), mixed_batch())
    assert max(differences(run(transformer, mixed_batch()), expected)) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
@torch.no_grad()
def test_compiled(transformer):
    """One that `torch.compile` wrapped and ran before is found inside, and compiled anew."""
    batch = mixed_batch()
    expected = solo(transformer, batch)
    compiled = torch.compile(transformer, backend="eager")
    run(compiled, batch)
    repair(transformer=compiled)
    assert max(differences(run(compiled, batch), expected)) <= 1e-5


@torch.no_grad()
def test_what_is_missing(transformer):
    """Glyphs and image are left out where there are none; what the network needs is named."""
    repair(transformer=transformer)
    batch = mixed_batch()
    batch["image_embeds"].zero_()
    batch["encoder_attention_mask_2"].zero_()
    expected = run(transformer, batch)
    del batch["image_embeds"], batch["encoder_hidden_states_2"], batch["encoder_attention_mask_2"]
    assert torch.equal(run(transformer, batch), expected)
    del batch["encoder_hidden_states"]
    with pytest.raises(TypeError, match="forward needs encoder_hidden_states"):
        run(transformer, batch)
    with pytest.raises(ValueError, match="image_embeds has 3 rows and hidden_states has 4"):
        run(transformer, mixed_batch() | {"image_embeds": torch.ones(3, IMAGE, 20)})
    with pytest.raises(ValueError, match="takes no timestep_r"):
        run(transformer, mixed_batch(), timestep_r=torch.zeros(4))
