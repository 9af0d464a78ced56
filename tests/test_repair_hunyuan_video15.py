"""drop_in/hunyuan_video15.py and drop_in/reclass.py: Diffusers' HunyuanVideo 1.5, each sample against its solo run.

"Solo" is Diffusers' own, unrepaired model with one sample.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import accelerate
import PIL.Image
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from peft import LoraConfig
from tokenizers import pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from reelbatch.repair import hunyuan_video15, hunyuan_video15_pipeline
from reelbatch.repair.fix import CannotRepair, Undo, same_source, source_digest
from reelbatch.repair.reclass import reclass

TEXT, GLYPHS, IMAGE = 12, 7, 5
"""Tokens that a sample's text, glyphs and image have room for."""
VIDEO = 3 * 4 * 2
"""Video tokens of a sample at patch 1."""
TEXT_LENGTHS, GLYPH_LENGTHS, HAS_IMAGE = (11, 4, 6, 9), (0, 3, 7, 0), (False, True, False, True)
VALID = tuple(n + m + IMAGE * i for n, m, i in zip(TEXT_LENGTHS, GLYPH_LENGTHS, HAS_IMAGE, strict=True))


def make_transformer(**changes: Any) -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(0)
    config = {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 32,
        "text_embed_2_dim": 24,
        "image_embed_dim": 20,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 16,
    }
    model = HunyuanVideo15Transformer3DModel(**{**config, **changes})
    tiny.randomise(model, 0)
    return model.eval()


def make_vae() -> AutoencoderKLHunyuanVideo15:
    torch.manual_seed(1)
    model = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    tiny.randomise(model, 1)
    return model.eval()


def mixed_batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Text-to-video and image-to-video in turn, no two of the same text length; padding is noise, not zero."""
    torch.manual_seed(2)
    masks = [[position < n for position in range(TEXT)] for n in TEXT_LENGTHS]
    masks[2] = [position % 2 == 1 for position in range(TEXT)]  # its 6 valid tokens lie apart
    batch = {
        "hidden_states": torch.randn(4, 9, 3, 4, 2),
        "timestep": torch.tensor([1000.0, 700.0, 400.0, 100.0]),
        "encoder_hidden_states": torch.randn(4, TEXT, 32),
        "encoder_attention_mask": torch.tensor(masks),
        "encoder_hidden_states_2": torch.randn(4, GLYPHS, 24),
        "encoder_attention_mask_2": torch.arange(GLYPHS) < torch.tensor(GLYPH_LENGTHS)[:, None],
        "image_embeds": torch.randn(4, IMAGE, 20) * torch.tensor(HAS_IMAGE)[:, None, None],
    }
    return {name: tensor.to(dtype) for name, tensor in batch.items()}


def run(model: HunyuanVideo15Transformer3DModel, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return model(**batch, return_dict=False, **options)[0]


def solo(model: HunyuanVideo15Transformer3DModel, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Each sample by itself."""
    singles = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(batch["timestep"]))]
    return torch.cat([run(model, single, **options) for single in singles])


def differences(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """The largest difference of each sample, relative to the largest value of the expected one."""
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


def repair(**components: Any) -> Undo:
    (fix,) = hunyuan_video15.faults(SimpleNamespace(**components))
    return fix.apply()


@pytest.fixture
def transformer() -> HunyuanVideo15Transformer3DModel:
    return make_transformer()


@pytest.fixture
def vae() -> AutoencoderKLHunyuanVideo15:
    return make_vae()


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, int, int, int]]]:
    """(mask, batch, queries, keys) of every call of PyTorch's attention."""
    calls = []
    attend = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        calls.append((attn_mask, query.shape[0], query.shape[2], key.shape[2]))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


class TestTransformer:
    @pytest.mark.parametrize(
        "changes",
        [{}, {"patch_size": 2, "num_layers": 1}, {"use_meanflow": True, "num_layers": 1}],
        ids=["patch1", "patch2", "meanflow"],
    )
    @torch.no_grad()
    def test_every_sample_is_its_solo_one(self, changes):
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
    def test_text_to_video_alone_and_samples_of_one_length(self, transformer):
        batch = mixed_batch()
        batch["image_embeds"].zero_()
        same = {name: tensor[[1, 1]] for name, tensor in batch.items()}
        expected, expected_same = solo(transformer, batch), solo(transformer, same)
        repair(transformer=transformer)
        assert max(differences(run(transformer, batch), expected)) <= 1e-5
        assert max(differences(run(transformer, same), expected_same)) <= 1e-5

    @torch.no_grad()
    def test_one_image_for_the_videos_of_a_prompt(self, transformer):
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
    def test_no_mask_and_only_valid_tokens(self, transformer, attention_calls):
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
    def test_what_is_padded_does_not_matter(self, transformer):
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
    def test_gradients_are_those_of_the_solo_runs(self, transformer, checkpointing):
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
    def test_bfloat16(self):
        """Within the rounding of bfloat16: no further from fp32 than Diffusers' own solo run."""
        model, batch = make_transformer(), mixed_batch()
        exact = solo(model, batch)
        model, batch = model.to(torch.bfloat16), mixed_batch(torch.bfloat16)
        rounding = max(differences(solo(model, batch).float(), exact))
        repair(transformer=model)
        assert max(differences(run(model, batch).float(), exact)) <= 1.5 * rounding

    @torch.no_grad()
    def test_parts_still_take_masks(self, transformer):
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
    def test_keeps_attention_backend(self, transformer):
        transformer.set_attention_backend("_native_math")
        repair(transformer=transformer)
        processor = transformer.transformer_blocks[0].attn.processor
        assert processor._attention_backend == "_native_math"
        expected = solo(make_transformer(), mixed_batch())
        assert max(differences(run(transformer, mixed_batch()), expected)) <= 1e-5

    @torch.no_grad()
    def test_compiled(self, transformer):
        """One that `torch.compile` wrapped and ran before is found inside, and compiled anew."""
        batch = mixed_batch()
        expected = solo(transformer, batch)
        compiled = torch.compile(transformer, backend="eager")
        run(compiled, batch)
        repair(transformer=compiled)
        assert max(differences(run(compiled, batch), expected)) <= 1e-5

    def test_what_is_missing_is_named(self, transformer):
        repair(transformer=transformer)
        batch = mixed_batch()
        del batch["image_embeds"]
        with pytest.raises(ValueError, match="image_embeds"):
            run(transformer, batch)


class TestVae:
    @pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiles"])
    @torch.no_grad()
    def test_decode_and_encode_equal_solo(self, vae, tiling):
        if tiling:
            vae.enable_tiling(16, 16, 4, 4, 0.5)
        latents, video = torch.randn(4, 4, 4, 6, 5), torch.randn(4, 3, 5, 24, 20)
        expected_video = torch.cat([vae.decode(one).sample for one in latents.split(1)])
        expected_moments = torch.cat([vae.encode(one).latent_dist.parameters for one in video.split(1)])
        repair(vae=vae)
        assert max(differences(vae.decode(latents).sample, expected_video)) <= 1e-5
        assert max(differences(vae.encode(video).latent_dist.parameters, expected_moments)) <= 1e-5

    @torch.no_grad()
    def test_unrepaired_raises(self, vae):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            vae.decode(torch.randn(2, 4, 2, 4, 4))
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            vae.encode(torch.randn(2, 3, 3, 16, 16))

    @torch.no_grad()
    def test_no_mask(self, vae, attention_calls):
        repair(vae=vae)
        vae.decode(torch.randn(2, 4, 3, 4, 4))
        assert attention_calls == [(None, 2, 16, 16 * frames) for frames in (1, 2, 3)]

    def test_gradients_are_those_of_the_solo_runs(self, vae):
        latents, unrepaired = torch.randn(2, 4, 3, 4, 4), copy.deepcopy(vae)
        repair(vae=vae)
        vae.decode(latents).sample.square().sum().backward()
        torch.cat([unrepaired.decode(one).sample for one in latents.split(1)]).square().sum().backward()
        found, expected = ([p.grad for p in model.decoder.parameters()] for model in (vae, unrepaired))
        largest = max(grad.abs().max() for grad in expected)
        assert all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(found, expected, strict=True))


def classes(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


class TestUndo:
    @torch.no_grad()
    def test_transformer_is_what_it_was(self, transformer):
        batch = {name: tensor[:1] for name, tensor in mixed_batch().items()}
        before, state = run(transformer, batch), {n: p.data_ptr() for n, p in transformer.named_parameters()}
        found, processors = classes(transformer), transformer.attn_processors
        undo = repair(transformer=transformer)
        assert classes(transformer) != found
        assert hunyuan_video15.faults(SimpleNamespace(transformer=transformer, vae=None)) == []
        assert {n: p.data_ptr() for n, p in transformer.named_parameters()} == state
        undo()
        undo()  # a second time does nothing
        assert classes(transformer) == found
        assert all(transformer.attn_processors[name] is processor for name, processor in processors.items())
        assert torch.equal(run(transformer, batch), before)
        assert len(hunyuan_video15.faults(SimpleNamespace(transformer=transformer, vae=None))) == 1

    @torch.no_grad()
    def test_vae_is_what_it_was(self, vae):
        latents = torch.randn(1, 4, 3, 4, 4)
        before, found = vae.decode(latents).sample, classes(vae)
        undo = repair(vae=vae)
        assert classes(vae) != found
        assert hunyuan_video15.faults(SimpleNamespace(transformer=None, vae=vae)) == []
        undo()
        assert classes(vae) == found
        assert torch.equal(vae.decode(latents).sample, before)

    def test_names_stay(self, transformer, vae, tmp_path):
        repair(transformer=transformer)
        repair(vae=vae)
        for model, expected in (
            (transformer, HunyuanVideo15Transformer3DModel),
            (vae, AutoencoderKLHunyuanVideo15),
        ):
            model.save_pretrained(tmp_path)
            assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == expected.__name__
            again = type(model).from_pretrained(tmp_path)
            assert type(again) is expected
            assert isinstance(model, expected)
            assert str(type(model)) == str(expected)


class TestRefusal:
    SOURCES = hunyuan_video15.TRANSFORMER_SOURCE + hunyuan_video15_pipeline.VAE_SOURCE

    @pytest.mark.parametrize(("owner", "name", "digest"), SOURCES, ids=lambda value: getattr(value, "__name__", ""))
    def test_changed_source(self, transformer, vae, monkeypatch, owner, name, digest):
        assert same_source(getattr(owner, name), digest)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
        model = {"transformer": transformer} if (owner, name, digest) in self.SOURCES[:-2] else {"vae": vae}
        (found,) = (classes(module) for module in model.values())
        with pytest.raises(CannotRepair, match=rf"{owner.__name__}\.{name}"):
            repair(**model)
        assert [classes(module) for module in model.values()] == [found]

    def test_unknown_processor(self, transformer):
        class Own(HunyuanVideo15AttnProcessor2_0):
            pass

        transformer.transformer_blocks[1].attn.set_processor(Own())
        found, processors = classes(transformer), transformer.attn_processors
        with pytest.raises(CannotRepair, match="Own"):
            repair(transformer=transformer)
        assert classes(transformer) == found
        assert transformer.attn_processors == processors

    def test_unknown_class(self, vae):
        class Own(type(vae.decoder.mid_block.attentions[0])):
            pass

        vae.decoder.mid_block.attentions[0].__class__ = Own
        found = classes(vae)
        with pytest.raises(CannotRepair, match="Own"):
            repair(vae=vae)
        assert classes(vae) == found

    def test_unknown_wrapper(self, transformer):
        forward = transformer.context_embedder.forward
        transformer.context_embedder.forward = lambda *args: forward(*args)
        found = classes(transformer)
        with pytest.raises(CannotRepair, match="wraps the forward of this HunyuanVideo15TokenRefiner"):
            repair(transformer=transformer)
        assert classes(transformer) == found

    def test_source_that_is_not_there(self):
        assert source_digest(len) == source_digest(None) == ""


class CountingHook(ModelHook):
    """accelerate's."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class CountingDiffusersHook(DiffusersHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class CountingNewForwardHook(DiffusersHook):
    """One that calls the forward that it replaces itself."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def accelerate_hooks(model: torch.nn.Module) -> Callable[[], int]:
    hooks = [CountingHook(), CountingHook(), CountingHook()]
    for module, hook in zip((model, model.context_embedder, model.transformer_blocks[0].attn), hooks, strict=True):
        add_hook_to_module(module, hook)
    return lambda: min(hook.calls for hook in hooks)


def diffusers_hooks(model: torch.nn.Module) -> Callable[[], int]:
    hooks = []
    for module in (model, model.context_embedder, model.context_embedder.token_refiner, model.transformer_blocks[0]):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        hooks += [CountingDiffusersHook(), CountingNewForwardHook(), CountingDiffusersHook()]
        for position, hook in enumerate(hooks[-3:]):
            registry.register_hook(hook, f"count{position}")
    return lambda: min(hook.calls for hook in hooks)


def both_hooks(model: torch.nn.Module) -> Callable[[], int]:
    counts = diffusers_hooks(model), accelerate_hooks(model)
    return lambda: min(count() for count in counts)


def cpu_offload(model: torch.nn.Module) -> Callable[[], int]:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return lambda: 1


def group_offload(model: torch.nn.Module, **options: Any) -> Callable[[], int]:
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), **options)
    return lambda: 1


HOOKS = {
    "accelerate": accelerate_hooks,
    "diffusers": diffusers_hooks,
    "both": both_hooks,
    "cpu_offload": cpu_offload,
    "group_leaf": functools.partial(group_offload, offload_type="leaf_level"),
    "group_block": functools.partial(group_offload, offload_type="block_level", num_blocks_per_group=1),
}


class TestHooks:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
    @torch.no_grad()
    def test_kept(self, transformer, hooks, when):
        batch = mixed_batch()
        expected, unrepaired = solo(transformer, batch), run(transformer, batch)
        if when == "before":
            count = hooks(transformer)
            undo = repair(transformer=transformer)
        else:
            undo = repair(transformer=transformer)
            count = hooks(transformer)
        assert max(differences(run(transformer, batch), expected)) <= 1e-5
        assert count() >= 1
        undo()
        assert max(differences(run(transformer, batch), unrepaired)) <= 1e-6
        assert max(differences(run(transformer, batch), expected)) > 1e-3

    @torch.no_grad()
    def test_hooks_may_go_in_between(self, transformer):
        batch = mixed_batch()
        expected, unrepaired = solo(transformer, batch), run(transformer, batch)
        accelerate_hooks(transformer)
        undo = repair(transformer=transformer)
        remove_hook_from_module(transformer, recurse=True)
        assert "forward" in vars(transformer)  # the bound method that accelerate leaves behind
        assert max(differences(run(transformer, batch), expected)) <= 1e-5
        undo()
        assert torch.equal(run(transformer, batch), unrepaired)
        repair(transformer=transformer)
        assert max(differences(run(transformer, batch), expected)) <= 1e-5

    @torch.no_grad()
    def test_vae_with_hooks(self, vae):
        latents = torch.randn(2, 4, 2, 4, 4)
        expected = torch.cat([vae.decode(one).sample for one in latents.split(1)])
        add_hook_to_module(vae.decoder.mid_block.attentions[0], hook := CountingHook())
        undo = repair(vae=vae)
        assert max(differences(vae.decode(latents).sample, expected)) <= 1e-5
        assert hook.calls == 1
        undo()
        with pytest.raises(RuntimeError, match="broadcast"):
            vae.decode(latents)

    @torch.no_grad()
    def test_lora(self, transformer):
        torch.manual_seed(3)
        targets = ["to_q", "add_k_proj", "to_out.0", "proj_in", "linear_2"]
        transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        batch, scale = mixed_batch(), {"attention_kwargs": {"scale": 0.5}}
        expected, scaled = solo(transformer, batch), solo(transformer, batch, **scale)
        transformer.disable_adapters()
        plain = solo(transformer, batch)
        transformer.enable_adapters()
        repair(transformer=transformer)
        assert min(differences(expected, plain)) > 1e-3
        assert min(differences(scaled, expected)) > 1e-3
        assert max(differences(run(transformer, batch), expected)) <= 1e-5
        assert max(differences(run(transformer, batch, **scale), scaled)) <= 1e-5


class Base(torch.nn.Module):
    def forward(self) -> str:
        return "base"


class Derived(Base):
    def forward(self) -> str:
        return "derived"


class TestReclass:
    def test_switches_and_returns(self):
        module = Base()
        undo = reclass(module, Derived)
        assert type(module) is Derived
        assert module() == "derived"
        undo()
        assert type(module) is Base
        assert vars(module).keys() == vars(Base()).keys()

    def test_kept_forward_is_exchanged(self):
        module = Base()
        module.forward = MethodType(Base.forward, module)
        undo = reclass(module, Derived)
        assert module() == "derived"
        undo()
        assert module.forward == MethodType(Base.forward, module)

    def test_refuses_another_class(self):
        with pytest.raises(CannotRepair, match=r"found a torch.*Linear where Base was expected"):
            reclass(torch.nn.Linear(1, 1), Derived)

    def test_refuses_undo_of_what_changed_again(self):
        class Further(Derived):
            pass

        module = Base()
        undo = reclass(module, Derived)
        later = reclass(module, Further)
        with pytest.raises(CannotRepair, match="undo that first"):
            undo()
        later()
        undo()
        assert type(module) is Base


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def make_pipeline(image_to_video: bool = False) -> Any:
    """All of Diffusers' own components with random weights; the tokenizer spells in bytes."""
    torch.manual_seed(4)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *special])}
    tokenizer = Qwen2Tokenizer(vocabulary, [], additional_special_tokens=special[1:])
    tokenizer.chat_template = CHAT
    text_config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        rope_scaling={"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
        bos_token_id=vocabulary["<|endoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    glyph_config = T5Config(vocab_size=384, d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2)
    components = {
        "text_encoder": Qwen2_5_VLTextModel(text_config).eval(),
        "tokenizer": tokenizer,
        "transformer": make_transformer(),
        "vae": make_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": T5EncoderModel(glyph_config).eval(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=4.0),
    }
    if image_to_video:
        vision = SiglipVisionConfig(
            hidden_size=20,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        components["image_encoder"] = SiglipVisionModel(vision).eval()
        components["feature_extractor"] = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    pipe = (HunyuanVideo15ImageToVideoPipeline if image_to_video else HunyuanVideo15Pipeline)(**components)
    pipe.system_message = "describe"
    pipe.prompt_template_encode_start_idx = len("?system\ndescribe?\n?user\n")
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 60, 20, 4
    pipe.set_progress_bar_config(disable=True)
    return pipe


def repair_all(pipe: Any) -> list[Undo]:
    fixes = hunyuan_video15.faults(pipe)
    assert len(fixes) == 3
    undos = [fix.apply() for fix in fixes]
    assert hunyuan_video15.faults(pipe) == []
    return undos


PROMPTS = ["a cat", 'a large red sign that says "go", at night']
NEGATIVE = "blurry"


def generate(pipe: Any, prompt: Any, seeds: list[int], **options: Any) -> torch.Tensor:
    """[videos, frames, channels, height, width], each from its own seed."""
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {} if "image" in options else {"height": 16, "width": 16}
    return pipe(
        prompt=prompt, num_frames=5, num_inference_steps=2, generator=generator, output_type="pt", **size, **options
    ).frames


class TestPipeline:
    def test_prompts_together_equal_each_alone(self):
        pipe = make_pipeline()
        expected = torch.cat([generate(pipe, p, [i], negative_prompt=NEGATIVE) for i, p in enumerate(PROMPTS)])
        assert min(differences(expected[:1], expected[1:])) > 0.05
        with pytest.raises(RuntimeError, match="broadcast"):  # the VAE
            generate(pipe, PROMPTS, [0, 1], negative_prompt=[NEGATIVE, NEGATIVE])
        undos = repair_all(pipe)
        found = generate(pipe, PROMPTS, [0, 1], negative_prompt=[NEGATIVE, NEGATIVE])
        assert max(differences(found, expected)) <= 1e-5
        for undo in reversed(undos):
            undo()
        assert torch.equal(generate(pipe, PROMPTS[1], [1], negative_prompt=NEGATIVE)[0], expected[1])

    def test_videos_per_prompt_and_one_negative_prompt(self):
        pipe = make_pipeline()
        order = [(PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 2), (PROMPTS[1], 3)]
        expected = torch.cat([generate(pipe, p, [seed], negative_prompt=NEGATIVE) for p, seed in order])
        with pytest.raises(RuntimeError, match="is invalid for input of size"):  # image embeddings for one video
            generate(pipe, PROMPTS[0], [0, 1], num_videos_per_prompt=2)
        of_transformer, of_vae, of_pipeline = hunyuan_video15.faults(pipe)
        of_transformer.apply(), of_vae.apply()
        several = {"prompt": PROMPTS, "seeds": [0, 1, 2, 3], "num_videos_per_prompt": 2}
        faulty = differences(generate(pipe, **several, negative_prompt=[NEGATIVE, NEGATIVE]), expected)
        assert faulty[1] > 1e-3  # masks of the other prompt
        assert faulty[2] > 1e-3
        of_pipeline.apply()
        assert max(differences(generate(pipe, **several, negative_prompt=NEGATIVE), expected)) <= 1e-5

    @pytest.mark.parametrize("image_to_video", [False, True])
    @torch.no_grad()
    def test_masks_go_with_their_embeddings(self, image_to_video):
        pipe = make_pipeline(image_to_video)
        alone = [pipe.encode_prompt(prompt) for prompt in PROMPTS]
        order = [0, 0, 1, 1]
        several = {"prompt": PROMPTS, "batch_size": 2, "num_videos_per_prompt": 2}
        masks = pipe.encode_prompt(**several)[1]
        assert [torch.equal(masks[i], alone[k][1][0]) for i, k in enumerate(order)] == [True, False, False, True]
        with pytest.raises(RuntimeError):
            pipe.transformer.context_embedder(pipe.encode_prompt(NEGATIVE, batch_size=2)[0], torch.zeros(2))
        pipe_fix = hunyuan_video15.faults(pipe)[-1]
        undo = pipe_fix.apply()
        for position, found in enumerate(pipe.encode_prompt(**several)):
            expected = torch.cat([alone[k][position] for k in order])
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-5
        shared = pipe.encode_prompt(NEGATIVE, batch_size=2)
        assert [len(part) for part in shared] == [2, 2, 2, 2]
        undo()
        assert torch.equal(pipe.encode_prompt(**several)[1], masks)

    def test_image_to_video(self):
        pipe = make_pipeline(image_to_video=True)
        image = PIL.Image.linear_gradient("L").resize((16, 16)).convert("RGB")
        expected = torch.cat([generate(pipe, p, [i], image=image) for i, p in enumerate(PROMPTS)])
        with pytest.raises(RuntimeError, match="broadcast"):
            generate(pipe, PROMPTS, [0, 1], image=image)
        repair_all(pipe)
        assert max(differences(generate(pipe, PROMPTS, [0, 1], image=image), expected)) <= 1e-5

    def test_changed_encode_prompt_is_refused(self, monkeypatch):
        pipe = make_pipeline()
        monkeypatch.setattr(HunyuanVideo15Pipeline, "encode_prompt", lambda self: None)
        with pytest.raises(CannotRepair, match=r"HunyuanVideo15Pipeline\.encode_prompt"):
            hunyuan_video15.faults(pipe)[-1].apply()
        assert type(pipe) is HunyuanVideo15Pipeline

    def test_saves_as_what_it_is(self, tmp_path):
        pipe = make_pipeline()
        repair_all(pipe)
        pipe.transformer = pipe.transformer  # makes Diffusers look at the class's module again
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == "HunyuanVideo15Pipeline"
        assert index["transformer"] == ["diffusers", "HunyuanVideo15Transformer3DModel"]
        again = type(pipe).from_pretrained(tmp_path)
        assert type(again) is HunyuanVideo15Pipeline
        assert {type(p) for p in again.transformer.attn_processors.values()} == {
            HunyuanVideo15AttnProcessor2_0,
            AttnProcessor2_0,
        }
