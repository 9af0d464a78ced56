"""What a run shows while it goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from reelbatch.engine import events
from reelbatch.request import VideoRequest
from reelbatch.wording import duration, shorten

if TYPE_CHECKING:
    from reelbatch.jobs.worker import Outcome


class Display(Protocol):
    """What `generate` shows as it goes."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def event(self, event: events.Event) -> None:
        """Something happened in the engine; what is shown follows a request's progress."""

    def outcome(self, outcome: Outcome) -> None:
        """A request ended."""


def display(requests: Sequence[VideoRequest], console: Console) -> Display:
    """Bars where the console is a terminal, lines where it is not."""
    return Bars(requests, console) if console.is_terminal else Lines(requests, console)


class Bars:
    """A bar for the run, and one for each running video with its steps, seconds a step and time left."""

    def __init__(self, requests: Sequence[VideoRequest], console: Console) -> None:
        self._requests = {request.id: request for request in requests}
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),  # a prompt may hold brackets
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._estimate = Estimate(requests)
        self._run = self._bars.add_task("videos", total=len(requests), pace="")

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def event(self, event: events.Event) -> None:
        if isinstance(event, events.Progress):
            self._progress(event)

    def _progress(self, progress: events.Progress) -> None:
        self._estimate.progress(progress)
        left = self._estimate.seconds_left()
        self._bars.update(self._run, pace="" if left is None else f"about {duration(left)} left")
        if progress.phase in ("done", "failed", "cancelled"):
            if progress.id in self._tasks:
                self._bars.remove_task(self._tasks.pop(progress.id))
            return
        if progress.id not in self._tasks:
            description = f"  {shorten(self._requests[progress.id].prompt, 40)}"
            self._tasks[progress.id] = self._bars.add_task(description, total=progress.steps, pace="")
        pace = progress.phase if progress.seconds_per_step is None else f"{progress.seconds_per_step:.2f} s/step"
        self._bars.update(self._tasks[progress.id], completed=progress.step, pace=pace)

    def outcome(self, outcome: Outcome) -> None:
        self._bars.advance(self._run)
        if outcome.error is not None:
            self._bars.console.print(f"failed: {outcome.request.prompt!r}: {outcome.error}", markup=False)


class Lines:
    """A line a video, for logs."""

    def __init__(self, requests: Sequence[VideoRequest], console: Console) -> None:
        self._console, self._count, self._ended = console, len(requests), 0
        self._estimate = Estimate(requests)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def event(self, event: events.Event) -> None:
        if isinstance(event, events.Progress):
            self._estimate.progress(event)

    def outcome(self, outcome: Outcome) -> None:
        self._ended += 1
        left = self._estimate.seconds_left()
        head = f"{self._ended}/{self._count}"
        tail = f" (about {duration(left)} left)" if left and self._ended < self._count else ""
        result = outcome.path if outcome.error is None else f"failed: {outcome.error}"
        line = f"{head} {shorten(outcome.request.prompt, 60)} -> {result}{tail}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Estimate:
    """The time left, from the work that is done and the time it took."""

    def __init__(self, requests: Sequence[VideoRequest]) -> None:
        self._work = {request.id: request.work for request in requests}
        self._done: dict[str, float] = {}
        self._started: float | None = None

    def progress(self, progress: events.Progress) -> None:
        if self._started is None:
            self._started = time.monotonic()
        share = 1.0 if progress.phase in ("done", "failed", "cancelled") else progress.step / progress.steps
        self._done[progress.id] = self._work.get(progress.id, 0) * share

    def seconds_left(self) -> float | None:
        """None before anything is done."""
        done, total = sum(self._done.values()), sum(self._work.values())
        if self._started is None or not done:
            return None
        return (time.monotonic() - self._started) * (total - done) / done
