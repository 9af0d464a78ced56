"""The transformer: a sample in a batch is the sample alone, and both are Diffusers'."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import HunyuanVideoTransformer3DModel as Reference
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from probes import LargestTensor
from torch import Tensor

from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

TEXT_TOKENS = 24  # the padded length that the reference is given
CONFIG = tiny.transformer_config()


def ours_from(reference: Reference) -> HunyuanVideoTransformer3DModel:
    model = HunyuanVideoTransformer3DModel.from_config(reference.config)
    model.load_state_dict(reference.state_dict())
    return model.eval()


REFERENCES = {patch: tiny.transformer(patch) for patch in (1, 2)}
MODELS = {patch: ours_from(reference) for patch, reference in REFERENCES.items()}


def make_branch(
    seed: int,
    frames: int = 2,
    height: int = 4,
    width: int = 6,
    text: int = 7,
    timestep: float = 500.0,
    guidance: float = 6.0,
    dtype: torch.dtype = torch.float32,
) -> Branch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Branch(
        latents=draw(CONFIG["in_channels"], frames, height, width),
        text=draw(text, CONFIG["text_embed_dim"]),
        pooled=draw(CONFIG["pooled_projection_dim"]),
        timestep=torch.tensor(timestep),
        guidance=torch.tensor(guidance, dtype=dtype) * 1000.0,
    )


def cast(branch: Branch, dtype: torch.dtype) -> Branch:
    floats = {name: getattr(branch, name).to(dtype) for name in ("latents", "text", "pooled", "guidance")}
    return dataclasses.replace(branch, **floats)


def alone(model: HunyuanVideoTransformer3DModel, branch: Branch) -> Tensor:
    return model(packs=[[branch]])[0][0]


def reference_velocities(reference: Reference, branches: Sequence[Branch]) -> Tensor:
    """Diffusers' way: one padded batch with a mask. All branches have one shape of latents."""
    text = torch.zeros(len(branches), TEXT_TOKENS, CONFIG["text_embed_dim"], dtype=branches[0].text.dtype)
    mask = torch.zeros(len(branches), TEXT_TOKENS, dtype=text.dtype)
    for row, branch in enumerate(branches):
        text[row, : len(branch.text)] = branch.text
        mask[row, : len(branch.text)] = 1
    return reference(
        hidden_states=torch.stack([branch.latents for branch in branches]),
        timestep=torch.stack([branch.timestep for branch in branches]),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        pooled_projections=torch.stack([branch.pooled for branch in branches]),
        guidance=torch.stack([branch.guidance for branch in branches]),
        return_dict=False,
    )[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


BRANCHES = st.builds(
    make_branch,
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(1, 3),
    height=st.sampled_from([2, 4, 6]),
    width=st.sampled_from([2, 4, 8]),
    text=st.integers(1, TEXT_TOKENS),
    timestep=st.floats(0, 1000, width=32),
    guidance=st.floats(1, 12, width=32),
)


# -- a sample in a batch is the sample alone -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(patch=st.sampled_from([1, 2]), branches=st.lists(BRANCHES, min_size=1, max_size=5))
@torch.no_grad()
def test_one_pack_a_sample_is_bit_identical_to_the_sample_alone(
    dtype: torch.dtype, patch: int, branches: list[Branch]
) -> None:
    model = ours_from(REFERENCES[patch]).to(dtype)
    branches = [cast(branch, dtype) for branch in branches]
    for (together,), branch in zip(model(packs=[[branch] for branch in branches]), branches, strict=True):
        assert torch.equal(together, alone(model, branch))


@settings(max_examples=60, deadline=None)
@given(patch=st.sampled_from([1, 2]), branches=st.lists(BRANCHES, min_size=1, max_size=6))
@torch.no_grad()
def test_all_samples_in_one_pack_equal_the_samples_alone_to_rounding(patch: int, branches: list[Branch]) -> None:
    model = MODELS[patch]
    for together, branch in zip(model(packs=[branches])[0], branches, strict=True):
        assert relative_error(together, alone(model, branch)) < 1e-5


@torch.no_grad()
def test_in_double_precision_packing_changes_nothing_beyond_its_rounding() -> None:
    model = ours_from(REFERENCES[2]).double()
    branches = [cast(make_branch(i, text=3 + 5 * i, timestep=900 - 200 * i), torch.float64) for i in range(4)]
    for together, branch in zip(model(packs=[branches])[0], branches, strict=True):
        assert relative_error(together, alone(model, branch)) < 1e-14


# -- and both are Diffusers' -----------------------------------------------------------------------


def test_every_parameter_of_the_13b_model_has_the_reference_name_and_shape() -> None:
    with torch.device("meta"):
        ours, reference = HunyuanVideoTransformer3DModel(), Reference()
    shapes = {name: tuple(parameter.shape) for name, parameter in ours.state_dict().items()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in reference.state_dict().items()}
    assert len(shapes) == 1264
    assert sum(parameter.numel() for parameter in ours.parameters()) == 12_821_012_544


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("packs", ["exact", "packed"])
@torch.no_grad()
def test_velocity_is_the_reference_for_every_sample_of_a_ragged_batch(patch: int, batch: int, packs: str) -> None:
    branches = [
        make_branch(i, text=TEXT_TOKENS - 6 * i, timestep=1000 - 250 * i, guidance=1 + 3 * i) for i in range(batch)
    ]
    expected = reference_velocities(REFERENCES[patch], branches)
    model = MODELS[patch]
    found = (
        model(packs=[branches])[0]
        if packs == "packed"
        else [velocity for (velocity,) in model(packs=[[b] for b in branches])]
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_a_given_first_frame_is_modulated_apart_as_in_the_reference(frames: int) -> None:
    reference = tiny.transformer(image_condition_type="token_replace")
    model = ours_from(reference)
    branches = [make_branch(i, frames, text=TEXT_TOKENS - 6 * i, timestep=900 - 250 * i) for i in range(3)]
    expected = reference_velocities(reference, branches)
    exact = [velocity for (velocity,) in model(packs=[[branch] for branch in branches])]
    for found in (exact, model(packs=[branches])[0]):
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("lengths", [(5, 14, 23), (1, 2, 3)])
def test_gradients_are_the_references(lengths: tuple[int, ...]) -> None:
    """Also of texts so short that their products are padded with rows."""
    reference, ours = tiny.transformer(2), ours_from(REFERENCES[2])
    branches = [make_branch(i, text=text, timestep=900 - 300 * i) for i, text in enumerate(lengths)]
    reference_velocities(reference, branches).square().sum().backward()
    torch.stack(ours(packs=[branches])[0]).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())  # some are zero but for rounding
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6 * largest)


@torch.no_grad()
def test_bfloat16_is_no_further_from_double_precision_than_the_reference_is() -> None:
    ours, reference = ours_from(REFERENCES[2]).bfloat16(), tiny.transformer(2).bfloat16()
    exact = tiny.transformer(2).bfloat16().double()  # the very same rounded weights
    errors = torch.zeros(2)
    for seed in range(8):
        branch = make_branch(seed, frames=3, height=8, width=8, text=9 + seed, dtype=torch.bfloat16)
        truth = reference_velocities(exact, [cast(branch, torch.float64)])[0]
        errors[0] += (alone(ours, branch).double() - truth).pow(2).mean()
        errors[1] += (reference_velocities(reference, [branch])[0].double() - truth).pow(2).mean()
    assert errors[0] <= errors[1]


def test_what_inference_mode_leaves_behind_serves_training() -> None:
    shape = {"frames": 3, "height": 6, "width": 10}
    with torch.inference_mode():
        alone(MODELS[2], make_branch(0, **shape))
    model = ours_from(REFERENCES[2]).train()
    alone(model, make_branch(0, **shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_text_of_no_tokens_gives_a_finite_velocity_and_leaves_its_batch_mates_alone() -> None:
    empty, mate = make_branch(0, text=0), make_branch(1)
    assert alone(MODELS[2], empty).isfinite().all()
    for velocity, branch in zip(MODELS[2](packs=[[empty, mate]])[0], (empty, mate), strict=True):
        assert relative_error(velocity, alone(MODELS[2], branch)) < 1e-5


def test_guidance_is_rounded_as_the_reference_rounds_it() -> None:
    assert make_branch(0, guidance=6.0, dtype=torch.bfloat16).guidance == 6016


# -- what it costs ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_forward_of_the_13b_model_reads_nothing_back_from_its_device() -> None:
    """The meta device holds no values: any read of one (a length, a flag) would raise here."""
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1).to(torch.bfloat16)
        branches = [
            Branch(
                latents=torch.empty(16, frames, 90, 160, dtype=torch.bfloat16),
                text=torch.empty(tokens, 4096, dtype=torch.bfloat16),
                pooled=torch.empty(768, dtype=torch.bfloat16),
                timestep=torch.empty(()),
                guidance=torch.empty((), dtype=torch.bfloat16),
            )
            for frames, tokens in ((33, 40), (1, 256))
        ]
    velocities = model(packs=[branches])[0]
    assert [velocity.shape for velocity in velocities] == [branch.latents.shape for branch in branches]


@torch.no_grad()
def test_no_tensor_of_a_forward_grows_with_the_square_of_the_tokens() -> None:
    largest = []
    for frames in (4, 8, 16):
        with LargestTensor() as probe:
            alone(MODELS[1], make_branch(0, frames=frames, height=8, width=8, text=8))
        largest.append(probe.numel / (frames * 64 + 8))
    assert max(largest) / min(largest) < 1.1  # elements a token stay the same: linear growth


# -- what Diffusers' own machinery does with it ----------------------------------------------------


@torch.no_grad()
def test_it_saves_and_loads_in_shards_with_a_dtype_and_opens_in_diffusers(tmp_path: Path) -> None:
    model, branch = MODELS[2], make_branch(0)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(alone(again, branch), alone(model, branch))
    half = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    reference = Reference.from_pretrained(tmp_path)
    assert relative_error(alone(model, branch), reference_velocities(reference, [branch])[0]) < 1e-5


@torch.no_grad()
def test_lora_adapters_and_their_scale_give_what_they_give_in_diffusers() -> None:
    ours, reference, branch = ours_from(REFERENCES[2]), tiny.transformer(2), make_branch(3)
    config = LoraConfig(
        r=4, target_modules=["to_q", "to_v", "add_k_proj", "proj_mlp", "to_out.0"], init_lora_weights=False
    )
    torch.manual_seed(0)
    reference.add_adapter(config)
    ours.add_adapter(config)
    ours.load_state_dict(reference.state_dict())
    plain = alone(MODELS[2], branch)
    assert relative_error(alone(ours, branch), plain) > 1e-3
    assert relative_error(alone(ours, branch), reference_velocities(reference, [branch])[0]) < 1e-5
    off = ours(packs=[[branch]], attention_kwargs={"scale": 0.0})[0][0]
    assert relative_error(off, plain) < 1e-6


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = ours_from(REFERENCES[2]).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        velocities = model(packs=[[make_branch(0), make_branch(1, frames=1, text=3)], [make_branch(2)]])
        sum(velocity.square().mean() for pack in velocities for velocity in pack).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offload_runs_on_the_packed_path(offload_type: str) -> None:
    model, branches = ours_from(REFERENCES[2]), [make_branch(i, text=3 + i) for i in range(3)]
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type, num_blocks_per_group=1)
    for (together,), branch in zip(model(packs=[[branch] for branch in branches]), branches, strict=True):
        assert torch.equal(together, alone(MODELS[2], branch))


@torch.no_grad()
def test_each_block_is_called_once_a_step_whatever_the_number_of_samples() -> None:
    """Once a call is once a fetch of its weights, when they are offloaded."""
    model, calls = ours_from(REFERENCES[2]), []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    model(packs=[[make_branch(i)] for i in range(5)])
    assert calls == blocks


@torch.no_grad()
def test_regional_compile_runs_on_the_packed_path() -> None:
    model, branches = (
        ours_from(REFERENCES[2]),
        [make_branch(i, text=1 + i) for i in range(3)],
    )  # one row is its own case
    model.compile_repeated_blocks(backend="aot_eager")
    for (together,), branch in zip(model(packs=[[branch] for branch in branches]), branches, strict=True):
        assert relative_error(together, alone(MODELS[2], branch)) < 1e-5


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_condition_type": "token_swap"}, "must be None, 'latent_concat' or 'token_replace'"),
        ({"qk_norm": "layer_norm"}, "rms_norm"),
        ({"rope_axes_dim": (4, 4, 4)}, "sums to 12; it must sum to attention_head_dim, 16"),
    ],
)
def test_a_configuration_of_another_network_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HunyuanVideoTransformer3DModel(**{**CONFIG, **changes})


def test_a_branch_without_guidance_is_refused_by_a_model_that_takes_it() -> None:
    with pytest.raises(ValueError, match="every branch needs a guidance"):
        MODELS[2](packs=[[dataclasses.replace(make_branch(0), guidance=None)]])
