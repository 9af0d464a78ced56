"""What the family's transformers have in common as Diffusers models that take ragged packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from reelbatch.attention import AUTO, HeadRules, Mask, Sizes, check_backend, compile_rules, per_sample
from reelbatch.models.layers import Attending, BranchShape
from reelbatch.tracing import run_block

DIFFUSERS_BACKENDS = {
    "native": AUTO,
    "_native_flash": "flash",
    "_native_cudnn": "cudnn",
    "_native_efficient": "efficient",
    "_native_math": "math",
    "flex": "flex",
}
"""Diffusers' names of attention backends, in ours."""


class MaskedBranch(Protocol):
    """A branch of any of these transformers."""

    @property
    def latents(self) -> Float[Tensor, "channels frames height width"]: ...

    @property
    def mask(self) -> Tensor | HeadRules | None: ...


class PackedTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """A transformer whose blocks receive all packs of a step at once."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False
    isolation: Literal["exact", "packed"] = "exact"
    """How the samples of a padded batch (Diffusers' signature) share the network: each as it would be alone, bit for
    bit, or all in one pack."""
    attention_backend: str = AUTO
    """The kernel of the joint attention: a name in `reelbatch.attention.BACKENDS`, or "auto"."""

    @property
    def without_effect(self) -> str:
        """A pattern of the full names of layers that no output depends on; they are not trained, as they get no
        gradient."""
        return r"(?!)"

    def set_attention_backend(self, backend: str) -> None:
        """The kernel of the joint attention, by our name (`reelbatch.attention.BACKENDS`, "auto") or Diffusers' own."""
        name = DIFFUSERS_BACKENDS.get(backend.lower(), backend.lower())
        check_backend(name)
        self.attention_backend = name

    def reset_attention_backend(self) -> None:
        self.attention_backend = AUTO

    def enable_cache(self, config: Any) -> None:
        """Refused: Diffusers' step caches decide once for the whole batch."""
        raise NotImplementedError(
            f"{type(config).__name__}: a step cache decides once for the whole batch what is computed. One that looks "
            "at the data would make a video depend on its batch-mates, and those that count steps work on Diffusers' "
            "own blocks. Run without it (reelbatch.restore(pipe) gives back Diffusers' own "
            "transformer, which has it)."
        )

    def save_copy(self, folder: Path, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the network as a folder of its own, which a model folder can hold.

        Args:
            weights: to write in the place of those that are in the network.
        """
        copy = type(self).from_config(self.config)
        copy.load_state_dict(self.state_dict() if weights is None else weights)
        copy.to(dtype).save_pretrained(folder)

    def _packs(self, packs: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """The network itself: a velocity for each branch of each pack."""
        raise NotImplementedError

    def _padded(self, branches: Sequence[MaskedBranch], return_dict: bool) -> Transformer2DModelOutput | tuple[Tensor]:
        """What Diffusers' signature gives for the samples of a padded batch."""
        velocities = self._packs([[branch] for branch in branches] if self.isolation == "exact" else [branches])
        sample = torch.stack([velocity for pack in velocities for velocity in pack])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block: nn.Module, packs: list[Any]) -> list[Any]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, packs)
        return run_block(block, packs)

    def _attending(self, pack: Sequence[MaskedBranch], shapes: Sequence[BranchShape]) -> Attending:
        if all(branch.mask is None for branch in pack):
            return Attending(None, self.attention_backend)
        masks = tuple(self._mask(branch, shape) for branch, shape in zip(pack, shapes, strict=True))
        return Attending(masks, self.attention_backend)

    def _mask(self, branch: MaskedBranch, shape: BranchShape) -> Mask:
        heads, tokens = self.config.num_attention_heads, shape.video + shape.text
        if isinstance(branch.mask, HeadRules):
            return compile_rules(branch.mask, heads, shape[:3], shape.text, branch.latents.device)
        return None if branch.mask is None else per_sample(branch.mask, Sizes(1, heads, tokens, tokens))[0]

    def _shape(self, latents: Tensor, text: int) -> BranchShape:
        """Patches of latents [channels, frames, height, width], and text rows."""
        _, frames, height, width = latents.shape
        p, p_t = self.config.patch_size, self.config.patch_size_t
        return BranchShape(frames // p_t, height // p, width // p, text)

    def _unpatchify(self, rows: Float[Tensor, "video patch"], shape: BranchShape) -> Tensor:
        p, p_t = self.config.patch_size, self.config.patch_size_t
        patches = rows.reshape(shape.frames, shape.height, shape.width, -1, p_t, p, p)
        return patches.permute(3, 0, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def check_heads(qk_norm: str, rope_axes_dim: Sequence[int], head_dim: int) -> None:
    """Raises ValueError for a configuration of another family of networks, or one that does not fit together."""
    if qk_norm != "rms_norm":
        raise ValueError(f"qk_norm is {qk_norm!r}; HunyuanVideo's transformer has 'rms_norm'.")
    if sum(rope_axes_dim) != head_dim:
        raise ValueError(
            f"rope_axes_dim {tuple(rope_axes_dim)} sums to {sum(rope_axes_dim)}; "
            f"it must sum to attention_head_dim, {head_dim}."
        )
