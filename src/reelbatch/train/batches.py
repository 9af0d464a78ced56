"""Which samples make a step: drawn without padding, buckets or cropping, and without a state to be saved.

Samples are numbered as they are drawn. Epoch after epoch goes through all clips in an order of its own, and all that is
drawn for a sample (caption, noise level, guidance, noise) comes from a generator of its number. So a sample is the
same whoever shares its pack, on however many devices, and a run that is resumed at a number goes on as if never
stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch


def generator_of(*numbers: int) -> torch.Generator:
    """A generator, on the CPU, of its own for these numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class Order:
    """Which clip sample `number` is: every epoch a new order of all `count` clips."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch = lru_cache(4)(lambda epoch: torch.randperm(count, generator=generator_of(seed, epoch, 1)).tolist())

    def __call__(self, number: int) -> int:
        epoch, place = divmod(number, self.count)
        return int(self._epoch(epoch)[place])


def fill(
    first: int,
    tokens: Callable[[int], int],
    max_tokens: int | None,
    max_samples: int | None,
    count: int | None = None,
) -> range:
    """The samples of a pack that begins with sample `first`: as many as fit, one at least.

    Args:
        tokens: rows that a sample, by its number, puts through the transformer.
        count: how many samples there are; endlessly many if None, and one of the two bounds must then be given.
    """
    taken, end = tokens(first), first + 1
    while (max_samples is None or end - first < max_samples) and (count is None or end < count):
        taken += tokens(end)
        if max_tokens is not None and taken > max_tokens:
            break
        end += 1
    return range(first, end)


def packs_of_step(first: int, count: int, pack: Callable[[int], range]) -> list[range]:
    """`count` packs, one after the other, of the samples from `first` on."""
    packs: list[range] = []
    for _ in range(count):
        packs.append(pack(packs[-1].stop if packs else first))
    return packs


def share_of(packs: Sequence[range], rank: int, devices: int) -> Sequence[range]:
    """The packs that device number `rank` of so many computes."""
    return packs[rank::devices]
