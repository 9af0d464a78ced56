"""How far videos of a batch are from the same videos alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim_of

from reelbatch.video import Frames, Video

SMALLEST_SIDE = 16
"""SSIM looks through a window of 11 pixels."""


class Scene(Protocol):
    """What a prompt asks for, where it can be read back from frames."""

    def attributes_in(self, frames: Frames) -> Sequence[bool]:
        """Whether the frames show each thing that was asked for."""


@dataclass(frozen=True)
class Quality:
    """Videos against the same requests alone; the worst video's figures.

    Attributes:
        steps: denoising steps that these videos had.
        against: what `largest`, `psnr` and `ssim` compare with.
        equal: whether frames and latents are bit for bit those that the same dtype gives alone.
        largest: difference of two pixel values, of 255.
        psnr: in dB; None if the frames are equal.
        ssim: mean over frames, 1 is equal; None where pictures are smaller than its window.
        attributes: share of what the prompts ask for that is read back from the frames, where that can be done.
    """

    videos: int
    steps: int
    against: str
    equal: bool
    largest: int
    psnr: float | None
    ssim: float | None
    attributes: float | None = None


@dataclass(frozen=True)
class Alone:
    """Videos that were generated alone: the reference. `steps`: of each; `full`: whether those are all that it has."""

    videos: tuple[Video, ...]
    steps: int
    full: bool
    name: str

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.videos), self.steps


def compare(videos: Sequence[Video], own: Alone, reference: Alone, scenes: Sequence[Scene] = ()) -> Quality:
    """Videos in the order of those in `own` (of the same dtype, for equality) and `reference` (for the distance)."""
    pairs = [(video.frames, alone.frames) for video, alone in zip(videos, reference.videos, strict=True)]
    psnrs = [psnr(a, b) for a, b in pairs]
    ssims = [ssim(a, b) for a, b in pairs]
    return Quality(
        videos=len(videos),
        steps=own.steps,
        against=reference.name,
        equal=all(is_equal(video, alone) for video, alone in zip(videos, own.videos, strict=True)),
        largest=max(int(np.abs(a.astype(np.int16) - b).max()) for a, b in pairs),
        psnr=min((value for value in psnrs if value is not None), default=None),
        ssim=min((value for value in ssims if value is not None), default=None),
        attributes=attributes([video.frames for video in videos], scenes) if scenes and own.full else None,
    )


def is_equal(a: Video, b: Video) -> bool:
    """Bit for bit, frames and latents (where both have them)."""
    latents = a.latents is None or b.latents is None or torch.equal(a.latents, b.latents)
    return latents and np.array_equal(a.frames, b.frames)


def psnr(a: Frames, b: Frames) -> float | None:
    """Peak signal-to-noise ratio in dB over all frames; None if they are equal."""
    error = float(np.mean([np.square(x.astype(np.float32) - y).mean() for x, y in zip(a, b, strict=True)]))
    return 10 * math.log10(255**2 / error) if error else None


def ssim(a: Frames, b: Frames) -> float | None:
    """Structural similarity, mean over frames (a frame at a time: long videos would take much memory)."""
    if min(a.shape[1:3]) < SMALLEST_SIDE:
        return None
    pairs = zip(map(_picture, a), map(_picture, b), strict=True)
    return statistics.fmean(float(cast(Tensor, ssim_of(x, y, data_range=255.0))) for x, y in pairs)


def _picture(frame: Frames) -> Tensor:
    """In double precision: in single, SSIM of equal pictures comes out below 1."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].double()


def attributes(clips: Sequence[Frames], scenes: Sequence[Scene]) -> float:
    """Share of what the scenes ask for that is read back from the frames."""
    right = [shown for clip, scene in zip(clips, scenes, strict=True) for shown in scene.attributes_in(clip)]
    return sum(right) / len(right)
