"""Ragged rows: the sequences of several samples laid end to end, with no padding between or after them.

A ragged tensor is an ordinary tensor `[sum(lengths), ...]` and the tuple of its samples' lengths. The lengths are
Python integers, known when a sample is admitted, so nothing here ever waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Lengths = tuple[int, ...]


def split(rows: Tensor, lengths: Lengths) -> tuple[Tensor, ...]:
    """The rows `[sum(lengths), ...]` of each sample, as views. A single sample is returned as it is."""
    return (rows,) if len(lengths) == 1 else rows.split(lengths)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Parts laid end to end. A single part is returned as it is, so that a sample alone owns its tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def interleave(first: Tensor, first_lengths: Lengths, second: Tensor, second_lengths: Lengths) -> Tensor:
    """`[a1 a2 …]` and `[b1 b2 …]` become `[a1 b1 a2 b2 …]`; all axes but the first agree."""
    pairs = zip(split(first, first_lengths), split(second, second_lengths), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def separate(rows: Tensor, first_lengths: Lengths, second_lengths: Lengths) -> tuple[Tensor, Tensor]:
    """The inverse of `interleave`: `[a1 b1 a2 b2 …]` becomes `[a1 a2 …]` and `[b1 b2 …]`."""
    lengths = tuple(n for pair in zip(first_lengths, second_lengths, strict=True) for n in pair)
    parts = rows.split(lengths)
    return join(parts[0::2]), join(parts[1::2])


def map_samples(function: Callable[..., Tensor], rows: Tensor, lengths: Lengths, *per_sample: Tensor) -> Tensor:
    """`function(rows of sample i, per_sample[i]…)` for every sample, laid end to end.

    This is how a value that a sample has once (a shift, a gate: `[B, D]`) meets the rows of that sample without ever
    being copied out to one row a token.
    """
    parts = split(rows, lengths)
    return join([function(part, *(values[i] for values in per_sample)) for i, part in enumerate(parts)])
