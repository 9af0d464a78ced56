"""HunyuanVideo 1.5's networks, small and with random weights, none of them zero (see `tiny`)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from tiny import randomise

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
