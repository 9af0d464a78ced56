"""Diffusers' padded batches, taken apart: what the families have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from reelbatch.attention import HeadRules, Sizes, canonical, once
from reelbatch.tracing import cached


def rows_of(name: str, value: Tensor, count: int) -> Tensor:
    """A row for each of `count` samples; one row, or a scalar, serves them all."""
    value = value.reshape(1) if value.ndim == 0 else value
    if len(value) not in (1, count):
        raise ValueError(f"{name} has {len(value)} rows and hidden_states has {count}: give one a sample, or one row.")
    return value.expand(count, *value.shape[1:])


def positions_of(
    name: str, mask: Shaped[Tensor, "#B tokens"] | None, states: Shaped[Tensor, "#B tokens dim"], count: int
) -> Sequence[Int[Tensor, " real_tokens"]]:
    """Where each sample's real tokens are; looked up once a mask, as that waits for the device.

    Args:
        mask: nonzero where a token is real; None is all.
    """
    tokens = states.shape[1]
    if mask is None:
        return [_all_positions(tokens, states.device)] * count
    if mask.ndim != 2 or mask.shape[1] != tokens:
        raise ValueError(
            f"{name} has shape {list(mask.shape)}; it must be [{count}, {tokens}], nonzero where a text token is real."
        )
    rows = rows_of(name, mask, count)
    return once(mask, count, lambda: [row.nonzero().flatten() for row in rows])


@cached(16)
def _all_positions(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept serves training too
        return torch.arange(count, device=device)


def masks_of(
    kwargs: Mapping[str, Any], count: int, heads: int, video: int, text: int, positions: Sequence[Tensor]
) -> Sequence[Tensor | HeadRules | None]:
    """What restricts each sample's joint attention, by Diffusers' `attention_kwargs`.

    Args:
        kwargs: `attention_mask` over `[video | text]`, with `attention_mask_axes`; or `attention_rules`, one or one (or
            None) a sample.
        video, text: tokens, the latter with padding. positions: of the tokens of `text` that are real.
    """
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
