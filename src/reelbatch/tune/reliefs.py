"""Reliefs: what the engine does by itself where a batch does not fit as it is set, by estimate.

Two things may bound a run. Where memory runs out, the engine tries again in one fallback after the other
(`engine/fallback.py`, `engine/decoder.py`). With `--max-memory` it never comes to that: videos wait, and one that does
not fit alone is refused (`engine/limit.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from reelbatch.engine.decoder import smaller_tiles, tile_words
from reelbatch.memory.placement import Offload, ReliefKind, relief_kinds, relief_words
from reelbatch.models.family import PHASES, Phase
from reelbatch.tune.setup import Setup

WHERE: Mapping[ReliefKind, Offload] = {"evict": "component", "blocks": "block"}
"""Offloads with whose weights a phase runs in a relief."""


class Outcome(NamedTuple):
    """How a phase goes.

    Attributes:
        peak: estimated bytes on the device.
        relief: what the engine does so that it fits, as the end of "a step …"; None: it runs as it is set.
        exact: whether the videos keep their bits.
    """

    phase: Phase
    peak: int
    fits: bool
    relief: str | None = None
    exact: bool = True


class Try(NamedTuple):
    """A setup in which a phase is tried (None: on another device), and bytes that lie beside it meanwhile."""

    setup: Setup | None
    relief: str | None = None
    exact: bool = True
    beside: int = 0


def outcomes(setup: Setup, available: int, limited: bool) -> tuple[Outcome, ...]:
    """How each phase goes with so many bytes. limited: whether `--max-memory` sets them, and not the device."""
    if limited:
        return _within_limit(setup, available)
    return tuple(_on_device(setup, phase, available) for phase in PHASES)


def _within_limit(setup: Setup, limit: int) -> tuple[Outcome, ...]:
    """Fewer videos share a step; nothing else changes."""
    sizes = range(1, setup.batch_size + 1)
    together = bisect_right(sizes, limit, key=lambda size: replace(setup, batch_size=size).phase_bytes("step"))
    run = replace(setup, batch_size=max(together, 1))
    waiting = None if run.batch_size == setup.batch_size else f"with {run.batch_size} at a time, while the others wait"
    peaks = {phase: run.phase_bytes(phase) for phase in PHASES}
    return tuple(Outcome(p, peaks[p], peaks[p] <= limit, waiting if p == "step" else None) for p in PHASES)


def _on_device(setup: Setup, phase: Phase, available: int) -> Outcome:
    """The first try that fits, else the one that takes least."""
    tried: list[Outcome] = []
    for one in tries(setup, phase):
        peak = one.beside + (one.setup.phase_bytes(phase) if one.setup else setup.held)
        tried.append(Outcome(phase, peak, peak <= available, one.relief, one.exact))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda outcome: outcome.peak)


def tries(setup: Setup, phase: Phase) -> Iterator[Try]:
    """What the engine tries, one after the other: first as it is set."""
    yield Try(setup)
    family, device, alone = setup.estimator.family, setup.model.device, setup
    beside, start = 0, ""
    if phase == "step":
        while alone.batch_size > 1:
            alone = replace(setup, batch_size=-(-alone.batch_size // 2))  # as `Planner.halves`
            beside = (setup.batch_size - alone.batch_size) * setup.estimator.latent_bytes(setup.request)
            start = f"in parts of {alone.batch_size} video{'s' if alone.batch_size > 1 else ''}"
            yield Try(alone, start, beside=beside)
    parts = [((family.phases[name], *family.also.get(name, ())), name in family.blockwise) for name in family.parts]
    further = []
    for kind in relief_kinds(phase, parts, setup.offload, device, storable=not setup.precision.int8):
        words = ", ".join(filter(None, (start, relief_words(kind, device))))
        changed = replace(alone, offload=WHERE[kind]) if kind in WHERE else None
        further.append(Try(changed, words, kind != "cpu", beside))
    if phase == "decode":
        for side in smaller_tiles(family.tile_side(setup.request)):
            tiled = setup.request.model_copy(update={"vae_tiling": side})
            further.append(Try(replace(setup, request=tiled), tile_words(side), exact=False))
    yield from sorted(further, key=lambda one: not one.exact)
