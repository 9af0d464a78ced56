"""A family of networks that has nothing in common with HunyuanVideo but the seam: other conditioning, channels, strides
and defaults, and no guidance scale. Small enough to see all of it, with weights that are random and not zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelbatch import ragged
from reelbatch.geometry import Geometry
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.memory.placement import Offload, Placement
from reelbatch.models.family import Phase, SampleView
from reelbatch.models.noise import draw_noise
from reelbatch.request import ModelLimits, RequestDefaults, VideoRequest

DIM = 24


@dataclass(frozen=True)
class Letters:
    """Conditioning: a vector for the prompt and, with guidance, one for the negative prompt."""

    vectors: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Letters:
        return Letters(tuple(vector.to(device) for vector in self.vectors))


Branch = tuple[Tensor, Tensor, Tensor]
"""Latents, conditioning, timestep."""


class LetterSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, DIM)

    def forward(self, text: str) -> Tensor:
        ids = torch.tensor([min(ord(letter), 127) for letter in text] or [0], device=self.table.weight.device)
        return self.table(ids).sum(0)


class Block(nn.Module):
    """Every row sees the mean of its own branch's rows, and no other's."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.mean = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, packs: list[tuple[Tensor, tuple[int, ...]]]) -> list[tuple[Tensor, tuple[int, ...]]]:
        return [(rows + F.gelu(self.own(rows) + self._means(rows, lengths)), lengths) for rows, lengths in packs]

    def _means(self, rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return ragged.map_samples(lambda own: self.mean(own.mean(0)).expand_as(own), rows, lengths)


class Denoiser(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed, self.time, self.project = nn.Linear(channels, DIM), nn.Linear(1, DIM), nn.Linear(DIM, channels)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, packs: Sequence[Sequence[Branch]]) -> list[list[Tensor]]:
        streams = [self._rows(pack) for pack in packs]
        for block in self.blocks:
            streams = block(streams)
        return [self._velocities(rows, lengths, pack) for (rows, lengths), pack in zip(streams, packs, strict=True)]

    def _rows(self, pack: Sequence[Branch]) -> tuple[Tensor, tuple[int, ...]]:
        lengths = tuple(latents[0].numel() for latents, _, _ in pack)
        rows = self.embed(ragged.join([latents.flatten(1).T for latents, _, _ in pack]))
        conditions = torch.stack([vector + self.time(timestep.view(1) / 1000) for _, vector, timestep in pack])
        return ragged.map_samples(lambda own, vector: own + vector, rows, lengths, conditions), lengths

    def _velocities(self, rows: Tensor, lengths: tuple[int, ...], pack: Sequence[Branch]) -> list[Tensor]:
        parts = ragged.split(self.project(rows), lengths)
        return [part.T.reshape(latents.shape) for part, (latents, _, _) in zip(parts, pack, strict=True)]


class Toy:
    """`Family`. `check` is called before each piece of work with its phase and the widths of what it is for: it may run
    out of memory."""

    phases: Mapping[str, Phase] = MappingProxyType({"letters": "text", "denoiser": "step", "painter": "decode"})
    also: Mapping[str, tuple[Phase, ...]] = MappingProxyType({})
    blockwise = frozenset({"denoiser"})
    flow_shift = 2.0
    dtype = torch.float32

    def __init__(self) -> None:
        self.geometry = Geometry(channels=3, spatial=4, temporal=2)
        self.limits = ModelLimits(4, 2, RequestDefaults(height=8, width=12, frames=5, steps=3, guidance=0.0, fps=12))
        self.letters, self.denoiser, self.painter = LetterSum(), Denoiser(3), nn.Linear(3, 3)
        self.parts: Mapping[str, nn.Module] = {
            "letters": self.letters,
            "denoiser": self.denoiser,
            "painter": self.painter,
        }
        self.check: Callable[[Phase, list[int]], None] = lambda phase, widths: None

    @torch.no_grad()
    def encode(self, request: VideoRequest) -> Letters:
        self.check("text", [request.width or 0])
        texts = [request.prompt, *([request.negative_prompt or ""] if request.uses_cfg else [])]
        return Letters(tuple(self.letters(text) for text in texts))

    def first_latents(self, request: VideoRequest, conditioning: Letters) -> Tensor:
        return draw_noise(request.seed, self.geometry.latent_shape(request))

    def stand_in(self, request: VideoRequest) -> Letters:
        return Letters(tuple(torch.empty(DIM) for _ in self.rows(request)))

    def rows(self, request: VideoRequest, conditioning: Letters | None = None) -> tuple[int, ...]:
        return (self.geometry.tokens(request),) * (2 if request.uses_cfg else 1)

    def branches(self, sample: SampleView) -> list[Branch]:
        return [(sample.latents, vector, sample.timestep) for vector in sample.conditioning.vectors]

    @torch.no_grad()
    def velocities(self, packs: Sequence[Sequence[Branch]]) -> list[list[Tensor]]:
        self.check("step", [latents.shape[-1] * self.geometry.spatial for pack in packs for latents, _, _ in pack])
        return self.denoiser(packs)

    def tile_side(self, request: VideoRequest) -> int | None:
        return request.vae_tiling or None

    @torch.no_grad()
    def decode(self, latents: Tensor, tile_side: int | None) -> Tensor:
        self.check("decode", [latents.shape[-1] * self.geometry.spatial])
        if not latents.isfinite().all():
            raise ValueError("latents are not finite")
        colors = self.painter(latents.permute(1, 2, 3, 0)).sigmoid().mul(255).round().byte()
        frames = torch.cat([colors[:1], colors[1:].repeat_interleave(self.geometry.temporal, 0)])
        return frames.repeat_interleave(self.geometry.spatial, 1).repeat_interleave(self.geometry.spatial, 2).cpu()

    def forget(self) -> None: ...

    def release(self) -> None: ...

    def set_attention_backend(self, backend: str) -> None: ...


def model(offload: Offload = "none") -> Model:
    """The same weights every time."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    family, placement = Toy(), Placement(device, offload)
    for name, part in family.parts.items():
        part.eval().requires_grad_(False)
        placement.take(name, part, family.dtype, family.phases[name], name in family.blockwise)
    return Model("toy", Path("toy"), family, Precision.parse("float32", device), placement)
