"""The bundled model's transformer, trained on encoded clips with the project's own loss over ragged packs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from torch import Tensor, nn

from reelbatch.demo import shapes
from reelbatch.demo.text_towers import POOLED_DIM, TEXT_DIM
from reelbatch.demo.training import Clock, averaged
from reelbatch.models.hunyuan_video import HunyuanVideoTransformer3DModel
from reelbatch.models.text import TextEncoder
from reelbatch.train.flow_matching import Example, flow_matching_loss, shifted_sigmas

LEARNING_RATE = 1.5e-3
BATCH = 32
FLOW_SHIFT = 3.0
GUIDANCE = (1.0, 8.0)
"""Drawn at random while training, so that the model works with any scale (its clips need no guidance)."""
CAPTION_DROPOUT = 0.1
MODULATIONS = (["norm"], ["norm1"], ["norm1_context"], ["norm_out"])
"""Names of the modules whose linear layer makes shifts, scales and gates."""


@dataclass(frozen=True)
class EncodedClip:
    latents: Float[Tensor, "channels frames height width"]
    scene: shapes.Scene


def build() -> HunyuanVideoTransformer3DModel:
    """Untrained; modulations and the output start at zero (DiT's adaLN-Zero)."""
    model = HunyuanVideoTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(8, 20, 20),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-2:-1] in MODULATIONS:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def train(
    clips: Sequence[EncodedClip],
    text: TextEncoder,
    minutes: float,
    start: HunyuanVideoTransformer3DModel | None = None,
    seed: int = 0,
) -> Iterator[tuple[HunyuanVideoTransformer3DModel, dict[str, float]]]:
    """Trains for so many minutes, from nothing or from `start`.

    Gives the averaged weights and what to log, now and then and at the end.
    """
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    model = (start or build()).train()
    average = EMAModel(model.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    mean = 0.0
    for clock in Clock.run(minutes):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * clock.cosine(warmup_steps=200)
        examples = [
            Example(clip.latents, text.encode(_caption(clip.scene, rng))) for clip in rng.choices(clips, k=BATCH)
        ]
        sigmas = shifted_sigmas(BATCH, FLOW_SHIFT, generator, torch.device("cpu"))
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(BATCH, generator=generator)
        value = flow_matching_loss(model, examples, sigmas, guidance, generator).mean()
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise ArithmeticError(f"the gradient of step {clock.step} is not finite")
        optimizer.step()
        average.step(model.parameters())
        mean += (value.item() - mean) / min(clock.step, 100)
        if clock.step % 100 == 0 or clock.last:
            yield averaged(model, average), {"step": clock.step, "loss": mean}


def _caption(scene: shapes.Scene, rng: random.Random) -> str:
    if rng.random() < CAPTION_DROPOUT:
        return ""
    return shapes.caption(scene, rng.randrange(len(shapes.WORDINGS)))
