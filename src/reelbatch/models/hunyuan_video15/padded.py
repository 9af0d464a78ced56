"""Diffusers' padded batches for HunyuanVideo 1.5, taken apart into the samples that they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from reelbatch.attention import once
from reelbatch.models.hunyuan_video15.branch import Branch
from reelbatch.models.padded import masks_of, positions_of, rows_of

Positions = Sequence[Int[Tensor, " real_tokens"]]
"""Of each sample, in its padded row."""


def branches_of(
    *,
    latents: Float[Tensor, "B in_channels frames height width"] | None,
    timestep: Float[Tensor, "#B"] | None,
    timestep_r: Float[Tensor, "#B"] | None,
    text: Float[Tensor, "#B text_tokens text_dim"] | None,
    text_mask: Shaped[Tensor, "#B text_tokens"] | None,
    glyphs: Float[Tensor, "#B glyph_tokens glyph_dim"] | None,
    glyph_mask: Shaped[Tensor, "#B glyph_tokens"] | None,
    image: Float[Tensor, "prompts image_tokens image_dim"] | None,
    heads: int,
    patch: tuple[int, int, int],
    kwargs: Mapping[str, Any],
) -> list[Branch]:
    """The samples of a padded batch, each with its own text, glyphs and image only.

    Args:
        text_mask, glyph_mask: nonzero where a token is real, at any position; None is all.
        image: all zero for a sample without an image, which is how Diffusers says so; None is none for all. With fewer
            rows than samples, each row serves as many samples, one after the other: Diffusers' text-to-video pipeline
            makes a row for a prompt, not for a video.
        heads, patch: of the network; they give the sizes of the joint attention for the masks in `kwargs`.
        kwargs: Diffusers' `attention_kwargs`, as the transformer's `forward` describes them.

    Raises:
        TypeError: if something that the network needs was not given.
    """
    given = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
    missing = [name for name, value in given.items() if value is None]
    if latents is None or timestep is None or text is None:
        raise TypeError(f"The transformer's forward needs {', '.join(missing)} (or packs, for ragged samples).")
    count = len(latents)
    timesteps = rows_of("timestep", timestep, count)
    timesteps_r = None if timestep_r is None else rows_of("timestep_r", timestep_r, count)
    texts = rows_of("encoder_hidden_states", text, count)
    text_at = positions_of("encoder_attention_mask", text_mask, text, count)
    glyphs_at = positions_of("encoder_attention_mask_2", glyph_mask, glyphs, count) if glyphs is not None else None
    image_at = None if image is None else _image_positions(image, count)
    of_glyphs, of_image = _pieces(glyphs, glyphs_at, count), _pieces(image, image_at, count)
    video = [size // stride for size, stride in zip(latents.shape[2:], patch, strict=True)]
    masks = masks_of(
        kwargs,
        count,
        heads,
        video[0] * video[1] * video[2],
        sum(piece.shape[1] for piece in (image, glyphs, text) if piece is not None),
        text_at
        if kwargs.get("attention_mask") is None
        else _joined((image, image_at), (glyphs, glyphs_at), (text, text_at)),
    )
    return [
        # copies: a matrix library may choose its kernel by alignment, and alone a sample owns its memory
        Branch(
            latents=latents[sample].clone(),
            text=texts[sample].index_select(0, text_at[sample]),
            timestep=timesteps[sample],
            timestep_r=None if timesteps_r is None else timesteps_r[sample],
            glyphs=of_glyphs[sample],
            image=of_image[sample],
            mask=masks[sample],
        )
        for sample in range(count)
    ]


def _image_positions(image: Float[Tensor, "prompts tokens dim"], count: int) -> Positions:
    """All tokens of a sample with an image, none of one without."""
    if count % len(image):
        raise ValueError(f"image_embeds has {len(image)} rows and hidden_states has {count}: give one a sample.")

    def look() -> Positions:
        every = torch.arange(image.shape[1], device=image.device)
        present = (image != 0).flatten(1).any(dim=1).repeat_interleave(count // len(image))
        return [every if has_image else every[:0] for has_image in present.tolist()]

    return once(image, count, look)


def _pieces(states: Tensor | None, positions: Positions | None, count: int) -> Sequence[Tensor | None]:
    """Each sample's real rows; None where it has none.

    They are kept, so that they are the same tensors at every step, and what no timestep changes is computed once.
    """
    if states is None or positions is None:
        return [None] * count

    def cut() -> tuple[Positions, list[Tensor | None]]:
        rows = states.repeat_interleave(count // len(states), dim=0)
        pieces = [row.index_select(0, at) if len(at) else None for row, at in zip(rows, positions, strict=True)]
        return positions, pieces  # the positions are held, so that their ids stay theirs

    return once(states, tuple(map(id, positions)), cut)[1]


def _joined(*pieces: tuple[Tensor | None, Positions | None]) -> list[Int[Tensor, " real_tokens"]]:
    """Where each sample's real tokens are in `[image | glyphs | text]`, padding included."""
    starts, start = [], 0
    for states, at in pieces:
        if states is not None and at is not None:
            starts.append([each + start for each in at])
            start += states.shape[1]
    return [torch.cat(of_sample) for of_sample in zip(*starts, strict=True)]
