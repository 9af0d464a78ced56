"""Family: what a kind of model must offer, and all that the engine knows of it.

Nothing outside `models/<family>/` and `loading/` knows which networks there are, what conditions them, or how many
channels latents have. A new model is a new room with a class that has these attributes and methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from reelbatch.geometry import Geometry
from reelbatch.request import ModelLimits, VideoRequest

if TYPE_CHECKING:
    from diffusers import ModelMixin

Phase = Literal["text", "step", "decode"]
"""The kinds of work: encoding what conditions a request, a denoising step, decoding latents to frames."""
PHASES: tuple[Phase, ...] = ("text", "step", "decode")
Branch = Any
"""What a family's transformer is given of one sample or of one guidance branch of it; the engine does not look in."""


class Conditioning(Protocol):
    """What the transformer is given of a request besides latents and timestep, encoded once. Never changed."""

    def to(self, device: torch.device) -> Self: ...


class SampleView(Protocol):
    """What a family may see of a sample."""

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

    @property
    def next_timestep(self) -> Float[Tensor, ""]:
        """sigma × 1000 that the step leads to, 0 at the last, fp32."""


class Family(Protocol):
    """A loaded model.

    Attributes:
        limits: sizes, lengths, defaults and attention rules: what a request is checked against.
        geometry: strides and patches.
        flow_shift: the timestep shift where a request has none.
        parts: the networks, by the names of their folders.
        phases: the phase that each part works in.
        also: further phases that a part works in, for the parts that have any.
        blockwise: parts that are entered by their `forward` and run through lists of blocks, so that their weights
            can come block by block.
        dtype: of the transformer's activations.
    """

    limits: ModelLimits
    geometry: Geometry
    flow_shift: float
    parts: Mapping[str, nn.Module]
    phases: Mapping[str, Phase]
    also: Mapping[str, tuple[Phase, ...]]
    blockwise: frozenset[str]

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, request: VideoRequest) -> Conditioning:
        """Texts (and images) of one request, alone and at true length; on the parts' device."""

    def first_latents(self, request: VideoRequest, conditioning: Any) -> Float[Tensor, "channels frames height width"]:
        """Latents before the first step, of the noise of the request's seed (`models.noise`); fp32, on the model's
        device."""

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


class EncoderIdentity(NamedTuple):
    """What the results of an encoder depend on: with its input's, the key of a cache.

    Attributes:
        settings: as text; the order counts.
        parts: names of the networks whose weights it uses; the order counts.
    """

    settings: tuple[str, ...]
    parts: tuple[str, ...]


@runtime_checkable
class TrainableFamily(Family, Protocol):
    """A family whose transformer can be trained.

    Attributes:
        transformer: takes `packs=` as `velocities` does, and gives the same, with gradients. Its class has
            `layer_groups`, patterns of its linear layers' full names by the groups' names, `zero_at_start`, a pattern
            of the names of those that start at zero in an untrained network, `without_effect` and `save_copy`
            (`models/packed.py`).
        untrainable: why this model cannot be trained by flow matching; None where it can.
        clip_encoder, caption_encoder: what `encode_clip` and `encode_caption` depend on.
    """

    @property
    def untrainable(self) -> str | None: ...

    @property
    def transformer(self) -> ModelMixin: ...

    @property
    def clip_encoder(self) -> EncoderIdentity: ...

    @property
    def caption_encoder(self) -> EncoderIdentity: ...

    def encode_clip(self, frames: UInt8[Tensor, "frames height width 3"]) -> Mapping[str, Tensor]:
        """`latents` [channels, latent_frames, h, w], as the transformer sees them, and under other names what the first
        frame gives to a model that takes one as an image. All fp32, on the CPU; the same every time."""

    def encode_caption(self, caption: str) -> Mapping[str, Tensor]:
        """What conditions a sample with this caption, by name, fp32, on the CPU."""

    def conditioning_rows(self, conditioning: Mapping[str, Tensor]) -> int:
        """Transformer rows that a caption, and the first frame if it is among them, take."""

    def training_branch(
        self,
        latents: Float[Tensor, "channels frames height width"],
        conditioning: Mapping[str, Tensor],
        timestep: Float[Tensor, ""],
        guidance: Float[Tensor, ""],
        dtype: torch.dtype,
    ) -> Branch:
        """What the transformer is given of one sample; all tensors are on its device.

        Args:
            latents: with noise. timestep: sigma × 1000.
            conditioning: what `encode_caption` gives and, of samples that are shown their first frame, what
                `encode_clip` gives besides latents.
            guidance: the embedded guidance scale, for models that take one.
            dtype: of what the transformer is given, the timestep aside.
        """
