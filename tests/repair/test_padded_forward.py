"""Our transformer called as Diffusers calls its own: padded batches, masks, attention kwargs."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel as Reference
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from padded import LENGTHS, TEXT, difference, padded_batch, run
from torch import Tensor

from reelbatch import HunyuanVideoTransformer3DModel
from reelbatch.attention import HeadRules, own_frame

ORDER = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "guidance",
)
VIDEO = 2 * 2 * 3


def row(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    return {name: tensor[[sample]] for name, tensor in batch.items()}


def test_signature_is_that_of_diffusers():
    theirs, ours = (
        list(inspect.signature(kind.forward).parameters.values())
        for kind in (Reference, HunyuanVideoTransformer3DModel)
    )
    assert [each.name for each in ours] == [*(each.name for each in theirs), "packs"]
    assert [each.kind for each in ours[:-1]] == [each.kind for each in theirs]
    assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY
    for mine, their in zip(ours, theirs, strict=False):
        assert their.default in (mine.default, inspect.Parameter.empty)


def test_equals_diffusers(model, reference):
    batch = padded_batch()
    expected = run(reference, batch)
    for isolation in ("exact", "packed"):
        model.isolation = isolation
        assert difference(run(model, batch), expected) <= 1e-5


@torch.no_grad()
def test_by_position_and_both_kinds_of_output(model, reference):
    batch = padded_batch()
    given = [batch[name] for name in ORDER]
    expected = reference(*given, {"scale": 1.0}, True)
    found = model(*given, {"scale": 1.0}, True)
    assert type(found) is type(expected) is Transformer2DModelOutput
    assert difference(found.sample, expected.sample) <= 1e-5
    (sample,) = model(*given, None, False)
    assert torch.equal(sample, found.sample)


def test_each_sample_is_the_one_alone(model):
    batch = padded_batch()
    alone = torch.cat([run(model, row(batch, i)) for i in range(3)])
    assert torch.equal(run(model, batch), alone)
    model.isolation = "packed"
    assert difference(run(model, batch), alone) <= 1e-5


def test_alignment_of_a_batch_does_not_matter(model):
    """Odd sizes, so that a row of the batch begins where a tensor of its own would not."""
    batch = padded_batch()
    batch["hidden_states"] = torch.randn(3, 4, 1, 2, 6)[..., :2]
    batch |= {
        name: torch.cat([tensor.flatten(), tensor.flatten()[:1]])[1:].reshape(tensor.shape)
        for name, tensor in padded_batch().items()
        if name in ("pooled_projections", "encoder_hidden_states")
    }
    alone = torch.cat([run(model, {k: v.clone() for k, v in row(batch, i).items()}) for i in range(3)])
    assert torch.equal(run(model, batch), alone)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_masks_of_any_dtype(model, dtype):
    batch = padded_batch()
    expected = run(model, batch)
    assert torch.equal(
        run(model, {**batch, "encoder_attention_mask": batch["encoder_attention_mask"].to(dtype)}), expected
    )


def test_mask_is_read_by_position(model, reference):
    """Left-padded and holed: what is masked plays no part, whatever is there."""
    batch = padded_batch()
    expected = run(model, batch)
    torch.manual_seed(3)
    for order in (torch.arange(TEXT).flip(0), torch.randperm(TEXT)):
        masks, states = torch.zeros(3, TEXT), torch.full((3, TEXT, 32), float("nan"))
        for sample, length in enumerate(LENGTHS):
            at = order[:length].sort().values
            masks[sample, at] = 1
            states[sample, at] = batch["encoder_hidden_states"][sample, :length]
        moved = {**batch, "encoder_hidden_states": states, "encoder_attention_mask": masks}
        assert torch.equal(run(model, moved), expected)
        assert run(reference, moved).isnan().any()  # the fault


def test_without_a_mask_all_tokens_are_real(model):
    batch = padded_batch()
    expected = run(model, {**batch, "encoder_attention_mask": torch.ones(3, TEXT)})
    assert torch.equal(run(model, {**batch, "encoder_attention_mask": None}), expected)
    del batch["encoder_attention_mask"]
    assert torch.equal(run(model, batch), expected)


def test_a_prompt_of_no_tokens(model):
    batch = padded_batch()
    expected = run(model, batch)
    batch["encoder_attention_mask"][1] = 0
    found = run(model, batch)
    assert found.isfinite().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_one_row_serves_all_samples(model, reference):
    batch = padded_batch()
    one = {name: tensor[:1] for name, tensor in batch.items() if name != "hidden_states"}
    expected = run(
        model, {"hidden_states": batch["hidden_states"], **{k: v.expand(3, *v.shape[1:]) for k, v in one.items()}}
    )
    assert torch.equal(run(model, {"hidden_states": batch["hidden_states"], **one}), expected)
    scalars = {**one, "timestep": torch.tensor(1000.0), "guidance": torch.tensor(6000.0)}
    assert torch.equal(run(model, {"hidden_states": batch["hidden_states"], **scalars}), expected)


def test_guidance_of_a_list_that_a_pipeline_repeats(model):
    batch = padded_batch()
    expected = run(model, batch)
    assert len({tuple(video.flatten().tolist()) for video in expected}) == 3
    repeated = torch.tensor([batch["guidance"].tolist()] * 3)
    assert torch.equal(run(model, {**batch, "guidance": repeated}), expected)
    with pytest.raises(ValueError, match="2 guidance scales were given for a batch of 3: give one, or 3"):
        run(model, {**batch, "guidance": repeated[:, :2]})


def test_what_does_not_fit_is_told(model):
    batch = padded_batch()
    with pytest.raises(TypeError, match="forward needs timestep, pooled_projections"):
        run(model, {name: batch[name] for name in ("hidden_states", "encoder_hidden_states")})
    with pytest.raises(TypeError, match="hidden_states"):
        model()
    with pytest.raises(ValueError, match="guidance_embeds: every branch needs a guidance"):
        run(model, {**batch, "guidance": None})
    for name in ("timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance"):
        with pytest.raises(ValueError, match=rf"{name} has 2 rows and hidden_states has 3: give one a sample, or on"):
            run(model, {**batch, name: batch[name][:2]})
    for wrong in (torch.ones(3, 8), torch.ones(3, 1, TEXT), torch.ones(TEXT)):
        with pytest.raises(ValueError, match=rf"encoder_attention_mask has shape .*must be \[3, {TEXT}\]"):
            run(model, {**batch, "encoder_attention_mask": wrong})


def test_mask_that_is_written_to_is_read_again(model):
    batch = padded_batch()
    run(model, batch)
    batch["encoder_attention_mask"][0, :3] = 0
    fresh = {**batch, "encoder_attention_mask": batch["encoder_attention_mask"].clone()}
    assert torch.equal(run(model, batch), run(model, fresh))


def test_gradients_reach_the_inputs(model):
    batch = padded_batch()
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    for name in names:
        batch[name].requires_grad_()
    model(**batch, return_dict=False)[0].square().sum().backward()
    assert all(batch[name].grad.abs().sum() > 0 for name in names)
    padding = batch["encoder_attention_mask"] == 0
    assert not batch["encoder_hidden_states"].grad[padding].any()


def dense() -> Tensor:
    torch.manual_seed(7)
    return torch.rand(3, 1, VIDEO + TEXT, VIDEO + TEXT) < 0.7


@pytest.mark.parametrize("axes", [None, "BQK"])
def test_each_sample_has_its_own_rows_and_columns(model, axes):
    batch, mask = padded_batch(), dense()
    given = {"attention_mask": mask if axes is None else mask[:, 0], "attention_mask_axes": axes}
    found = run(model, batch, attention_kwargs=given)
    assert difference(found, run(model, batch)) > 1e-3
    for sample, length in enumerate(LENGTHS):
        own = VIDEO + length
        alone = row(batch, sample)
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :length]
        del alone["encoder_attention_mask"]
        kwargs = {"attention_mask": mask[[sample], :, :own, :own]}
        assert torch.equal(run(model, alone, attention_kwargs=kwargs), found[[sample]])


def test_rows_and_columns_are_found_by_position(model):
    """Of a text that is padded from the left."""
    batch, mask = row(padded_batch(), 0), dense()[:1]
    own = torch.arange(TEXT - LENGTHS[0], TEXT)
    batch["encoder_attention_mask"] = torch.zeros(1, TEXT).index_fill(1, own, 1.0)
    found = run(model, batch, attention_kwargs={"attention_mask": mask})
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"][:, own]
    del batch["encoder_attention_mask"]
    tokens = torch.cat([torch.arange(VIDEO), VIDEO + own])
    kwargs = {"attention_mask": mask[..., tokens, :][..., tokens]}
    assert torch.equal(run(model, batch, attention_kwargs=kwargs), found)


def test_all_true_and_keys_that_are_padding_anyway_change_nothing(model):
    batch = padded_batch()
    expected = run(model, batch)
    everything = torch.ones(VIDEO + TEXT, dtype=torch.bool)
    keys = torch.cat([torch.ones(3, VIDEO), batch["encoder_attention_mask"]], dim=1).bool()
    for mask in (everything, keys, keys[:, None, None]):
        assert torch.equal(run(model, batch, attention_kwargs={"attention_mask": mask}), expected)


def test_rules(model):
    batch, rules = padded_batch(), HeadRules({range(0, 2): own_frame})
    everyone = run(model, batch, attention_kwargs={"attention_rules": rules})
    plain = run(model, batch)
    assert difference(everyone, plain) > 1e-3
    some = run(model, batch, attention_kwargs={"attention_rules": [None, rules, None]})
    assert torch.equal(some, torch.stack([plain[0], everyone[1], plain[2]]))
    with pytest.raises(ValueError, match="attention_rules has 2 entries for 3 samples"):
        run(model, batch, attention_kwargs={"attention_rules": [None, rules]})
    with pytest.raises(ValueError, match="both attention_mask and attention_rules"):
        run(model, batch, attention_kwargs={"attention_rules": rules, "attention_mask": dense()})


def test_a_new_mask_is_not_taken_for_an_old_one(model):
    """Text masks that come and go may have the ids of earlier ones."""
    batch, mask = padded_batch(), dense()
    for lengths in ((7, 4, 9), (3, 9, 2), (9, 9, 9), (1, 2, 3)):
        batch["encoder_attention_mask"] = (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).float()
        found = run(model, batch, attention_kwargs={"attention_mask": mask})
        fresh = run(model, batch, attention_kwargs={"attention_mask": mask.clone()})
        assert torch.equal(found, fresh)
