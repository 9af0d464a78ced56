"""HunyuanVideo 1.5's transformer: a sample in a batch is the sample alone, and both are Diffusers'."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny15
import torch
from addresses import ODD_OFFSETS, bits_by_address, place_weights
from diffusers import HunyuanVideo15Transformer3DModel as Reference
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from probes import LargestTensor
from torch import Tensor

from reelbatch.models.hunyuan_video15.branch import Branch
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel

TEXT, GLYPHS, IMAGE = 24, 9, 5
"""The padded lengths that the reference is given."""
CONFIG = tiny15.TRANSFORMER

UNUSED = [
    f"transformer_blocks.1.{name}.{kind}"
    for name in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    for kind in ("weight", "bias")
]
"""Of the last block: nothing follows its text rows."""


def ours_from(reference: Reference) -> HunyuanVideo15Transformer3DModel:
    model = HunyuanVideo15Transformer3DModel.from_config(reference.config)
    model.load_state_dict(reference.state_dict())
    return model.eval()


REFERENCES = {meanflow: tiny15.transformer(use_meanflow=meanflow) for meanflow in (False, True)}
MODELS = {meanflow: ours_from(reference) for meanflow, reference in REFERENCES.items()}


def make_branch(
    seed: int,
    frames: int = 2,
    height: int = 4,
    width: int = 6,
    text: int = 7,
    glyphs: int = 0,
    image: int = 0,
    timestep: float = 500.0,
    timestep_r: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Branch:
    """Text to video without glyphs, unless said otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Branch(
        latents=draw(CONFIG["in_channels"], frames, height, width),
        text=draw(text, CONFIG["text_embed_dim"]),
        timestep=torch.tensor(timestep),
        timestep_r=None if timestep_r is None else torch.tensor(timestep_r),
        glyphs=draw(glyphs, CONFIG["text_embed_2_dim"]) if glyphs else None,
        image=draw(image, CONFIG["image_embed_dim"]) if image else None,
    )


KINDS: tuple[dict[str, int], ...] = ({}, {"glyphs": 6}, {"image": IMAGE}, {"glyphs": 4, "image": IMAGE})


def every_kind(**same: Any) -> list[Branch]:
    """A branch of each kind, no two of one text length or timestep."""
    return [make_branch(i, text=3 + 4 * i, timestep=900.0 - 250 * i, **kind, **same) for i, kind in enumerate(KINDS)]


def cast(branch: Branch, dtype: torch.dtype) -> Branch:
    pieces = {name: getattr(branch, name) for name in ("latents", "text", "glyphs", "image")}
    return dataclasses.replace(branch, **{name: piece.to(dtype) for name, piece in pieces.items() if piece is not None})


def alone(model: HunyuanVideo15Transformer3DModel, branch: Branch) -> Tensor:
    return model(packs=[[branch]])[0][0]


def padded(states: Tensor | None, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[1, rows, width] with garbage where there are no states, and the mask."""
    count = 0 if states is None else len(states)
    garbage = torch.full((rows - count, width), 3.0, dtype=dtype)
    whole = torch.cat([garbage[:0] if states is None else states, garbage])[None]
    return whole, (torch.arange(rows) < count).to(dtype)[None]


def reference_velocity(reference: Reference, branch: Branch) -> Tensor:
    """Diffusers' way, of one sample: padded, with masks, and image embeddings of zeros for none."""
    dtype = branch.latents.dtype
    text, text_mask = padded(branch.text, TEXT, CONFIG["text_embed_dim"], dtype)
    glyphs, glyph_mask = padded(branch.glyphs, GLYPHS, CONFIG["text_embed_2_dim"], dtype)
    image = torch.zeros(IMAGE, CONFIG["image_embed_dim"], dtype=dtype) if branch.image is None else branch.image
    return reference(
        hidden_states=branch.latents[None],
        timestep=branch.timestep[None].to(dtype),
        timestep_r=None if branch.timestep_r is None else branch.timestep_r[None].to(dtype),
        encoder_hidden_states=text,
        encoder_attention_mask=text_mask,
        encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=glyph_mask,
        image_embeds=image[None],
        return_dict=False,
    )[0][0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def branches_of(meanflow: bool) -> st.SearchStrategy[Branch]:
    return st.builds(
        make_branch,
        seed=st.integers(0, 2**32 - 1),
        frames=st.integers(1, 3),
        height=st.integers(1, 5),
        width=st.integers(1, 6),
        text=st.integers(1, TEXT),
        glyphs=st.integers(0, GLYPHS),
        image=st.sampled_from([0, IMAGE]),
        timestep=st.floats(0, 1000, width=32),
        timestep_r=st.floats(0, 1000, width=32) if meanflow else st.none(),
    )


# -- a sample in a batch is the sample alone -------------------------------------------------------


@pytest.mark.parametrize("meanflow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_one_pack_a_sample_is_bit_identical_to_the_sample_alone(
    dtype: torch.dtype, meanflow: bool, data: st.DataObject
) -> None:
    model = MODELS[meanflow] if dtype == torch.float32 else ours_from(REFERENCES[meanflow]).to(dtype)
    drawn = data.draw(st.lists(branches_of(meanflow), min_size=1, max_size=5))
    branches = [cast(branch, dtype) for branch in drawn]
    for (together,), branch in zip(model(packs=[[branch] for branch in branches]), branches, strict=True):
        assert torch.equal(together, alone(model, branch))


@settings(max_examples=15, deadline=None)
@given(branches=st.lists(branches_of(False), min_size=1, max_size=6))
@torch.no_grad()
def test_all_samples_in_one_pack_equal_the_samples_alone_to_rounding(branches: list[Branch]) -> None:
    for together, branch in zip(MODELS[False](packs=[branches])[0], branches, strict=True):
        assert relative_error(together, alone(MODELS[False], branch)) < 1e-5


@torch.no_grad()
def test_bits_do_not_depend_on_addresses() -> None:
    model, plain = ours_from(REFERENCES[False]), MODELS[False]
    branches = [make_branch(0, 1, 1, 1, text=1), make_branch(1, 1, 1, 3, text=2, glyphs=1), *every_kind()]
    place_weights(model, *ODD_OFFSETS)
    with bits_by_address() as calls:
        for branch in branches:
            assert torch.equal(alone(model, branch), alone(plain, branch))
    assert not calls


# -- and both are Diffusers' -----------------------------------------------------------------------


@pytest.mark.parametrize(("meanflow", "parameters"), [(False, 8_326_608_160), (True, 8_331_330_848)])
def test_every_parameter_of_the_8b_model_has_the_reference_name_and_shape(meanflow: bool, parameters: int) -> None:
    with torch.device("meta"):
        ours = HunyuanVideo15Transformer3DModel(use_meanflow=meanflow)
        reference = Reference(use_meanflow=meanflow)
    shapes = {name: tuple(parameter.shape) for name, parameter in ours.state_dict().items()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in reference.state_dict().items()}
    assert len(shapes) == 1801 + 4 * meanflow
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


def test_a_seed_gives_the_references_weights() -> None:
    torch.manual_seed(0)
    ours = HunyuanVideo15Transformer3DModel(**CONFIG)
    torch.manual_seed(0)
    theirs = Reference(**CONFIG).state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("meanflow", [False, True])
@pytest.mark.parametrize("packing", ["exact", "packed"])
@torch.no_grad()
def test_velocity_is_the_reference_for_every_kind_of_sample(packing: str, meanflow: bool) -> None:
    branches = every_kind(timestep_r=300.0 if meanflow else None)
    packs = [branches] if packing == "packed" else [[branch] for branch in branches]
    found = [velocity for pack in MODELS[meanflow](packs=packs) for velocity in pack]
    for ours, branch in zip(found, branches, strict=True):
        assert relative_error(ours, reference_velocity(REFERENCES[meanflow], branch)) < 1e-5


@torch.no_grad()
def test_each_piece_and_timestep_matters() -> None:
    """The parity above would be empty if a piece hardly moved the velocity."""
    model, full = MODELS[True], make_branch(0, glyphs=4, image=IMAGE, timestep_r=400.0)
    others = [
        dataclasses.replace(full, image=None),
        dataclasses.replace(full, glyphs=None),
        dataclasses.replace(full, text=full.text.flip(1)),
        dataclasses.replace(full, timestep=torch.tensor(501.0)),
        dataclasses.replace(full, timestep_r=torch.tensor(401.0)),
    ]
    for other in others:
        assert relative_error(alone(model, other), alone(model, full)) > 1e-3


@torch.no_grad()
def test_an_image_of_zeros_is_an_image() -> None:
    """Diffusers takes a batch whose image states are all zero for one without images."""
    black = dataclasses.replace(make_branch(0), image=torch.zeros(IMAGE, CONFIG["image_embed_dim"]))
    assert relative_error(alone(MODELS[False], black), alone(MODELS[False], make_branch(0))) > 1e-3


def test_gradients_are_the_references() -> None:
    reference, ours = tiny15.transformer(), ours_from(REFERENCES[False])
    branches = every_kind()
    for branch in branches:
        reference_velocity(reference, branch).square().sum().backward()
    torch.stack(ours(packs=[branches])[0]).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert [name for name, gradient in expected.items() if gradient is None] == UNUSED
    largest = max(gradient.abs().max().item() for gradient in expected.values() if gradient is not None)
    for name, parameter in ours.named_parameters():
        if name not in UNUSED:  # some of the others are zero but for rounding
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6 * largest)


@torch.no_grad()
def test_bfloat16_is_no_further_from_double_precision_than_the_reference_is() -> None:
    ours, reference = ours_from(REFERENCES[False]).bfloat16(), tiny15.transformer().bfloat16()
    exact = tiny15.transformer().bfloat16().double()  # the very same rounded weights
    errors = torch.zeros(2)
    for seed in range(8):
        # a timestep that bfloat16 holds: the reference rounds it
        branch = make_branch(seed, 3, 6, 6, 9 + seed, glyphs=3, image=IMAGE, timestep=512.0, dtype=torch.bfloat16)
        truth = reference_velocity(exact, cast(branch, torch.float64))
        errors[0] += (alone(ours, branch).double() - truth).pow(2).mean()
        errors[1] += (reference_velocity(reference, branch).double() - truth).pow(2).mean()
    assert errors[0] <= errors[1]


def test_a_model_gets_the_second_timestep_if_and_only_if_it_is_a_mean_flow_model() -> None:
    with pytest.raises(ValueError, match="has use_meanflow: every branch needs timestep_r; 1 of 2"):
        MODELS[True](packs=[[make_branch(0), make_branch(1, timestep_r=3.0)]])
    with pytest.raises(ValueError, match="takes no timestep_r; 1 of 1"):
        MODELS[False](packs=[[make_branch(0, timestep_r=3.0)]])


# -- what it costs ---------------------------------------------------------------------------------


@torch.no_grad()
def test_image_and_glyphs_are_projected_once_a_request() -> None:
    model, calls = ours_from(REFERENCES[False]), []
    for projection in (model.image_embedder, model.context_embedder_2):
        projection.register_forward_pre_hook(lambda module, _: calls.append(module))
    first = make_branch(0, glyphs=4, image=IMAGE)
    expected = alone(MODELS[False], first)
    other_prompt = dataclasses.replace(first, text=first.text[:2], glyphs=None)  # its unconditional branch
    for _ in range(3):
        assert torch.equal(model(packs=[[first], [other_prompt]])[0][0], expected)
    assert calls == [model.image_embedder, model.context_embedder_2]
    model.image_embedder.linear_1.weight.mul_(2)
    assert not torch.equal(alone(model, first), expected)
    assert torch.equal(alone(ours_from(REFERENCES[False]), first), expected)


def test_projections_kept_from_generating_do_not_serve_training() -> None:
    model, branch = ours_from(REFERENCES[False]), make_branch(0, glyphs=4, image=IMAGE)
    with torch.no_grad():
        alone(model, branch)
    alone(model.train(), branch).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name not in UNUSED)


@torch.no_grad()
def test_a_forward_of_the_8b_model_reads_nothing_back_from_its_device() -> None:
    """The meta device holds no values: any read of one (a length, a flag) would raise here."""
    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(num_layers=1).to(torch.bfloat16)
        branches = [
            Branch(
                latents=torch.empty(65, frames, 30, 53, dtype=torch.bfloat16),
                text=torch.empty(tokens, 3584, dtype=torch.bfloat16),
                timestep=torch.empty(()),
                image=image,
            )
            for frames, tokens, image in ((31, 40, None), (1, 1000, torch.empty(729, 1152, dtype=torch.bfloat16)))
        ]
    velocities = model(packs=[branches])[0]
    assert [velocity.shape for velocity in velocities] == [(32, *branch.latents.shape[1:]) for branch in branches]


@torch.no_grad()
def test_no_tensor_of_a_forward_grows_with_the_square_of_the_tokens() -> None:
    largest = []
    for frames in (4, 8, 16):
        with LargestTensor() as probe:
            alone(MODELS[False], make_branch(0, frames=frames, height=8, width=8, text=8))
        largest.append(probe.numel / (frames * 64 + 8))
    assert max(largest) / min(largest) < 1.1  # elements a token stay the same: linear growth


# -- rules, and what Diffusers' own machinery does with it -----------------------------------------


@torch.no_grad()
def test_a_mask_restricts_attention_over_video_and_all_conditioning_rows() -> None:
    branch = make_branch(0, glyphs=4, image=IMAGE)
    tokens, video = 2 * 4 * 6 + IMAGE + 4 + 7, 2 * 4 * 6
    keep = torch.ones(tokens, dtype=torch.bool)
    keep[video : video + IMAGE] = False
    masked = alone(MODELS[False], dataclasses.replace(branch, mask=keep))
    assert relative_error(masked, alone(MODELS[False], branch)) > 1e-3
    assert relative_error(masked, alone(MODELS[False], dataclasses.replace(branch, image=None))) < 1e-5


@torch.no_grad()
def test_it_saves_and_loads_and_opens_in_diffusers(tmp_path: Path) -> None:
    model, branch = MODELS[True], make_branch(0, glyphs=3, timestep_r=100.0)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(alone(again, branch), alone(model, branch))
    reference = Reference.from_pretrained(tmp_path)
    assert relative_error(alone(model, branch), reference_velocity(reference, branch)) < 1e-5


@torch.no_grad()
def test_lora_adapters_and_their_scale_give_what_they_give_in_diffusers() -> None:
    ours, reference, branch = ours_from(REFERENCES[False]), tiny15.transformer(), make_branch(3, glyphs=4, image=IMAGE)
    plain = alone(ours, branch)
    config = LoraConfig(r=4, target_modules=["to_q", "add_k_proj", "linear_1", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(0)
    reference.add_adapter(config)
    ours.add_adapter(config)
    ours.load_state_dict(reference.state_dict())
    assert relative_error(alone(ours, branch), plain) > 1e-3
    assert relative_error(alone(ours, branch), reference_velocity(reference, branch)) < 1e-5
    off = ours(packs=[[branch]], attention_kwargs={"scale": 0.0})[0][0]
    assert relative_error(off, plain) < 1e-6


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = ours_from(REFERENCES[False]).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        velocities = model(packs=[every_kind()[:3], every_kind()[3:]])
        sum(velocity.square().mean() for pack in velocities for velocity in pack).backward()
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if name not in UNUSED])
    assert gradients[0][0].abs().sum() > 0
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@torch.no_grad()
def test_group_offload_runs_on_the_packed_path() -> None:
    model, branches = ours_from(REFERENCES[False]), every_kind()
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)
    for (together,), branch in zip(model(packs=[[branch] for branch in branches]), branches, strict=True):
        assert torch.equal(together, alone(MODELS[False], branch))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"qk_norm": "layer_norm"}, "qk_norm"), ({"rope_axes_dim": (4, 4, 4)}, "sums to 12; it must sum to")],
)
def test_configurations_of_another_network_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HunyuanVideo15Transformer3DModel(**{**CONFIG, **change})
