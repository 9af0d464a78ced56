"""Diffusers' padded batches for HunyuanVideo, taken apart into the samples that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.padded import masks_of, positions_of, rows_of


def branches_of(
    *,
    latents: Float[Tensor, "B channels frames height width"] | None,
    timestep: Float[Tensor, "#B"] | None,
    text: Float[Tensor, "#B text_tokens text_dim"] | None,
    text_mask: Shaped[Tensor, "#B text_tokens"] | None,
    pooled: Float[Tensor, "#B pooled_dim"] | None,
    guidance: Tensor | None,
    heads: int,
    patch: tuple[int, int, int],
    kwargs: Mapping[str, Any],
) -> list[Branch]:
    """The samples of a padded batch, each with its own text tokens only.

    Timestep, text, mask and pooled text of one row serve all samples, as they do by broadcasting in Diffusers.

    Args:
        text_mask: nonzero where a text token is real, at any position.
        heads, patch: of the network; they give the sizes of the joint attention for the masks in `kwargs`.
        kwargs: Diffusers' `attention_kwargs`, as the transformer's `forward` describes them.

    Raises:
        TypeError: if something that the network needs was not given.
    """
    given = {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }
    missing = [name for name, value in given.items() if value is None]
    if latents is None or timestep is None or text is None or pooled is None:
        raise TypeError(f"The transformer's forward needs {', '.join(missing)} (or packs, for ragged samples).")
    count = len(latents)
    rows = {name: rows_of(name, value, count) for name, value in given.items() if value is not None}
    positions = positions_of("encoder_attention_mask", text_mask, text, count)
    scales = None if guidance is None else _scales(guidance, count)
    video = [size // stride for size, stride in zip(latents.shape[2:], patch, strict=True)]
    tokens = video[0] * video[1] * video[2]
    masks = masks_of(kwargs, count, heads, tokens, text.shape[1], positions)
    return [
        # a copy: a matrix library may choose its kernel by alignment, and alone a sample owns its memory
        Branch(
            latents=latents[sample].clone(),
            text=rows["encoder_hidden_states"][sample].index_select(0, positions[sample]),
            pooled=rows["pooled_projections"][sample],
            timestep=rows["timestep"][sample],
            guidance=None if scales is None else scales[sample],
            mask=masks[sample],
        )
        for sample in range(count)
    ]


def _scales(guidance: Tensor, count: int) -> Tensor:
    """One guidance a sample. A pipeline that was given a list of B scales makes `[B, B]` of it, each row the list."""
    if guidance.ndim < 2:
        return rows_of("guidance", guidance, count)
    if len(guidance[0]) != count:
        raise ValueError(f"{len(guidance[0])} guidance scales were given for a batch of {count}: give one, or {count}.")
    return guidance[0]
