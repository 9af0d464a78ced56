"""Branch: the transformer's input for one sample."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reelbatch.attention import HeadRules


@dataclass(frozen=True)
class Branch:
    """The network's input for one sample, or for one guidance branch (conditional, unconditional) of it.

    Everything may differ from one branch to the next; no dimension is shared. All tensors are on the model's device.
    """

    latents: Float[Tensor, "in_channels frames height width"]
    """Noisy latents, then the condition's (an image in the first frame, zeros elsewhere) and its mask (1 where a frame
    is given): 32 + 32 + 1 channels in the published model."""
    text: Float[Tensor, "tokens text_embed_dim"]
    """Qwen's states at their true length; no padding."""
    timestep: Float[Tensor, ""]
    """sigma × 1000, a scalar tensor."""
    timestep_r: Float[Tensor, ""] | None = None
    """The timestep that this step leads to (0 at the last), for models with `use_meanflow`."""
    glyphs: Float[Tensor, "glyph_tokens text_embed_2_dim"] | None = None
    """ByT5's states of the words to be shown; None where the prompt quotes none."""
    image: Float[Tensor, "image_tokens image_embed_dim"] | None = None
    """SigLIP's states of the image; None for text to video."""
    mask: Tensor | HeadRules | None = None
    """Restricts this sample's joint attention over `[video | image | glyphs | text]`: a tensor of a shape that
    `attention` takes (with one sample: `[N]`, `[N, N]`, `[heads, N, N]`), or rules for its heads."""

    @property
    def conditioning_rows(self) -> int:
        """Rows of image, glyphs and text."""
        return sum(len(piece) for piece in (self.image, self.glyphs, self.text) if piece is not None)
