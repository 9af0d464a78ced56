"""Measures one batch: the engine runs it and reports what it does; its events are timed and added up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from reelbatch.device import free_memory, is_out_of_memory
from reelbatch.engine.config import EngineConfig
from reelbatch.engine.engine import Engine
from reelbatch.engine.events import Event, FellBack, Progress, Worked
from reelbatch.engine.planner import Isolation
from reelbatch.loading.model import Model
from reelbatch.memory.gauge import Memory
from reelbatch.models.family import PHASES, Phase
from reelbatch.request import VideoRequest
from reelbatch.video import Video


class Stopped(Exception):
    """A person asked to stop."""


class DoesNotFit(Exception):
    """A batch that ran out of memory, or that the engine had to divide."""


@dataclass
class RunTrace:
    """What one run showed.

    Attributes:
        seconds: of the whole run. text: of encoding all prompts.
        steps: seconds of each step of the whole batch. decodes: of each video, by id.
        first, last: seconds from the start until the first and the last video was decoded (0 if none was).
        peaks: of each phase, in bytes above what was held before the run; 0 without a gauge.
        largest: videos that shared a step at most.
        joules: energy of the run.
    """

    seconds: float = 0.0
    text: float = 0.0
    steps: list[float] = field(default_factory=list)
    decodes: dict[str, float] = field(default_factory=dict)
    first: float = 0.0
    last: float = 0.0
    peaks: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    largest: int = 0
    joules: float | None = None
    videos: dict[str, Video] = field(default_factory=dict)

    def add(self, work: Worked, held: int) -> None:
        """Counts work in; `held`: bytes in use before the run."""
        if work.phase == "text":
            self.text += work.seconds
        elif work.phase == "step":
            self.steps.append(work.seconds)
            self.largest = max(self.largest, len(work.ids))
        else:
            self.decodes |= dict.fromkeys(work.ids, work.seconds)
        if work.peak_bytes is not None:
            self.peaks[work.phase] = max(self.peaks[work.phase], work.peak_bytes - held)


def observe(
    model: Model,
    requests: Sequence[VideoRequest],
    isolation: Isolation,
    batch: int,
    config: EngineConfig = EngineConfig(),  # noqa: B008  (frozen)
    only_steps: int | None = None,
    gauge: Memory | None = None,
    joules: Callable[[], float] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> RunTrace:
    """Runs requests in batches of `batch`, every prompt encoded anew.

    Args:
        config: of the engine, besides isolation and batch size.
        only_steps: leave the run after so many steps, undecoded; None runs to the end.
        gauge: if given, the peak of each phase is taken, which costs time of its own.
        joules: energy so far.
        stopping: asked before each step.

    Raises:
        Stopped: as soon as `stopping` returns True.
        DoesNotFit: if memory ran out, or if fewer than `batch` samples went through a step together.
        Exception: whatever else a request failed with.
    """
    model.family.forget()
    config = replace(config, isolation=isolation, max_batch_size=batch, keep_latents=True, decode_beside=0)
    engine, trace, divided = Engine(model, config, gauge=gauge), RunTrace(), list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, Worked):
            trace.add(event, held)
            if event.calls > 1:
                divided.insert(0, f"memory ran out, and the engine did a step in {event.calls} parts")
        elif isinstance(event, FellBack):
            divided.append(f"memory ran out in {event.what}, which was tried again {event.how}")
        elif isinstance(event, Progress) and event.phase == "done":
            trace.last = time.perf_counter() - started
            trace.first = trace.first or trace.last

    engine.subscribe(listen)
    for request in requests:
        engine.submit(request)
    held = 0
    if gauge is not None:
        free_memory(whole=True)
        held = gauge.used()
    energy = joules() if joules else 0.0
    started = time.perf_counter()
    while engine.busy and (only_steps is None or len(trace.steps) < only_steps):
        if stopping():
            raise Stopped
        for result in engine.step():
            if isinstance(result, Video):
                trace.videos[result.request.id] = result
            elif is_out_of_memory(result.error):
                raise DoesNotFit(str(result.error))
            else:
                raise result.error
        if divided:
            raise DoesNotFit(divided[0])
    trace.seconds = time.perf_counter() - started
    if joules:
        trace.joules = joules() - energy
    if trace.largest < min(batch, len(requests)):
        raise DoesNotFit(f"the engine let only {trace.largest} of {batch} videos share a step")
    return trace


def write_seconds(video: Video) -> float:
    """What it takes to write a video's file."""
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        video.save(Path(folder, "video.mp4"))
        return time.perf_counter() - started
