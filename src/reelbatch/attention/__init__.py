"""Attention over ragged rows, and over batches with a mask of any shape that people hold.

Every sample attends to itself, and to nothing else. A sample may have a mask (`masks.py`: tensors, `rules.py`: rules by
token coordinates, head by head); its batch-mates may have others or none. The kernels are in `backends.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reelbatch.attention.backends import (
    AUTO,
    BACKENDS,
    AttentionBackendError,
    Choice,
    attend,
    attend_one,
    check_backend,
    choose,
)
from reelbatch.attention.masks import FORMS, MaskShapeError, Sizes, canonical, once, per_sample
from reelbatch.attention.rules import (
    HeadRules,
    Rule,
    SlidingTile,
    Tokens,
    compile_rules,
    own_frame,
    own_pixel,
    register_rule,
    rule_named,
    rule_names,
)
from reelbatch.attention.setting import Mask, Setting, kind_of
from reelbatch.ragged import Lengths

__all__ = [
    "AUTO",
    "BACKENDS",
    "FORMS",
    "AttentionBackendError",
    "Choice",
    "HeadRules",
    "Mask",
    "MaskShapeError",
    "Rule",
    "Setting",
    "Sizes",
    "SlidingTile",
    "Tokens",
    "attention",
    "canonical",
    "check_backend",
    "choose",
    "compile_rules",
    "kind_of",
    "once",
    "own_frame",
    "own_pixel",
    "per_sample",
    "ragged_attention",
    "register_rule",
    "rule_named",
    "rule_names",
]


def attention(
    query: Float[Tensor, "B H Q head_dim"],
    key: Float[Tensor, "B H K head_dim"],
    value: Float[Tensor, "B H K value_dim"],
    mask: Tensor | None = None,
    *,
    axes: str | None = None,
    backend: str = AUTO,
) -> Float[Tensor, "B H Q value_dim"]:
    """Softmax attention of a batch, a sample at a time, so that no sample's result depends on its batch-mates.

    Args:
        mask: boolean (True may attend) or additive, of any of these shapes; each axis but the last may be 1:
            `[K]`, `[B, K]`, `[Q, K]`, `[H, Q, K]`, `[B, Q, K]`, `[B, H, Q, K]`. A shape that fits two of them with
            different meanings is refused, not guessed.
        axes: says which axis is which, where the shape leaves it open: "K", "BK", "QK", "HQK", "BQK" or "BHQK".
        backend: a name in `BACKENDS`, or "auto".

    Returns:
        Zeros for a query that may attend to nothing.

    Raises:
        MaskShapeError: if the mask fits no form, or more than one; it names the cure.
        ValueError: if query, key and value do not go together, or the mask holds NaN or +inf.
    """
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3] or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not go together: they "
            "are [B, H, Q, D], [B, H, K, D] and [B, H, K, Dv]."
        )
    batch, heads, queries, _ = query.shape
    sizes = Sizes(batch, heads, queries, key.shape[2])
    masks: Sequence[Mask] = (None,) * batch if mask is None else per_sample(mask, sizes, axes)
    samples = zip(query.split(1), key.split(1), value.split(1), masks, strict=True)
    return torch.cat([attend_one(q, k, v, ready, backend) for q, k, v, ready in samples])


def ragged_attention(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens heads head_dim"],
    value: Float[Tensor, "tokens heads head_dim"],
    lengths: Lengths,
    masks: Sequence[Mask] | None = None,
    backend: str = AUTO,
) -> Float[Tensor, "tokens heads*head_dim"]:
    """Softmax attention of each sample over its own rows.

    No sample is padded, and without masks none is built, so the flash kernels stay reachable and the memory used grows
    with the number of tokens, not with its square.

    Args:
        query, key, value: `[sum(lengths), heads, head dim]`, the samples laid end to end.
        lengths: tokens of each sample. A sample of no tokens is allowed.
        masks: one a sample, prepared by `per_sample` or `compile_rules`; None for a sample, or for all, is no mask.
        backend: a name in `BACKENDS`, or "auto".
    """
    return attend(query, key, value, lengths, masks, backend)
