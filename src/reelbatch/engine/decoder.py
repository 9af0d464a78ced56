"""Decoder: latents to frames, between the steps or beside them in a thread.

What the thread reads of the engine: the sample that it was given, which nobody changes; the VAE's weights, which nobody
moves before `wait` has returned, and which are all on the device (with an offload nothing is decoded beside). On a GPU
it works in a stream of its own, which begins after what the engine's stream had written when the sample was handed
over. It writes nothing but its result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from reelbatch.device import OutOfMemory, is_out_of_memory
from reelbatch.engine.events import FellBack, Worked
from reelbatch.engine.fallback import Fallback
from reelbatch.engine.sample import Sample
from reelbatch.memory.placement import Relief

SMALLER_TILES = (128, 64)
"""Pixels on a side of the VAE tiles that are tried when nothing else helps."""


def smaller_tiles(own: int | None) -> list[int]:
    """Sides of tiles that are tried after a request's own (None: whole), in this order."""
    return [size for size in SMALLER_TILES if own is None or size < own]


def tile_words(side: int) -> str:
    """Tiles, as the end of "tried again …"."""
    return f"in VAE tiles of {side} pixels"


@dataclass(frozen=True)
class Decoded:
    """Frames, and how they came about.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        tile_side: pixels of the VAE's tiles; None: decoded whole.
        changes: what was done, because memory ran out, that changed the pixels.
    """

    frames: NDArray[np.uint8]
    seconds: float
    tile_side: int | None
    changes: tuple[str, ...] = ()
    events: tuple[FellBack | Worked, ...] = ()


class Decoder:
    """Decodes samples that are past their last step."""

    def __init__(self, fallback: Fallback) -> None:
        self.fallback = fallback
        self.family, self.device = fallback.runner.model.family, fallback.runner.model.device
        self._futures: dict[str, Future[Decoded]] = {}
        """By id, in the order in which the thread takes them."""
        self._forgotten: list[Future[Decoded]] = []
        """Not wanted any more, but perhaps still at work."""
        self._ran_out: set[str] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")

    @property
    def stuck(self) -> bool:
        """Whether a sample can only be decoded when no other runs."""
        return bool(self._ran_out)

    def wait(self) -> None:
        """Until the thread has nothing to do."""
        wait([*self._futures.values(), *self._forgotten])
        self._forgotten.clear()

    def forget(self, id: str) -> None:
        """This sample's frames are not wanted, or known already."""
        future = self._futures.pop(id, None)
        if future is not None and not future.cancel() and not future.done():
            self._forgotten.append(future)
        self._ran_out.discard(id)

    def begin(self, samples: Sequence[Sample]) -> None:
        """Starts to decode these in the thread, one after the other."""
        self.fallback.runner.model.placement.restore()
        self._forgotten = [future for future in self._forgotten if not future.done()]
        for sample in samples:
            if sample.id not in self._futures and sample.id not in self._ran_out:
                self._futures[sample.id] = self._submit(sample)

    def results(
        self, samples: Sequence[Sample], leave: int, others: bool
    ) -> Iterator[tuple[Sample, Decoded | Exception]]:
        """What became of these samples; those that the thread does not have are decoded here.

        Args:
            leave: samples that the thread may keep; it is waited for while it has more.
            others: whether other samples run. What runs out of memory beside them is tried again without them.
        """
        open_ = [sample for sample in samples if not (others and sample.id in self._ran_out)]
        places = {id: place for place, id in enumerate(self._futures)}
        open_.sort(key=lambda sample: places.get(sample.id, len(places)))
        for number, sample in enumerate(open_):
            if not self._is_ready(sample.id) and len(open_) - number <= leave:
                return  # those behind it are not ready either
            outcome = self._result(sample, last=not others)
            if outcome is not None:
                yield sample, outcome

    def _is_ready(self, id: str) -> bool:
        """Whether the thread is through with it, or does not have it."""
        return id not in self._futures or self._futures[id].done()

    def _result(self, sample: Sample, last: bool) -> Decoded | Exception | None:
        """None: it ran out of memory, and is tried again when no other sample runs."""
        try:
            if sample.id in self._futures:
                try:
                    return self._futures[sample.id].result()
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                del self._futures[sample.id]  # whose error holds what the failed decode had allocated
            return self._here(sample, last)
        except OutOfMemory as error:
            if last:
                return error
            self._ran_out.add(sample.id)
            return None
        except Exception as error:
            return error

    def _here(self, sample: Sample, last: bool) -> Decoded:
        """In the engine's thread, with fallbacks where memory runs out: what changes pixels comes last, and only where
        no other sample holds memory."""
        own = self.family.tile_side(sample.request)
        side = own

        @contextmanager
        def tiles(smaller: int) -> Iterator[None]:
            nonlocal side
            side = smaller
            yield

        reliefs = self.fallback.reliefs("decode")
        if last and not self.fallback.keep_pixels:
            reliefs += [Relief(tile_words(size), partial(tiles, size), exact=False) for size in smaller_tiles(own)]
        reliefs.sort(key=lambda relief: not relief.exact)
        if not last:
            reliefs = [relief for relief in reliefs if relief.exact]
        started = self.fallback.begin()
        decoded, helped = self.fallback.alone("decoding", sample.request, lambda: self._decode(sample, side), reliefs)
        events = self.fallback.done("decode", [sample.id], started)
        changes = (f"decoded {helped.what}",) if helped is not None and not helped.exact else ()
        return replace(decoded, changes=changes, events=tuple(events))

    def _submit(self, sample: Sample) -> Future[Decoded]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))  # until the latents are written
            sample.latents.record_stream(stream)  # its memory is not given to others while the thread reads it

        def work() -> Decoded:
            started = time.perf_counter()
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                decoded = self._decode(sample, self.family.tile_side(sample.request))
            return replace(decoded, events=(Worked("decode", (sample.id,), time.perf_counter() - started),))

        return self._thread.submit(work)

    def _decode(self, sample: Sample, tile_side: int | None) -> Decoded:
        started = time.perf_counter()
        frames = self.family.decode(sample.latents, tile_side).numpy()
        return Decoded(frames, time.perf_counter() - started, tile_side)
