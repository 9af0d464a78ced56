"""HunyuanVideo 1.5's networks, small, and batches for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15Transformer3DModel,
)

from reelbatch.repairs import hunyuan_video15
from reelbatch.repairs.fix import Undo

TEXT, GLYPHS, IMAGE = 12, 7, 5
"""Tokens that a sample's text, glyphs and image have room for."""
TEXT_LENGTHS, GLYPH_LENGTHS, HAS_IMAGE = (11, 4, 6, 9), (0, 3, 7, 0), (False, True, False, True)


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
