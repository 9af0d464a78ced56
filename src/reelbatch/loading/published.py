"""The published models that are planned for without a folder: what the files of theirs say that decide about memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reelbatch.loading import hunyuan_video, hunyuan_video15, hunyuan_video_image
from reelbatch.loading.assembly import SKYREELS_TEXT
from reelbatch.loading.hub import REAL_MODEL
from reelbatch.loading.layout import Configs, Layout
from reelbatch.models.hunyuan_video15.variants import VARIANTS, Variant
from reelbatch.request import ModelLimits

COMMUNITY = "hunyuanvideo-community/HunyuanVideo"
LLAMA: Mapping[str, Any] = {
    "vocab_size": 128320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""Llama 3 8B, with the tokens of LLaVA."""
CLIP: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
"""The text encoder of CLIP ViT-L/14."""
LLAVA: Mapping[str, Any] = {
    "text_config": LLAMA,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "image_token_index": 128257,
}
"""LLaVA of Llama 3 8B and CLIP ViT-L/14 at 336 pixels."""
QWEN: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
}
"""The text model of Qwen2.5-VL 7B."""
BYT5: Mapping[str, Any] = {
    "vocab_size": 1510,
    "d_model": 1472,
    "d_kv": 64,
    "d_ff": 3584,
    "num_layers": 12,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
"""The encoder of ByT5 small, with Glyph-SDXL-v2's tokens for colours and fonts."""
SIGLIP: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
"""The vision tower of SigLIP so400m."""


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        hub_id: in lower case.
        configs: of its components, as far as they are not what their classes take for granted.
        said: what holds for it besides, as a folder's `reelbatch.json` would say.
    """

    name: str
    hub_id: str
    layout: Layout
    configs: Configs
    flow_shift: float = 7.0
    said: Mapping[str, Any] | None = None

    @property
    def limits(self) -> ModelLimits:
        said = self.said or {}
        limits = self.layout.limits(self.configs, said.get("defaults", {}))
        return replace(limits, guidance=said.get("guidance", limits.guidance))


def _of_13b(name: str, hub_id: str, layout: Layout, transformer: Mapping[str, Any], **more: Any) -> Published:
    encoders = {"text_encoder": LLAVA if layout is hunyuan_video_image.HUNYUAN else LLAMA, "text_encoder_2": CLIP}
    return Published(name, hub_id.lower(), layout, {"transformer": transformer, "vae": {}, **encoders}, **more)


def _of_15(name: str, variant: Variant) -> Published:
    configs: dict[str, Mapping[str, Any]] = {
        "transformer": {"target_size": variant.target_size, "use_meanflow": variant.meanflow},
        "vae": {},
        "text_encoder": QWEN,
        "text_encoder_2": BYT5,
        "guider": {"guidance_scale": variant.guidance},
        "scheduler": {"shift": variant.shift},
    }
    layout = hunyuan_video15.TEXT
    if "i2v" in name:
        layout, configs["image_encoder"] = hunyuan_video15.IMAGE, SIGLIP
    hub_id = f"{COMMUNITY}-1.5-Diffusers-{name}".lower()
    return Published(f"hunyuanvideo-1.5-{name}", hub_id, layout, configs, variant.shift)


HUNYUANVIDEO_13B = _of_13b("hunyuanvideo-13b", REAL_MODEL, hunyuan_video.LAYOUT, {})
PUBLISHED = (
    HUNYUANVIDEO_13B,
    _of_13b(
        "hunyuanvideo-i2v",
        f"{COMMUNITY}-I2V",
        hunyuan_video_image.HUNYUAN,
        {"image_condition_type": "token_replace"},
    ),
    _of_13b(
        "hunyuanvideo-i2v-33ch",
        f"{COMMUNITY}-I2V-33ch",
        hunyuan_video_image.HUNYUAN,
        {"image_condition_type": "latent_concat", "in_channels": 33, "guidance_embeds": False},
    ),
    _of_13b("skyreels-v1-t2v", "Skywork/SkyReels-V1-Hunyuan-T2V", hunyuan_video.LAYOUT, {}, said=SKYREELS_TEXT),
    _of_13b("skyreels-v1-i2v", "Skywork/SkyReels-V1-Hunyuan-I2V", hunyuan_video_image.SKYREELS, {"in_channels": 32}),
    *(_of_15(name, variant) for variant in VARIANTS for name in variant.name.split(", ")),
)
BY_NAME = {known.name: known for known in PUBLISHED}
SHORT = {"hunyuanvideo": "hunyuanvideo-13b", "13b": "hunyuanvideo-13b", "hunyuanvideo-1.5": "hunyuanvideo-1.5-480p_t2v"}


def published(model: str) -> Published | None:
    """The published model of a name or a hub id, in any case; None for anything else."""
    wanted = SHORT.get(model.lower(), model.lower())
    return next((known for known in PUBLISHED if wanted in (known.name, known.hub_id)), None)
