"""Diffusers' HunyuanVideo 1.5 pipelines after the repair."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import FirstBlockCacheConfig
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
from video15 import differences, make_transformer, make_vae

import reelbatch
from reelbatch.repairs import hunyuan_video15
from reelbatch.repairs.fix import CannotRepair, Undo

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
MORE = [*PROMPTS, "two horses running on the sea"]
NEGATIVE = "blurry"


def generate(pipe: Any, prompt: Any, seeds: list[int], **options: Any) -> torch.Tensor:
    """[videos, frames, channels, height, width], each from its own seed."""
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {} if "image" in options else {"height": 16, "width": 16}
    return pipe(
        prompt=prompt, num_frames=5, num_inference_steps=2, generator=generator, output_type="pt", **size, **options
    ).frames


def test_prompts_together_equal_each_alone():
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


def test_videos_per_prompt_and_one_negative_prompt():
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
def test_masks_go_with_their_embeddings(image_to_video):
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


def test_image_to_video():
    pipe = make_pipeline(image_to_video=True)
    expected = torch.cat([generate(pipe, p, [i], image=image()) for i, p in enumerate(PROMPTS)])
    with pytest.raises(RuntimeError, match="broadcast"):
        generate(pipe, PROMPTS, [0, 1], image=image())
    repair_all(pipe)
    assert max(differences(generate(pipe, PROMPTS, [0, 1], image=image()), expected)) <= 1e-5


def image() -> PIL.Image.Image:
    return PIL.Image.linear_gradient("L").resize((16, 16)).convert("RGB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image_to_video", [False, True], ids=["text", "image"])
def test_exact_is_bit_for_bit(image_to_video, dtype):
    pipe = make_pipeline(image_to_video)
    pipe.transformer.to(dtype)
    assert len(reelbatch.repair(pipe)) == 3
    options = {"negative_prompt": NEGATIVE, **({"image": image()} if image_to_video else {})}
    alone = torch.cat([generate(pipe, prompt, [seed], **options) for seed, prompt in enumerate(MORE)])
    assert len({video.sum().item() for video in alone}) == len(MORE)
    for order in ([0, 1, 2], [2, 0], [1, 1, 2]):
        found = generate(pipe, [MORE[i] for i in order], order, **options)
        assert torch.equal(found, alone[order])
    assert not pipe.vae.use_slicing
    twice = generate(pipe, MORE[:2], [0, 1, 1, 2], num_videos_per_prompt=2, **options)
    assert torch.equal(twice[0], alone[0])
    assert torch.equal(twice[2], alone[1])
    reelbatch.restore(pipe)
    assert type(pipe) in (HunyuanVideo15Pipeline, HunyuanVideo15ImageToVideoPipeline)


def test_packed_is_the_same_to_rounding():
    pipe = make_pipeline()
    reelbatch.repair(pipe, isolation="packed")
    packs = []
    pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, inputs: packs.append(len(inputs[0])))
    alone = torch.cat([generate(pipe, prompt, [seed]) for seed, prompt in enumerate(MORE)])
    packs.clear()
    assert max(differences(generate(pipe, MORE, [0, 1, 2]), alone)) <= 1e-5
    assert packs == [3] * len(packs)
    reelbatch.repair(pipe)
    packs.clear()
    generate(pipe, MORE, [0, 1, 2])
    assert set(packs) == {1}
    assert pipe.transformer.isolation == "exact"  # but during the call


def test_every_text_is_read_alone_and_once():
    pipe = make_pipeline()
    reelbatch.repair(pipe)
    reads = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generate(pipe, [MORE[0], MORE[1], MORE[0]], [0, 1, 2], negative_prompt=NEGATIVE)
    assert reads == [1, 1, 1]


@torch.no_grad()
def test_embeddings_that_are_given():
    pipe = make_pipeline()
    names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    given = dict(zip(names, pipe.encode_prompt(PROMPTS, batch_size=2), strict=True))
    reelbatch.repair(pipe)
    found = generate(pipe, None, [0, 1, 2, 3], num_videos_per_prompt=2, **given)
    assert max(differences(found, generate(pipe, PROMPTS, [0, 1, 2, 3], num_videos_per_prompt=2))) <= 1e-5
    reads = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    glyphs = {name: value for name, value in given.items() if name.endswith("_2")}
    assert torch.equal(generate(pipe, PROMPTS, [0, 1], **glyphs), generate(pipe, PROMPTS, [0, 1]))
    assert set(reads) == {1}
    with pytest.raises(ValueError, match="prompt has 3 texts for 2 prompts"):
        generate(pipe, PROMPTS, [0, 1], negative_prompt=MORE)


def test_step_caches_are_refused():
    pipe = make_pipeline()
    reelbatch.repair(pipe)
    with pytest.raises(NotImplementedError, match="decides once for the whole batch"):
        pipe.transformer.enable_cache(FirstBlockCacheConfig())


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_file(tmp_path, when):
    """What another pipeline saved is loaded, scaled, and taken off again."""
    pipe, other = make_pipeline(), make_transformer()
    torch.manual_seed(0)
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q", "add_k_proj", "linear_2"], init_lora_weights=False))
    other.save_lora_adapter(tmp_path)
    load = partial(
        pipe.transformer.load_lora_adapter,
        tmp_path,
        adapter_name="style",
        prefix=None,
        weight_name="pytorch_lora_weights.safetensors",
    )
    plain = generate(pipe, PROMPTS[1], [1])
    if when == "before":
        load()
        expected = generate(pipe, PROMPTS[1], [1])
        assert min(differences(expected, plain)) > 1e-3
    reelbatch.repair(pipe)
    if when == "after":
        load()
        expected = generate(pipe, PROMPTS[1], [1])
        assert min(differences(expected, plain)) > 1e-3
    alone = [generate(pipe, PROMPTS[0], [0]), generate(pipe, PROMPTS[1], [1])]
    assert torch.equal(generate(pipe, PROMPTS, [0, 1]), torch.cat(alone))
    assert max(differences(alone[1], expected)) <= 1e-5
    pipe.transformer.delete_adapters("style")
    assert max(differences(generate(pipe, PROMPTS[1], [1]), plain)) <= 1e-5


def test_changed_encode_prompt_is_refused(monkeypatch):
    pipe = make_pipeline()
    monkeypatch.setattr(HunyuanVideo15Pipeline, "encode_prompt", lambda self: None)
    with pytest.raises(CannotRepair, match=r"HunyuanVideo15Pipeline\.encode_prompt"):
        hunyuan_video15.faults(pipe)[-1].apply()
    assert type(pipe) is HunyuanVideo15Pipeline


def test_saves_as_what_it_is(tmp_path):
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
