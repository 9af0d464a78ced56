"""A run: an engine makes videos, and a thread beside it writes them while the next steps go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelbatch.engine.engine import Engine, Failure
from reelbatch.engine.recovery import free_memory, is_out_of_memory, log
from reelbatch.video import Place, Video

UNWRITTEN = 4
"""Videos that may wait for the writer before the engine waits too: frames must not pile up in memory."""


@dataclass(frozen=True)
class Outcome:
    """How a request ended: as a video at `place.path`, with its record, or with an error."""

    place: Place
    record: dict[str, Any] | None = None
    error: BaseException | None = None


def run(
    engine: Engine, places: Sequence[Place], *, overwrite: bool = False, stopping: Callable[[], bool] = lambda: False
) -> Iterator[Outcome]:
    """Makes and writes the video of every place, giving each outcome once its file is complete.

    Args:
        places: a file for every request.
        overwrite: whether an existing file may be replaced.
        stopping: asked before each step; once True, no further step is taken, and what is finished is still written.
    """
    homes = {place.request.id: place for place in places}
    for place in places:
        engine.submit(place.request)
    unwritten: deque[tuple[Place, dict[str, Any], Future[Path]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as writer:
        while (engine.waiting or engine.running) and not stopping():
            for end in engine.step():
                place = homes[end.request.id]
                if isinstance(end, Failure):
                    yield Outcome(place, error=end.error)
                else:
                    unwritten.append((place, end.record, writer.submit(_save, end, place, overwrite)))
            # a whole batch may end at once, and the next must not wait for its files
            yield from _written(unwritten, max(UNWRITTEN, engine.planner.max_batch_size))
        yield from _written(unwritten, 0)


def _save(video: Video, place: Place, overwrite: bool) -> Path:
    try:
        return video.save(place.path, overwrite=overwrite)
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    log.warning("out of memory in writing %s: tried again after memory was freed", place.path)
    return video.save(place.path, overwrite=overwrite)


def _written(unwritten: deque[tuple[Place, dict[str, Any], Future[Path]]], leave: int) -> Iterator[Outcome]:
    """What the writer is through with; waits for it only while more than `leave` are open."""
    while unwritten and (unwritten[0][2].done() or len(unwritten) > leave):
        place, record, future = unwritten.popleft()
        error = future.exception()
        yield Outcome(place, error=error) if error else Outcome(place, record)
