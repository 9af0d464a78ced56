"""Diffusers' padded batches, taken apart into the samples that they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from reelbatch.attention import HeadRules, Sizes, canonical, once
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.tracing import cached


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
    rows = {name: _rows(name, value, count) for name, value in given.items() if value is not None}
    positions = _positions(text, text_mask, count)
    scales = None if guidance is None else _scales(guidance, count)
    video = [size // stride for size, stride in zip(latents.shape[2:], patch, strict=True)]
    tokens = video[0] * video[1] * video[2]
    masks = _masks(kwargs, count, heads, tokens, text.shape[1], positions)
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


def _rows(name: str, value: Tensor, count: int) -> Tensor:
    """A row for each of `count` samples."""
    value = value.reshape(1) if value.ndim == 0 else value
    if len(value) not in (1, count):
        raise ValueError(f"{name} has {len(value)} rows and hidden_states has {count}: give one a sample, or one row.")
    return value.expand(count, *value.shape[1:])


def _positions(text: Tensor, mask: Tensor | None, count: int) -> list[Int[Tensor, " tokens"]]:
    """Where each sample's real text tokens are; looked up once a mask, as that waits for the device."""
    if mask is None:
        return [_all_positions(text.shape[1], text.device)] * count
    if mask.ndim != 2 or mask.shape[1] != text.shape[1]:
        raise ValueError(
            f"encoder_attention_mask has shape {list(mask.shape)}; it must be [{count}, {text.shape[1]}], "
            "nonzero where a text token is real."
        )
    rows = _rows("encoder_attention_mask", mask, count)
    return once(mask, count, lambda: [row.nonzero().flatten() for row in rows])


@cached(16)
def _all_positions(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept serves training too
        return torch.arange(count, device=device)


def _scales(guidance: Tensor, count: int) -> Tensor:
    """One guidance a sample. A pipeline that was given a list of B scales makes `[B, B]` of it, each row the list."""
    if guidance.ndim < 2:
        return _rows("guidance", guidance, count)
    if len(guidance[0]) != count:
        raise ValueError(f"{len(guidance[0])} guidance scales were given for a batch of {count}: give one, or {count}.")
    return guidance[0]


def _masks(
    kwargs: Mapping[str, Any], count: int, heads: int, video: int, text: int, positions: Sequence[Tensor]
) -> Sequence[Tensor | HeadRules | None]:
    mask, rules = kwargs.get("attention_mask"), kwargs.get("attention_rules")
    if mask is not None and rules is not None:
        raise ValueError("attention_kwargs has both attention_mask and attention_rules; give one of them.")
    if mask is not None:
        sizes = Sizes(count, heads, video + text, video + text)
        return _joint_masks(mask, kwargs.get("attention_mask_axes"), sizes, video, positions)
    if rules is None or isinstance(rules, HeadRules):
        return [rules] * count
    if len(rules) != count:
        raise ValueError(f"attention_rules has {len(rules)} entries for {count} samples: one a sample (None is none).")
    return list(rules)


def _joint_masks(mask: Tensor, axes: str | None, sizes: Sizes, video: int, positions: Sequence[Tensor]) -> list[Tensor]:
    """Each sample's own rows and columns of a mask over `[video | padded text]`: `[1, heads or 1, N or 1, N]`."""

    def cut() -> tuple[Sequence[Tensor], list[Tensor]]:
        view = canonical(mask, sizes, axes).expand(sizes.batch, -1, -1, -1)
        parts = []
        for sample, text in zip(view, positions, strict=True):
            own = torch.cat([torch.arange(video, device=mask.device), text.to(mask.device) + video])
            part = sample[None].index_select(3, own)
            parts.append(part if part.shape[2] == 1 else part.index_select(2, own))
        return positions, parts  # the positions are held, so that their ids stay theirs

    # kept, so that each part is the same tensor at every step, and is looked into once
    return once(mask, (sizes, axes, tuple(map(id, positions))), cut)[1]
