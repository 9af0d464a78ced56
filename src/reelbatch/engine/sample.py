"""Sample: one video on its way from noise to latents."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from reelbatch.attention import HeadRules
from reelbatch.engine.flow import Schedule
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.text import Conditioning
from reelbatch.models.layers import BranchShape
from reelbatch.request import VideoRequest


def draw_noise(seed: int, shape: tuple[int, ...]) -> Float[Tensor, "channels frames height width"]:
    """The request's own noise, drawn on the CPU in fp32, so that a seed means the same on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


@dataclass(frozen=True)
class SavedState:
    """Where a sample stands between two steps: with its request, all that it takes to go on.

    Attributes:
        step: steps that are behind it.
        latents: fp32, on the CPU.
        seconds, largest_batch, batch_mates: as of `Sample`.
    """

    step: int
    latents: Float[Tensor, "channels frames height width"]
    seconds: float = 0.0
    largest_batch: int = 0
    batch_mates: frozenset[str] = frozenset()

    def check(self, request: VideoRequest, shape: tuple[int, ...]) -> None:
        """Raises ValueError if it is none of this request."""
        if tuple(self.latents.shape) != shape or self.latents.dtype != torch.float32:
            raise ValueError(
                f"the saved latents are {self.latents.dtype} {list(self.latents.shape)}, and request {request.id!r} "
                f"needs float32 {list(shape)}: they are of another request or model"
            )
        if not 0 <= self.step < (request.steps or 0):
            raise ValueError(f"the saved step is {self.step}, and request {request.id!r} has {request.steps} steps")


@dataclass
class Sample:
    """One video on its way. Its latents and step change only together, once a step has succeeded.

    Attributes:
        request: what was asked, with the model's defaults filled in.
        latents: fp32, on the model's device.
        schedule: the sigmas it walks down.
        conditional, unconditional: the text of its guidance branches, in the transformer's dtype; without
            classifier-free guidance there is only the first.
        guidance: embedded guidance scale × 1000, in the transformer's dtype.
        rules: which tokens each head attends to; None is all.
        shapes: patches and text tokens of each of its branches.
        text_seconds: time that its text took. seconds: time spent in steps that it took part in.
        tiles: pixels on a side of the VAE tiles that it took to fit into memory, if it did not fit otherwise.
        batch_mates: ids of all that shared a step with it. largest_batch: samples in the fullest of those steps.
    """

    request: VideoRequest
    latents: Float[Tensor, "channels frames height width"]
    schedule: Schedule
    conditional: Conditioning
    unconditional: Conditioning | None
    guidance: Float[Tensor, ""]
    shapes: tuple[BranchShape, ...]
    rules: HeadRules | None = None
    text_seconds: float = 0.0
    step: int = 0
    seconds: float = 0.0
    largest_batch: int = 0
    tiles: int | None = None
    batch_mates: set[str] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Rows that one step of it puts through the transformer, all branches."""
        return sum(shape.video + shape.text for shape in self.shapes)

    @property
    def done(self) -> bool:
        return self.step >= self.schedule.steps

    def save(self) -> SavedState:
        latents = self.latents.to("cpu", copy=True)
        return SavedState(self.step, latents, self.seconds, self.largest_batch, frozenset(self.batch_mates))

    def resume(self, saved: SavedState | None) -> Sample:
        """Goes on from there; from the start if there is nothing."""
        if saved is not None:
            self.latents, self.step = saved.latents.to(self.latents.device, copy=True), saved.step
            self.seconds, self.largest_batch = saved.seconds, saved.largest_batch
            self.batch_mates = set(saved.batch_mates)
        return self

    def branches(self) -> list[Branch]:
        """What the transformer is told at this step: the conditional branch, then the unconditional one if any."""
        texts = [self.conditional] if self.unconditional is None else [self.conditional, self.unconditional]
        latents = self.latents.to(self.guidance.dtype)
        timestep = self.schedule.timesteps[self.step]
        return [Branch(latents, text.text, text.pooled, timestep, self.guidance, self.rules) for text in texts]
