"""From pixels to latents to tokens: plain numbers, said once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from reelbatch.request import VideoRequest


class Grid(NamedTuple):
    """Patches along frame, row and column."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Geometry:
    """How a model's VAE and transformer divide a video.

    Attributes:
        channels: of the latents.
        spatial, temporal: pixels of a side, and frames, that become one of the latents; the first frame is one by
            itself.
        patch, temporal_patch: latent pixels of a side, and latent frames, that become one token.
        hidden_frames: latent frames that are made besides, and whose frames, the video's first, are not shown.
    """

    channels: int
    spatial: int
    temporal: int
    patch: int = 1
    temporal_patch: int = 1
    hidden_frames: int = 0

    @property
    def spatial_stride(self) -> int:
        """Height and width are multiples of it, in pixels."""
        return self.spatial * self.patch

    @property
    def temporal_stride(self) -> int:
        """The number of frames is a multiple of it, plus 1."""
        return self.temporal * self.temporal_patch

    def latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int]:
        """[channels, latent frames, height, width] of a request whose sizes are filled in."""
        height, width, frames = request.size
        latent_frames = (frames - 1) // self.temporal + 1 + self.hidden_frames
        return self.channels, latent_frames, height // self.spatial, width // self.spatial

    def grid(self, latent_shape: tuple[int, ...]) -> Grid:
        """Patches of latents [channels, latent frames, height, width]."""
        _, frames, height, width = latent_shape
        return Grid(frames // self.temporal_patch, height // self.patch, width // self.patch)

    def tokens(self, request: VideoRequest) -> int:
        """Video tokens of one branch of a request."""
        return self.grid(self.latent_shape(request)).tokens
