"""The samples of a run: what is drawn for each, by its number, and which make a pack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelbatch.models.family import TrainableFamily
from reelbatch.request import VideoRequest
from reelbatch.train.batches import Order, fill, generator_of
from reelbatch.train.cache import Encoded
from reelbatch.train.config import TrainConfig
from reelbatch.train.dataset import Dataset
from reelbatch.train.flow_matching import Example, draw_sigmas, shift

DEFAULT_BATCH_SIZE = 4
VALIDATION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels at which every held-out clip is tried, each with noise of its own that is the same in every run."""


@dataclass(frozen=True)
class Drawn:
    """One sample: a clip with its caption, and all that was drawn for it. All on the CPU, in fp32.

    Attributes:
        sigma: noise level after the shift, 0 to 1. guidance: the embedded scale. Both scalars.
        noise: as large as the latents.
    """

    example: Example
    sigma: Tensor
    guidance: Tensor
    noise: Tensor


class Samples:
    """What sample `number` of a run is: always the same, whoever shares its pack."""

    def __init__(self, config: TrainConfig, dataset: Dataset, family: TrainableFamily) -> None:
        self.config, self.dataset = config, dataset
        self.flow_shift = family.flow_shift if config.flow_shift is None else config.flow_shift
        self.own_tokens = family.geometry.tokens(VideoRequest(prompt="-").for_model(family.limits))
        """Tokens of a video of the model's own size."""
        self._order = Order(len(dataset.clips), config.seed)
        size = config.batch_size
        self._size = DEFAULT_BATCH_SIZE if size is None and config.batch_tokens is None else size

    def of(self, number: int) -> Encoded:
        """The clip of a sample."""
        return self.dataset.clips[self._order(number)]

    def weight(self, number: int) -> float:
        """What a sample counts in the loss: 1, or its video tokens."""
        return float(self.of(number).video_tokens) if self.config.weigh == "tokens" else 1.0

    def pack(self, first: int) -> range:
        """The samples of the pack that begins with sample `first`."""
        return fill(first, lambda number: self.of(number).tokens, self.config.batch_tokens, self._size)

    def draw(self, number: int) -> Drawn:
        """Sample `number`, with all that is drawn from its own generator."""
        config, clip = self.config, self.of(number)
        generator = generator_of(config.seed, number)
        dropped = torch.rand((), generator=generator).item() < config.caption_dropout
        wording = int(torch.randint(len(clip.clip.captions), (), generator=generator))
        sigma = draw_sigmas(
            1,
            generator,
            logit_normal=config.timesteps == "logit-normal",
            mean=config.logit_mean,
            std=config.logit_std,
        )[0]
        high = config.guidance if config.guidance_max is None else config.guidance_max
        guidance = config.guidance + (high - config.guidance) * torch.rand((), generator=generator)
        caption = self.dataset.encoded.caption("" if dropped else clip.clip.captions[wording])
        latents, first_frame = self.dataset.encoded.clip(clip.clip)
        noise = torch.randn(latents.shape, generator=generator)
        shown = torch.rand((), generator=generator).item() >= config.image_dropout
        example = Example(latents, {**caption, **(first_frame if shown else {})})
        return Drawn(example, shift(sigma, self._shift(clip)), guidance, noise)

    def _shift(self, clip: Encoded) -> float:
        by_size = math.sqrt(clip.video_tokens / self.own_tokens) if self.config.shift_by_size else 1.0
        return self.flow_shift * by_size

    def held_out(self) -> list[Sequence[tuple[int, int]]]:
        """The tries of the held-out loss, in packs: number of the clip and of its noise level."""
        clips = self.dataset.held_out
        tries = [(clip, level) for clip in range(len(clips)) for level in range(len(VALIDATION_LEVELS))]

        def tokens(i: int) -> int:
            return clips[tries[i][0]].tokens

        packs: list[Sequence[tuple[int, int]]] = []
        end = 0
        while end < len(tries):
            pack = fill(end, tokens, self.config.batch_tokens, self._size, len(tries))
            packs.append(tries[pack.start : pack.stop])
            end = pack.stop
        return packs

    def draw_held_out(self, clip: int, level: int) -> Drawn:
        """A held-out clip at one of the `VALIDATION_LEVELS`: the same in every run, with its first frame unless no
        sample is ever shown it."""
        held_out = self.dataset.held_out[clip].clip
        latents, first_frame = self.dataset.encoded.clip(held_out)
        noise = torch.randn(latents.shape, generator=generator_of(0, clip, level, 3))
        caption = self.dataset.encoded.caption(held_out.captions[0])
        example = Example(latents, {**caption, **(first_frame if self.config.image_dropout < 1 else {})})
        return Drawn(example, torch.tensor(VALIDATION_LEVELS[level]), torch.tensor(self.config.guidance), noise)
