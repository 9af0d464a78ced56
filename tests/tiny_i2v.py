"""Small networks of HunyuanVideo's image-to-video models and of SkyReels V1, with random weights (see `tiny`)."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import tiny
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from tiny15 import picture
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reelbatch import VideoRequest
from reelbatch.demo.tokenizers import clip_tokenizer, llama_tokenizer

Kind = Literal["token_replace", "latent_concat", "skyreels", "skyreels text"]
IMAGE_KINDS: tuple[Kind, ...] = ("token_replace", "latent_concat", "skyreels")
KINDS: tuple[Kind, ...] = (*IMAGE_KINDS, "skyreels text")
SIDE, PATCH = 32, 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
DEFAULTS = {"height": 64, "width": 96, "frames": 5, "steps": 2, "fps": 8}
TRANSFORMERS: dict[Kind, dict[str, Any]] = {
    "token_replace": {"image_condition_type": "token_replace"},
    "latent_concat": {"image_condition_type": "latent_concat", "in_channels": 9, "guidance_embeds": False},
    "skyreels": {"in_channels": 8},
    "skyreels text": {},
}


def tokenizer_with_image() -> PreTrainedTokenizerFast:
    """Llama's, which knows the words of the template and LLaVA's mark for an image."""
    tokenizer = llama_tokenizer([*tiny.WORDS, DEFAULT_PROMPT_TEMPLATE["template"].replace("<image>", " ")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def prompt_template(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The reference's, for a vision tower of few patches and this tokenizer."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    before = tokenizer(template.split("<image>")[0]).input_ids
    return {
        "template": template,
        "crop_start": len(tokenizer(template.split("{}")[0]).input_ids),
        "image_emb_len": IMAGE_TOKENS,
        "image_emb_start": len(before),
        "image_emb_end": len(before) + IMAGE_TOKENS,
    }


def llava(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
        initializer_factor=5.0,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=tiny.llama_config(tokenizer).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    model = LlavaForConditionalGeneration(config)
    tiny.randomise(model, seed)
    return model.eval()


def pipeline(kind: Kind, seed: int = 0, **changes: Any) -> Any:
    """Diffusers' own pipeline of a kind, all components with random weights."""
    tokenizer_2 = clip_tokenizer(tiny.WORDS, Path(mkdtemp()))
    components: dict[str, Any] = {
        "transformer": tiny.transformer(seed=seed, **TRANSFORMERS[kind], **changes),
        "vae": tiny.vae(seed),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": tiny.clip(tokenizer_2, seed=seed),
        "tokenizer_2": tokenizer_2,
    }
    if kind in ("token_replace", "latent_concat"):
        tokenizer = tokenizer_with_image()
        square = {"height": SIDE, "width": SIDE}
        pipe: Any = HunyuanVideoImageToVideoPipeline(
            **components,
            text_encoder=llava(tokenizer, seed),
            tokenizer=tokenizer,
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square),
        )
    else:
        tokenizer = llama_tokenizer(tiny.WORDS)
        known = HunyuanVideoPipeline if kind == "skyreels text" else HunyuanSkyreelsImageToVideoPipeline
        pipe = known(**components, text_encoder=tiny.llama(tokenizer, seed=seed), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_folder(folder: Path, kind: Kind, seed: int = 0) -> Path:
    """Writes a whole model folder (Diffusers layout, safetensors, fp32) and a `reelbatch.json` with small defaults."""
    pipe = pipeline(kind, seed)
    pipe.save_pretrained(folder)
    profile: dict[str, Any] = {"defaults": DEFAULTS}
    if kind == "skyreels text":
        profile["guidance"] = "classifier-free"
    if kind in ("token_replace", "latent_concat"):
        template = prompt_template(pipe.tokenizer)
        profile["prompt_template"] = {name: template[name] for name in ("template", "crop_start")}
    (folder / "reelbatch.json").write_text(json.dumps(profile), encoding="utf-8")
    return folder


def mixed(kind: Kind) -> list[VideoRequest]:
    """With guidance and without, images of different shapes; no two of one size or number of steps."""
    asked: list[dict[str, Any]] = [
        {"prompt": "a red cat", "image": picture(96, 64), "steps": 3},
        {"prompt": "a dog running right", "image": picture(64, 96, 1), "frames": 1, "height": 32, "width": 48},
        {"prompt": "a cat", "image": picture(96, 64, 3), "steps": 1, "negative_prompt": "blurry", "true_cfg": 3},
        {"prompt": "\n\na horse", "image": picture(40, 60, 2), "height": 48, "width": 32, "frames": 9, "guidance": 1},
    ]
    if kind == "skyreels text":
        asked = [{name: value for name, value in fields.items() if name != "image"} for fields in asked]
    return [VideoRequest(seed=seed, id=str(seed), **fields) for seed, fields in enumerate(asked)]
