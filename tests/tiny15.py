"""HunyuanVideo 1.5's networks, small and with random weights, none of them zero (see `tiny`).

`python tests/tiny15.py FOLDER` writes a whole image-to-video model of less than 6 MB, which Diffusers opens too.
"""

from __future__ import annotations

import argparse
import io
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from tiny import WORDS, randomise
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from reelbatch import VideoRequest
from reelbatch.attention import rule_names
from reelbatch.demo.tokenizers import qwen_tokenizer
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.memory.placement import Placement
from reelbatch.models.hunyuan_video15.family import HunyuanVideo15
from reelbatch.models.hunyuan_video15.images import ImageEncoder
from reelbatch.models.hunyuan_video15.text import TextEncoder
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel as Ours
from reelbatch.models.hunyuan_video15.vae import VideoDecoder
from reelbatch.models.images import nearest_size
from reelbatch.request import ModelLimits, RequestDefaults

TRANSFORMER: dict[str, Any] = {
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
    "target_size": 64,
}


def transformer(seed: int = 0, **changes: Any) -> HunyuanVideo15Transformer3DModel:
    """Diffusers' own class, the reference."""
    torch.manual_seed(seed)
    model = HunyuanVideo15Transformer3DModel(**{**TRANSFORMER, **changes})
    randomise(model, seed)
    return model.eval()


def vae(seed: int = 1, **changes: Any) -> AutoencoderKLHunyuanVideo15:
    """Diffusers' own class. 16 × 16 pixels and, the first aside, 4 frames become one of the latents, as in the
    published model."""
    torch.manual_seed(seed)
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 16, 16),
        "layers_per_block": 1,
        "scaling_factor": 1.03682,
    }
    model = AutoencoderKLHunyuanVideo15(**{**config, **changes})
    randomise(model, seed)
    return model.eval()


def qwen(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5_VLTextModel:
    torch.manual_seed(seed)
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        rope_scaling={"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2_5_VLTextModel(config)
    randomise(model, seed)
    return model.eval()


def byt5(seed: int = 0) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=384,
        d_model=24,
        d_kv=12,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = T5EncoderModel(config)
    randomise(model, seed)
    return model.eval()


def siglip(seed: int = 0) -> SiglipVisionModel:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    model = SiglipVisionModel(config)
    randomise(model, seed)
    return model.eval()


GUIDANCE = 4.0


def pipeline(kind: Literal["text", "image"] = "image", seed: int = 0, **changes: Any) -> Any:
    """Diffusers' own pipeline, all components with random weights.

    Args:
        kind: whether it is the text-to-video pipeline, or the image-to-video one.
        changes: of the transformer's configuration.
    """
    tokenizer = qwen_tokenizer(WORDS)
    components: dict[str, Any] = {
        "text_encoder": qwen(tokenizer, seed),
        "tokenizer": tokenizer,
        "transformer": transformer(seed, **changes),
        "vae": vae(seed),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": byt5(seed),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=GUIDANCE),
    }
    if kind == "text":
        return HunyuanVideo15Pipeline(**components)
    components["image_encoder"] = siglip(seed)
    components["feature_extractor"] = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    pipe = HunyuanVideo15ImageToVideoPipeline(**components)
    pipe.vision_num_semantic_tokens = 9
    return pipe


def limits_of(pipe: Any) -> ModelLimits:
    """Small defaults, and sizes for images of 4,096 pixels."""
    return ModelLimits(
        spatial_stride=16,
        temporal_stride=4,
        defaults=RequestDefaults(height=32, width=48, frames=5, steps=2, guidance=GUIDANCE, fps=8),
        attention_rules=rule_names,
        image_size=partial(nearest_size, target_size=64, stride=16),
        guidance="classifier-free",
        tile_stride=64,
    )


def model(pipe: Any) -> Model:
    """Ours, of the networks of Diffusers' pipeline; they are changed in place and no longer its own."""
    ours = Ours.from_config(pipe.transformer.config)
    ours.load_state_dict(pipe.transformer.state_dict())
    decoder, device = VideoDecoder(pipe.vae), torch.device("cpu")
    family = HunyuanVideo15(
        ours.eval(),
        decoder,
        TextEncoder(pipe.text_encoder, pipe.tokenizer, pipe.text_encoder_2, pipe.tokenizer_2),
        ImageEncoder(pipe.image_encoder, pipe.feature_extractor, decoder),
        pipe.scheduler.config.shift,
        limits_of(pipe),
        device,
    )
    placement = Placement(device)
    for name, part in family.parts.items():
        part.requires_grad_(False)
        placement.take(name, part, torch.float32, family.phases[name], name in family.blockwise)
    return Model("tiny15", Path("tiny15"), family, Precision.parse("float32", device), placement)


def make_folder(
    folder: Path, kind: Literal["text", "image"] = "image", seed: int = 0, small: bool = False, **changes: Any
) -> Path:
    """Writes a whole model folder (Diffusers layout, safetensors, fp32) and a `reelbatch.json` with small defaults.

    Args:
        small: the VAE in bf16, and the projection of glyphs in fp8: its 2048 × 2048 weights, a number that is fixed in
            Diffusers' code, are nine tenths of the transformer.
    """
    pipe = pipeline(kind, seed, **changes)
    if small:
        pipe.vae.bfloat16()
        for module in pipe.transformer.context_embedder_2.children():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.float8_e4m3fn)
    pipe.save_pretrained(folder)
    defaults = {"height": 32, "width": 48, "frames": 5, "steps": 2, "fps": 8}
    (folder / "reelbatch.json").write_text(json.dumps({"defaults": defaults}), encoding="utf-8")
    return folder


def picture(width: int, height: int, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height // 4, width // 4, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.numpy()).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def mixed() -> list[VideoRequest]:
    """Text to video, with and without glyphs, and image to video; no two of one size or number of steps."""
    asked: list[dict[str, Any]] = [
        {"prompt": "a red cat", "steps": 3},
        {"prompt": 'a sign that says "go" at night', "frames": 1, "height": 16, "width": 16, "guidance": 1},
        {"prompt": "a dog running", "image": picture(64, 40), "steps": 2, "negative_prompt": "blurry “low”"},
        {"prompt": "a horse “slowly”", "image": picture(40, 60), "height": 48, "width": 32, "frames": 9, "steps": 1},
    ]
    return [VideoRequest(seed=seed, id=str(seed), **fields) for seed, fields in enumerate(asked)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", action="store_true", help="the text-to-video model")
    given = parser.parse_args()
    print(make_folder(given.folder, "text" if given.text else "image", small=True))
