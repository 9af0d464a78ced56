"""Family: what a kind of model must offer, and all that the engine knows of it.

Nothing outside `models/<family>/` and `loading/` knows which networks there are, what conditions them, or how many
channels latents have. A new model is a new room with a class that has these attributes and methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from reelbatch.geometry import Geometry
from reelbatch.request import ModelLimits, VideoRequest

Phase = Literal["text", "step", "decode"]
"""The kinds of work: encoding what conditions a request, a denoising step, decoding latents to frames."""
PHASES: tuple[Phase, ...] = ("text", "step", "decode")
Branch = Any
"""What a family's transformer is given of one sample or of one guidance branch of it; the engine does not look in."""


class Conditioning(Protocol):
    """What the transformer is given of a request besides latents and timestep, encoded once. Never written into."""

    def to(self, device: torch.device) -> Self: ...


class SampleView(Protocol):
    """What a family may see of a sample on its way."""

    @property
    def request(self) -> VideoRequest: ...

    @property
    def conditioning(self) -> Any: ...

    @property
    def latents(self) -> Float[Tensor, "channels frames height width"]:
        """fp32, on the model's device."""

    @property
    def timestep(self) -> Float[Tensor, ""]:
        """sigma × 1000 of the sample's current step, fp32."""


class Family(Protocol):
    """A loaded model.

    Attributes:
        limits: sizes, lengths, defaults and attention rules: what a request is checked against.
        geometry: strides and patches.
        flow_shift: the timestep shift where a request has none.
        parts: the networks, by the names of their folders.
        phases: the phase that each part works in.
        blockwise: parts that are entered by their `forward` and run through lists of blocks, so that their weights
            can come block by block.
        dtype: of the transformer's activations.
    """

    limits: ModelLimits
    geometry: Geometry
    flow_shift: float
    parts: Mapping[str, nn.Module]
    phases: Mapping[str, Phase]
    blockwise: frozenset[str]

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, request: VideoRequest) -> Conditioning:
        """Texts (and images) of one request, alone and at true length; on the parts' device."""

    def stand_in(self, request: VideoRequest) -> Conditioning:
        """Conditioning of the most rows that `encode` can give for this request, its values undefined: for estimates
        of memory."""

    def rows(self, request: VideoRequest, conditioning: Any = None) -> tuple[int, ...]:
        """Transformer rows of each guidance branch of a step. Without conditioning: the most that there can be."""

    def branches(self, sample: SampleView) -> list[Branch]:
        """The guidance branches of a sample at its current step, the conditional one first."""

    def velocities(
        self, packs: Sequence[Sequence[Branch]]
    ) -> list[list[Float[Tensor, "channels frames height width"]]]:
        """The transformer's output for each branch; the branches of a pack share every matrix product."""

    def tile_side(self, request: VideoRequest) -> int | None:
        """Side in pixels of the VAE tiles that a request is decoded in, by the request and the model alone; None: it is
        decoded whole."""

    def decode(
        self, latents: Float[Tensor, "channels latent_frames h w"], tile_side: int | None
    ) -> UInt8[Tensor, "frames height width 3"]:
        """Frames on the CPU. May be called from a thread of its own, beside `velocities`.

        Raises:
            ValueError: for latents or frames that are not finite.
        """

    def forget(self) -> None:
        """Drops what is kept of requests encoded so far (equal prompts are encoded once)."""

    def release(self) -> None:
        """Drops all that is kept on the device besides weights."""

    def set_attention_backend(self, backend: str) -> None:
        """The kernel of the transformer's attention."""
