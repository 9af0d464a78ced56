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

    latents: Float[Tensor, "channels frames height width"]
    text: Float[Tensor, "tokens text_dim"]
    """Llama states at their true length; no padding."""
    pooled: Float[Tensor, " pooled_dim"]
    timestep: Float[Tensor, ""]
    """sigma × 1000, a scalar tensor."""
    guidance: Float[Tensor, ""] | None = None
    """Embedded guidance scale × 1000 in the model's dtype (6.0 is 6016 in bfloat16), for models that take one."""
    mask: Tensor | HeadRules | None = None
    """Restricts this sample's joint attention over `[video | text]`: a tensor of a shape that `attention` takes (with
    one sample: `[N]`, `[N, N]`, `[heads, N, N]`), or rules for its heads."""
