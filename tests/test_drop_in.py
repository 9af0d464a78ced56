"""Our transformer in Diffusers' HunyuanVideoPipeline, and called as Diffusers' own is (models/padded.py)."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel as Reference
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

import reelbatch
from reelbatch import HunyuanVideoTransformer3DModel
from reelbatch.attention import AttentionBackendError, HeadRules, own_frame
from reelbatch.loading.hub import DEMO_FOLDER

ORDER = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "guidance",
)
TEXT = 9
LENGTHS = (7, 4, 9)
VIDEO = 2 * 2 * 3
PROMPTS = ["a cat", "two small red horses running on the sea at night", "a robot standing still"]
SEEDS = [3, 1, 4]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return tiny.transformer()


@pytest.fixture
def model(reference: Reference) -> HunyuanVideoTransformer3DModel:
    ours = HunyuanVideoTransformer3DModel.from_config(reference.config)
    ours.load_state_dict(reference.state_dict())
    return ours.eval()


def padded_batch() -> dict[str, Tensor]:
    """Three samples of text lengths 7, 4 and 9; padding is noise."""
    torch.manual_seed(2)
    return {
        "hidden_states": torch.randn(3, 4, 2, 4, 6),
        "timestep": torch.tensor([1000.0, 600.0, 100.0]),
        "encoder_hidden_states": torch.randn(3, TEXT, 32),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(LENGTHS)[:, None]).float(),
        "pooled_projections": torch.randn(3, 24),
        "guidance": torch.tensor([6000.0, 2500.0, 9000.0]),
    }


def run(model: torch.nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, return_dict=False, **options)[0]


def row(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    return {name: tensor[[sample]] for name, tensor in batch.items()}


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


class TestForward:
    def test_signature_is_that_of_diffusers(self):
        theirs, ours = (
            list(inspect.signature(kind.forward).parameters.values())
            for kind in (Reference, HunyuanVideoTransformer3DModel)
        )
        assert [each.name for each in ours] == [*(each.name for each in theirs), "packs"]
        assert [each.kind for each in ours[:-1]] == [each.kind for each in theirs]
        assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY
        for mine, their in zip(ours, theirs, strict=False):
            assert their.default in (mine.default, inspect.Parameter.empty)

    def test_equals_diffusers(self, model, reference):
        batch = padded_batch()
        expected = run(reference, batch)
        for isolation in ("exact", "packed"):
            model.isolation = isolation
            assert difference(run(model, batch), expected) <= 1e-5

    @torch.no_grad()
    def test_by_position_and_both_kinds_of_output(self, model, reference):
        batch = padded_batch()
        given = [batch[name] for name in ORDER]
        expected = reference(*given, {"scale": 1.0}, True)
        found = model(*given, {"scale": 1.0}, True)
        assert type(found) is type(expected) is Transformer2DModelOutput
        assert difference(found.sample, expected.sample) <= 1e-5
        (sample,) = model(*given, None, False)
        assert torch.equal(sample, found.sample)

    def test_each_sample_is_the_one_alone(self, model):
        batch = padded_batch()
        alone = torch.cat([run(model, row(batch, i)) for i in range(3)])
        assert torch.equal(run(model, batch), alone)
        model.isolation = "packed"
        assert difference(run(model, batch), alone) <= 1e-5

    def test_alignment_of_a_batch_does_not_matter(self, model):
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
    def test_masks_of_any_dtype(self, model, dtype):
        batch = padded_batch()
        expected = run(model, batch)
        assert torch.equal(
            run(model, {**batch, "encoder_attention_mask": batch["encoder_attention_mask"].to(dtype)}), expected
        )

    def test_mask_is_read_by_position(self, model, reference):
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

    def test_without_a_mask_all_tokens_are_real(self, model):
        batch = padded_batch()
        expected = run(model, {**batch, "encoder_attention_mask": torch.ones(3, TEXT)})
        assert torch.equal(run(model, {**batch, "encoder_attention_mask": None}), expected)
        del batch["encoder_attention_mask"]
        assert torch.equal(run(model, batch), expected)

    def test_a_prompt_of_no_tokens(self, model):
        batch = padded_batch()
        expected = run(model, batch)
        batch["encoder_attention_mask"][1] = 0
        found = run(model, batch)
        assert found.isfinite().all()
        assert torch.equal(found[[0, 2]], expected[[0, 2]])

    def test_one_row_serves_all_samples(self, model, reference):
        batch = padded_batch()
        one = {name: tensor[:1] for name, tensor in batch.items() if name != "hidden_states"}
        expected = run(
            model, {"hidden_states": batch["hidden_states"], **{k: v.expand(3, *v.shape[1:]) for k, v in one.items()}}
        )
        assert torch.equal(run(model, {"hidden_states": batch["hidden_states"], **one}), expected)
        scalars = {**one, "timestep": torch.tensor(1000.0), "guidance": torch.tensor(6000.0)}
        assert torch.equal(run(model, {"hidden_states": batch["hidden_states"], **scalars}), expected)

    def test_guidance_of_a_list_that_a_pipeline_repeats(self, model):
        batch = padded_batch()
        expected = run(model, batch)
        assert len({tuple(video.flatten().tolist()) for video in expected}) == 3
        repeated = torch.tensor([batch["guidance"].tolist()] * 3)
        assert torch.equal(run(model, {**batch, "guidance": repeated}), expected)
        with pytest.raises(ValueError, match="2 guidance scales were given for a batch of 3: give one, or 3"):
            run(model, {**batch, "guidance": repeated[:, :2]})

    def test_what_does_not_fit_is_told(self, model):
        batch = padded_batch()
        with pytest.raises(TypeError, match="forward needs timestep, pooled_projections"):
            run(model, {name: batch[name] for name in ("hidden_states", "encoder_hidden_states")})
        with pytest.raises(TypeError, match="hidden_states"):
            model()
        with pytest.raises(ValueError, match="guidance_embeds: every branch needs a guidance"):
            run(model, {**batch, "guidance": None})
        for name in ("timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance"):
            with pytest.raises(
                ValueError, match=rf"{name} has 2 rows and hidden_states has 3: give one a sample, or on"
            ):
                run(model, {**batch, name: batch[name][:2]})
        for wrong in (torch.ones(3, 8), torch.ones(3, 1, TEXT), torch.ones(TEXT)):
            with pytest.raises(ValueError, match=rf"encoder_attention_mask has shape .*must be \[3, {TEXT}\]"):
                run(model, {**batch, "encoder_attention_mask": wrong})

    def test_mask_that_is_written_to_is_read_again(self, model):
        batch = padded_batch()
        run(model, batch)
        batch["encoder_attention_mask"][0, :3] = 0
        fresh = {**batch, "encoder_attention_mask": batch["encoder_attention_mask"].clone()}
        assert torch.equal(run(model, batch), run(model, fresh))

    def test_gradients_reach_the_inputs(self, model):
        batch = padded_batch()
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
        for name in names:
            batch[name].requires_grad_()
        model(**batch, return_dict=False)[0].square().sum().backward()
        assert all(batch[name].grad.abs().sum() > 0 for name in names)
        padding = batch["encoder_attention_mask"] == 0
        assert not batch["encoder_hidden_states"].grad[padding].any()


class TestAttentionKwargs:
    """Masks over `[video | padded text]`, cut to each sample's own tokens."""

    def dense(self) -> Tensor:
        torch.manual_seed(7)
        return torch.rand(3, 1, VIDEO + TEXT, VIDEO + TEXT) < 0.7

    @pytest.mark.parametrize("axes", [None, "BQK"])
    def test_each_sample_has_its_own_rows_and_columns(self, model, axes):
        batch, mask = padded_batch(), self.dense()
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

    def test_rows_and_columns_are_found_by_position(self, model):
        """Of a text that is padded from the left."""
        batch, mask = row(padded_batch(), 0), self.dense()[:1]
        own = torch.arange(TEXT - LENGTHS[0], TEXT)
        batch["encoder_attention_mask"] = torch.zeros(1, TEXT).index_fill(1, own, 1.0)
        found = run(model, batch, attention_kwargs={"attention_mask": mask})
        batch["encoder_hidden_states"] = batch["encoder_hidden_states"][:, own]
        del batch["encoder_attention_mask"]
        tokens = torch.cat([torch.arange(VIDEO), VIDEO + own])
        kwargs = {"attention_mask": mask[..., tokens, :][..., tokens]}
        assert torch.equal(run(model, batch, attention_kwargs=kwargs), found)

    def test_all_true_and_keys_that_are_padding_anyway_change_nothing(self, model):
        batch = padded_batch()
        expected = run(model, batch)
        everything = torch.ones(VIDEO + TEXT, dtype=torch.bool)
        keys = torch.cat([torch.ones(3, VIDEO), batch["encoder_attention_mask"]], dim=1).bool()
        for mask in (everything, keys, keys[:, None, None]):
            assert torch.equal(run(model, batch, attention_kwargs={"attention_mask": mask}), expected)

    def test_rules(self, model):
        batch, rules = padded_batch(), HeadRules({range(0, 2): own_frame})
        everyone = run(model, batch, attention_kwargs={"attention_rules": rules})
        plain = run(model, batch)
        assert difference(everyone, plain) > 1e-3
        some = run(model, batch, attention_kwargs={"attention_rules": [None, rules, None]})
        assert torch.equal(some, torch.stack([plain[0], everyone[1], plain[2]]))
        with pytest.raises(ValueError, match="attention_rules has 2 entries for 3 samples"):
            run(model, batch, attention_kwargs={"attention_rules": [None, rules]})
        with pytest.raises(ValueError, match="both attention_mask and attention_rules"):
            run(model, batch, attention_kwargs={"attention_rules": rules, "attention_mask": self.dense()})

    def test_a_new_mask_is_not_taken_for_an_old_one(self, model):
        """Text masks that come and go may have the ids of earlier ones."""
        batch, mask = padded_batch(), self.dense()
        for lengths in ((7, 4, 9), (3, 9, 2), (9, 9, 9), (1, 2, 3)):
            batch["encoder_attention_mask"] = (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).float()
            found = run(model, batch, attention_kwargs={"attention_mask": mask})
            fresh = run(model, batch, attention_kwargs={"attention_mask": mask.clone()})
            assert torch.equal(found, fresh)


def generate(pipe: Any, prompt: Any, seeds: list[int], **options: Any) -> Tensor:
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 40}
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompt, generator=generator, **{"output_type": "pt", **sizes, **options}).frames


@pytest.fixture(scope="module")
def dropped_in(tiny_folder: Path, tiny_pipeline: HunyuanVideoPipeline) -> HunyuanVideoPipeline:
    ours = HunyuanVideoTransformer3DModel.from_pretrained(tiny_folder, subfolder="transformer")
    pipe = HunyuanVideoPipeline(**{**tiny_pipeline.components, "transformer": ours})
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestInPipeline:
    @pytest.mark.parametrize(
        "options", [{}, {"negative_prompt": ["blurry"] * 3, "true_cfg_scale": 3.0}], ids=["plain", "cfg"]
    )
    def test_equals_diffusers(self, dropped_in, tiny_pipeline, options):
        expected = generate(tiny_pipeline, PROMPTS, SEEDS, **options)
        assert (generate(dropped_in, PROMPTS, SEEDS, **options) - expected).abs().max() <= 1e-4

    def test_demo(self):
        theirs = HunyuanVideoPipeline.from_pretrained(DEMO_FOLDER)
        ours = HunyuanVideoTransformer3DModel.from_pretrained(DEMO_FOLDER, subfolder="transformer")
        pipe = HunyuanVideoPipeline(**{**theirs.components, "transformer": ours})
        options = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
        for each in (theirs, pipe):
            each.set_progress_bar_config(disable=True)
        found, expected = (generate(each, PROMPTS, SEEDS, **options) for each in (pipe, theirs))
        assert found.shape == (3, 9, 3, 64, 64)
        assert (found - expected).abs().max() <= 1e-4

    def test_a_list_of_scales_for_a_batch(self, dropped_in, tiny_pipeline):
        scales = [6.0, 2.5, 9.0]
        expected = torch.cat(
            [
                generate(tiny_pipeline, prompt, [seed], guidance_scale=scale)
                for prompt, seed, scale in zip(PROMPTS, SEEDS, scales, strict=True)
            ]
        )
        found = generate(dropped_in, PROMPTS, SEEDS, guidance_scale=scales)
        assert (found - expected).abs().max() <= 1e-4
        with pytest.raises(ValueError, match="2 guidance scales were given for a batch of 3"):
            generate(dropped_in, PROMPTS, SEEDS, guidance_scale=scales[:2])

    def test_saved_and_loaded(self, dropped_in, tiny_pipeline, tmp_path):
        expected = generate(dropped_in, PROMPTS[0], SEEDS[:1])
        dropped_in.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["transformer"] == ["reelbatch.models.hunyuan_video", "HunyuanVideoTransformer3DModel"]
        transformer = tmp_path / "transformer"
        loaded = (
            HunyuanVideoPipeline.from_pretrained(tmp_path),
            DiffusionPipeline.from_pretrained(tmp_path),
            HunyuanVideoPipeline.from_pretrained(
                tmp_path, transformer=HunyuanVideoTransformer3DModel.from_pretrained(transformer)
            ),
        )
        for pipe in loaded:
            assert type(pipe.transformer) is HunyuanVideoTransformer3DModel
            pipe.set_progress_bar_config(disable=True)
            assert torch.equal(generate(pipe, PROMPTS[0], SEEDS[:1]), expected)
        # and by Diffusers' own class, as its weights are
        plain = HunyuanVideoPipeline.from_pretrained(tmp_path, transformer=Reference.from_pretrained(transformer))
        plain.set_progress_bar_config(disable=True)
        original = generate(tiny_pipeline, PROMPTS[0], SEEDS[:1])
        assert torch.equal(generate(plain, PROMPTS[0], SEEDS[:1]), original)

    def test_repaired_pipeline_keeps_it(self, dropped_in):
        """What is left to repair is the pipeline; isolation is set for our own class too."""
        ours = dropped_in.transformer
        (done,) = reelbatch.repair(dropped_in, isolation="packed")
        assert done.fault.startswith("prompt_2")
        packs = []
        ours.register_forward_pre_hook(lambda module, args, kwargs: packs.append(module.isolation), with_kwargs=True)
        four = {"num_videos_per_prompt": 2, "guidance_scale": [6.0, 2.5], "negative_prompt": "blurry"}
        generate(dropped_in, PROMPTS[:2], [*SEEDS, 5], true_cfg_scale=2.0, **four)
        assert set(packs) == {"packed"}
        assert ours.isolation == "exact" and "isolation" not in vars(ours)
        reelbatch.restore(dropped_in)
        assert dropped_in.transformer is ours and type(ours) is HunyuanVideoTransformer3DModel
        assert type(dropped_in) is HunyuanVideoPipeline
        ours._forward_pre_hooks.clear()
        ours._forward_pre_hooks_with_kwargs.clear()

    def test_attention_backends_by_our_names_and_by_those_of_diffusers(self, model):
        batch = padded_batch()
        expected = run(model, batch)
        names = {
            "auto": "auto",
            "sdpa": "sdpa",
            "flash": "flash",
            "math": "math",
            "native": "auto",
            "_native_flash": "flash",
            "_native_math": "math",
            "_NATIVE_MATH": "math",
            "Flash": "flash",
        }
        for name, ours in names.items():
            model.set_attention_backend(name)
            assert model.attention_backend == ours
            assert difference(run(model, batch), expected) <= 1e-5
        for name in ("_native_cudnn", "_native_efficient", "varlen"):
            model.set_attention_backend(name)
            with pytest.raises(AttentionBackendError, match=r"CUDA|float16"):
                run(model, batch)
        model.reset_attention_backend()
        assert model.attention_backend == "auto"
        assert torch.equal(run(model, batch), expected)
        with pytest.raises(AttentionBackendError, match="No attention backend 'sage'; there are sdpa, flash"):
            model.set_attention_backend("sage")
        assert model.attention_backend == "auto"

    def test_step_caches_are_refused(self, model):
        for config in (
            FirstBlockCacheConfig(),
            PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2),
        ):
            with pytest.raises(
                NotImplementedError, match=rf"{type(config).__name__}: .*decides once for the whole batch"
            ):
                model.enable_cache(config)
        assert not model.is_cache_enabled
