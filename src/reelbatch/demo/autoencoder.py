"""The bundled model's VAE: Diffusers' `AutoencoderKLHunyuanVideo`, small, trained on drawn clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from torch import Tensor, nn

from reelbatch.demo import shapes
from reelbatch.demo.training import Clock, averaged

LEARNING_RATE = 2.5e-3
CROP = 32
"""Most steps see a window of so many pixels about the shape: plain background teaches little and costs as much."""


@dataclass(frozen=True)
class Kind:
    """What a step learns from: so many clips of one size, whole or cropped, and its share of the steps."""

    clips: int
    height: int
    width: int
    frames: int
    share: float
    cropped: bool = False


STILLS = (Kind(16, 64, 64, 1, 1.0),)
CROPS = (Kind(10, 64, 64, 9, 0.6, True), Kind(14, 64, 64, 5, 0.25, True), Kind(3, 64, 64, 9, 0.15))
WHOLE = (Kind(3, 64, 64, 9, 0.5), Kind(2, 64, 96, 9, 0.3), Kind(5, 64, 64, 5, 0.2))
STAGES = ((0.1, STILLS), (0.8, CROPS), (1.0, WHOLE))
"""Until which part of the time each stage goes: single frames teach shapes and colours cheaply, crops teach motion, and
whole pictures at the end settle the group norms."""
SHAPE_WEIGHT = 4.0
"""Extra weight of the pixels that the shape covers, and again of those that it covers a little earlier or later: an
unweighted loss is content with the background alone."""
MOTION_WEIGHT = 3.0
"""Weight of the error in what changes from frame to frame. Without it a moving shape comes out as a still smear of the
places where it was; with it motion was right within five minutes."""
KL_WEIGHT = 3e-4
POLISH_RATE = 1e-3
POLISH_NOISE = 0.05
POLISH_STAGES = ((0.6, CROPS), (1.0, WHOLE))
POLISH_HARD_SHARE = 0.4
"""How often polishing draws a small cross, the one shape that the first training leaves looking like another."""


def build() -> AutoencoderKLHunyuanVideo:
    """Untrained. Residual branches start at zero and the posterior is narrow, so that it learns from the first step."""
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(16, 16, 32, 64), layers_per_block=1, norm_num_groups=8)
    for name, module in vae.named_modules():
        if name.endswith(("conv2.conv", "attentions.0.to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.weight[:channels, :channels] = torch.eye(channels)[..., None, None, None]
        vae.quant_conv.bias[:channels] = 0
        vae.quant_conv.bias[channels:] = -6  # logarithm of the posterior's variance
        vae.post_quant_conv.weight.copy_(torch.eye(channels)[..., None, None, None])
        vae.post_quant_conv.bias.zero_()
    return vae


def to_video(clips: list[shapes.Clip]) -> Float[Tensor, "clips 3 frames height width"]:
    """Clips as the VAE takes them, in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1).contiguous()


def to_clip(video: Float[Tensor, "3 frames height width"]) -> shapes.Clip:
    """A decoded video as a clip."""
    return video.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()


Loss = Callable[[Tensor, Tensor], Tensor]
"""A function of videos and of how far the shape covers their pixels."""


def reconstruction_loss(decoded: Tensor, video: Tensor, cover: Float[Tensor, "clips 1 frames height width"]) -> Tensor:
    """Squared error, weighted towards the shape, of the pictures and of what changes from one to the next."""
    span = min(5, video.shape[2])
    nearby = F.max_pool3d(cover, (span, 5, 5), stride=1, padding=(span // 2, 2, 2))
    weight = 1 + SHAPE_WEIGHT * (nearby + cover)
    error = decoded - video
    still = (weight * error.square()).mean()
    moving = (weight[:, :, 1:] * error.diff(dim=2).square()).mean() if video.shape[2] > 1 else 0.0
    return still + MOTION_WEIGHT * moving


def loss(vae: AutoencoderKLHunyuanVideo, video: Tensor, cover: Tensor) -> Tensor:
    """Reconstruction from a sample of the posterior, and a little KL divergence."""
    mean, log_variance = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 4)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction_loss(_decode(vae, latents), video, cover) + KL_WEIGHT * divergence


def polish_loss(vae: AutoencoderKLHunyuanVideo, video: Tensor, cover: Tensor) -> Tensor:
    """Reconstruction from slightly wrong latents, as a transformer leaves them."""
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mean
    return reconstruction_loss(_decode(vae, latents + POLISH_NOISE * torch.randn_like(latents)), video, cover)


def _decode(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    return vae.decoder(vae.post_quant_conv(latents))


def draw(kind: Kind, rng: np.random.Generator, hard_share: float = 0.0) -> tuple[Tensor, Tensor]:
    """Clips `[clips, 3, frames, height, width]` of any scenes, and how far the shape covers their pixels."""
    scenes = shapes.scenes()
    hard = [scene for scene in scenes if (scene.size, scene.shape) == ("small", "cross")]
    videos, covers = [], []
    for _ in range(kind.clips):
        choice = hard if rng.random() < hard_share else scenes
        scene = choice[rng.integers(len(choice))]
        clip, cover = shapes.draw_masked(scene, kind.height, kind.width, kind.frames, rng)
        if kind.cropped:
            clip, cover = _crop(clip, cover, rng)
        videos.append(clip)
        covers.append(cover)
    return to_video(videos), torch.from_numpy(np.stack(covers))[:, None]


def _crop(clip: shapes.Clip, cover: shapes.Mask, rng: np.random.Generator) -> tuple[shapes.Clip, shapes.Mask]:
    """A window about a point that the shape passes."""
    passed = np.argwhere(cover.max(0) > 0)
    jitter = rng.integers(-6, 7, 2)
    limits = np.array(cover.shape[1:]) - CROP
    top, left = np.clip(passed[rng.integers(len(passed))] - CROP // 2 + jitter, 0, limits)
    window = np.s_[:, top : top + CROP, left : left + CROP]
    return clip[window], cover[window]


Progress = Iterator[tuple[AutoencoderKLHunyuanVideo, dict[str, float]]]
"""Averaged weights and what to log, now and then and at the end."""


def train(minutes: float, seed: int = 0) -> Progress:
    """Trains from nothing for so many minutes.

    The learning rate follows the clock (a cosine), so that any machine comes to a finished model in the time it has.
    """
    torch.manual_seed(seed)
    vae = build()
    return _descend(vae, vae, STAGES, lambda *clips: loss(vae, *clips), minutes, LEARNING_RATE, seed + 1)


def polish(vae: AutoencoderKLHunyuanVideo, minutes: float, seed: int = 0) -> Progress:
    """Trains the decoder alone: the latents, and a transformer that knows them, stay as they are."""
    torch.manual_seed(seed)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])
    loss: Loss = lambda *clips: polish_loss(vae, *clips)  # noqa: E731
    return _descend(vae, decoder, POLISH_STAGES, loss, minutes, POLISH_RATE, seed, POLISH_HARD_SHARE)


def _descend(
    vae: AutoencoderKLHunyuanVideo,
    learns: nn.Module,
    stages: tuple[tuple[float, tuple[Kind, ...]], ...],
    loss: Loss,
    minutes: float,
    rate: float,
    seed: int,
    hard_share: float = 0.0,
) -> Progress:
    rng = np.random.default_rng(seed)
    average = EMAModel(vae.parameters(), decay=0.995)
    optimizer = torch.optim.AdamW(learns.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    for clock in Clock.run(minutes):
        for group in optimizer.param_groups:
            group["lr"] = rate * clock.cosine(warmup_steps=100)
        kinds = next(kinds for until, kinds in stages if clock.progress <= until)
        kind = kinds[rng.choice(len(kinds), p=[kind.share for kind in kinds])]
        value = loss(*draw(kind, rng, hard_share))
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(learns.parameters(), 1.0)
        if not norm.isfinite():
            raise ArithmeticError(f"the gradient of step {clock.step} is not finite ({kind})")
        optimizer.step()
        average.step(vae.parameters())
        if clock.step % 25 == 0 or clock.last:
            yield averaged(vae, average), {"step": clock.step, "loss": value.item(), "frames": kind.frames}


@torch.no_grad()
def whiten(vae: AutoencoderKLHunyuanVideo, latents: list[Float[Tensor, "16 frames height width"]]) -> None:
    """Folds a shift and a scale into the VAE's 1×1×1 convolutions, so that every channel has mean 0 and variance 1.

    This class of VAE has one scaling factor and no shift; the transformer learns best on unit latents. Decoding what
    was encoded is unchanged.

    Args:
        latents: encoded means of many clips, before whitening.
    """
    rows = torch.cat([latent.flatten(1) for latent in latents], dim=1)
    mean, deviation = rows.mean(1), rows.std(1)
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight.flatten(1) * mean).sum(1)
    post.weight *= deviation[None, :, None, None, None]
    quant.weight[:channels] /= deviation[:, None, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()
    vae.register_to_config(scaling_factor=1.0)
