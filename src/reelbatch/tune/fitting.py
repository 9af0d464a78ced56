"""What fits on cards of several sizes: for each card, size and length the quickest setting, by estimate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from reelbatch.loading.precision import Precision
from reelbatch.memory.cards import BY_SIZE, Card, card
from reelbatch.memory.estimate import any_image
from reelbatch.memory.placement import Offload, offloads
from reelbatch.request import VideoRequest
from reelbatch.tune.setup import LARGEST_BATCH, Planned, Setup

SHAPES = ((960, 544, 61), (960, 544, 129), (1280, 720, 61), (1280, 720, 129))
"""Width, height and frames."""
DTYPES = ("bfloat16", "int8")


class Row(NamedTuple):
    """What fits on a card.

    Attributes:
        offload: the quickest with which a video fits; None: none does.
        batch: the largest that fits with it.
        peak: estimated bytes of one video with it, or, where none fits, with the offload that takes least.
    """

    card: Card
    width: int
    height: int
    frames: int
    dtype: str
    offload: Offload | None
    batch: int
    peak: int

    @property
    def cell(self) -> str:
        """The answer in a few words: offload, peak of one video, largest batch."""
        peak = f"{self.peak / 2**30:.1f} GiB"
        if self.offload is None:
            return f"does not fit ({peak})"
        most = f"{self.batch}{' or more' if self.batch == LARGEST_BATCH else ''}"
        return f"offload {self.offload}, {peak}, {most} at once"

    def record(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        return {**self._asdict(), "card": self.card.name, "gb": self.card.nominal, "usable": self.card.usable}


def rows(
    model: Planned,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    dtypes: Sequence[str] = DTYPES,
    names: Sequence[str] = BY_SIZE,
) -> Iterator[Row]:
    """Every card, shape and dtype; nothing is left to what the engine does when memory runs out."""
    precisions = {name: Precision.parse(name, model.device) for name in dtypes}
    for one in map(card, names):
        for width, height, frames in shapes:
            size = {"width": width, "height": height, "frames": frames}
            for dtype, precision in precisions.items():
                limits = model.family(precision).limits
                request = VideoRequest(prompt="-", **any_image(limits) | size).for_model(limits)
                offload, batch, peak = _quickest(Setup(model, request, 1, precision), one.usable)
                yield Row(one, width, height, frames, dtype, offload, batch, peak)


def _quickest(setup: Setup, available: int) -> tuple[Offload | None, int, int]:
    for offload in offloads(setup.model.device, setup.precision.int8):
        setup = replace(setup, offload=offload)
        if setup.peak() <= available:
            return offload, setup.largest_batch(available), setup.peak()
    return None, 0, setup.peak()


def markdown(every: Sequence[Row]) -> str:
    """As a table, a line a card and shape."""
    dtypes = list(dict.fromkeys(row.dtype for row in every))
    lines: dict[str, list[str]] = {}
    for row in every:
        size = f"{row.card.nominal:g} GB ({row.card.name}) | {row.width}×{row.height} | {row.frames}"
        lines.setdefault(size, []).append(row.cell)
    head = [f"| card | size | frames | {' | '.join(dtypes)} |", f"| --- | --- | --: |{' --- |' * len(dtypes)}"]
    return "\n".join([*head, *(f"| {size} | {' | '.join(cells)} |" for size, cells in lines.items())])
