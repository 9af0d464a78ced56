"""Remedies: what to set so that a batch fits as it is set, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from reelbatch.loading.precision import Precision
from reelbatch.tune.setup import Setup


@dataclass(frozen=True)
class Remedy:
    """Changes that make a batch fit, and the estimated peak with them."""

    changes: tuple[str, ...]
    peak: int


Change = tuple[int, str, Callable[[Setup], Setup]]
"""What it costs (a rank), what to call it, and the setup with it."""

TILE_SIDES = ((1, 256), (2, 128))
"""What VAE tiles cost, and their sides in pixels."""
SMALLER_BATCH = 2


def remedies(setup: Setup, available: int) -> list[Remedy]:
    """Sets of changes with which the batch fits, none of which could be left out, the cheapest first.

    Cheap is what costs little time and leaves the videos nearly as they are: VAE tiles, a smaller batch, offloading
    what is not at work, a dtype of fewer bytes, offloading block by block.
    """
    candidates: list[tuple[int, frozenset[str], Remedy]] = []
    for changes in sorted(_combinations(setup), key=lambda changes: sum(rank for rank, _, _ in changes)):
        changed = setup
        for _, _, change in changes:
            changed = change(changed)
        cost, names = sum(rank for rank, _, _ in changes), [name for _, name, _ in changes]
        largest = changed.largest_batch(available)
        if largest == 0:
            continue
        if largest < setup.batch_size:
            changed = replace(changed, batch_size=largest)
            cost += SMALLER_BATCH
            names.append(f"--batch-size {largest}")
        kinds = frozenset(name.split()[0] for name in names)
        candidates.append((cost, kinds, Remedy(tuple(names), changed.peak())))
    candidates.sort(key=lambda one: one[0])
    needed = [one for i, one in enumerate(candidates) if not any(kinds <= one[1] for _, kinds, _ in candidates[:i])]
    return [remedy for _, _, remedy in needed]


def _combinations(setup: Setup) -> Iterator[Sequence[Change]]:
    """Every choice of at most one change of each kind; a smaller batch is tried with each."""
    kinds: list[list[Change | None]] = [[None], [None], [None]]
    tiles = setup.estimator.family.tile_side(setup.request)
    for cost, side in TILE_SIDES:
        if tiles is None or tiles > side:
            tiled = setup.request.model_copy(update={"vae_tiling": side})
            kinds[0].append((cost, f"--vae-tiling {side}", partial(replace, request=tiled)))
    if setup.offload == "none":
        kinds[1].append((3, "--offload component", lambda s: replace(s, offload="component")))
    if setup.offload != "block":
        kinds[1].append((6, "--offload block", lambda s: replace(s, offload="block")))
    half = torch.bfloat16
    if setup.precision.transformer.itemsize > half.itemsize:
        kinds[2].append((4, "--dtype bfloat16", lambda s: replace(s, precision=Precision(half, half, half))))
    for choice in product(*kinds):
        yield [change for change in choice if change is not None]
