"""Scheduler: who waits, who shares the next step, who has ended. The only place where a request changes its state.

A request is at every moment in exactly one state, whatever raises: a change is one assignment, once its cause has
succeeded. Requests may be added and cancelled from any thread; all else is the engine's own thread's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from reelbatch.device import is_out_of_memory
from reelbatch.engine.results import Cancelled, Failure
from reelbatch.engine.sample import Sample, SavedState
from reelbatch.request import VideoRequest
from reelbatch.video import Video


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DECODING = "decoding"
    ENDED = "ended"


OPEN = (State.WAITING, State.RUNNING, State.DECODING)


@dataclass(frozen=True)
class Entry:
    """A request and where it stands.

    Attributes:
        saved: while it waits: where an earlier run of it stopped.
        alone: while it waits: whether it ran out of memory beside others, and starts when none runs.
        sample: while it runs or is decoded.
        result: when it has ended.
    """

    request: VideoRequest
    state: State = State.WAITING
    saved: SavedState | None = None
    alone: bool = False
    sample: Sample | None = None
    result: Video | Failure | None = None


class Scheduler:
    """First come, first served: nobody overtakes, and whoever runs, runs at every step until it is done."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._cancelled: set[str] = set()

    # -- from any thread ---------------------------------------------------------------------------

    def add(self, requests: Sequence[VideoRequest], saved: SavedState | None = None) -> None:
        """Puts requests in line, all or none.

        Raises:
            ValueError: for an id that another request here has.
        """
        with self._lock:
            ids = [request.id for request in requests]
            for number, id in enumerate(ids):
                if id in self._entries or id in ids[:number]:
                    raise ValueError(f"id is {id!r}, which another request in line has; ids must differ.")
            self._entries.update({request.id: Entry(request, saved=saved) for request in requests})

    def cancel(self, id: str) -> None:
        """Ends a request before its next step. One that is not here, or has ended, is left alone."""
        with self._lock:
            if id in self._entries and self._entries[id].state != State.ENDED:
                self._cancelled.add(id)

    def get(self, id: str) -> Entry | None:
        with self._lock:
            return self._entries.get(id)

    def entries(self, *states: State) -> list[Entry]:
        """In the order in which they came."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.state in states]

    def samples(self, state: State) -> list[Sample]:
        return [entry.sample for entry in self.entries(state) if entry.sample is not None]

    @property
    def busy(self) -> bool:
        """Whether a request is here whose result was not handed out."""
        return bool(self.entries(*State))

    # -- changes -----------------------------------------------------------------------------------

    def take_cancelled(self) -> list[Failure]:
        """Ends those that were cancelled, in whatever state they are."""
        with self._lock:
            open_ = [self._entries[id] for id in self._cancelled if id in self._entries]
            failures = [
                Failure(entry.request, Cancelled("cancelled by request"), cancelled=True)
                for entry in open_
                if entry.state != State.ENDED
            ]
            self._put(*(self._ended(failure.request.id, failure) for failure in failures))
            self._cancelled.clear()
        return failures

    def started(self, sample: Sample) -> None:
        self._put(replace(self._entries[sample.id], state=State.RUNNING, sample=sample, saved=None, alone=False))

    def set_back(self, id: str) -> None:
        """Lets a request wait until none runs, since it ran out of memory beside others; it goes on where it stood."""
        entry = self._entries[id]
        saved = entry.saved if entry.sample is None else entry.sample.save()
        self._put(replace(entry, state=State.WAITING, sample=None, saved=saved, alone=True))

    def stepped(self, batch: Sequence[Sample], outcomes: Sequence[Sample | Exception]) -> list[Failure]:
        """Takes over what a step gave; returns those that failed in it. What ran out of memory beside others waits
        until it can be alone."""
        changed: list[Entry] = []
        failures: list[Failure] = []
        for before, outcome in zip(batch, outcomes, strict=True):
            entry = self._entries[before.id]
            if isinstance(outcome, Sample):
                state = State.DECODING if outcome.done else State.RUNNING
                changed.append(replace(entry, state=state, sample=outcome))
            elif is_out_of_memory(outcome) and len(batch) > 1:
                changed.append(replace(entry, state=State.WAITING, sample=None, saved=before.save(), alone=True))
            else:
                failures.append(Failure(entry.request, outcome))
                changed.append(self._ended(before.id, failures[-1]))
        self._put(*changed)
        return failures

    def ended(self, result: Video | Failure) -> None:
        self._put(self._ended(result.request.id, result))

    def take(self, ids: Iterable[str] | None = None) -> list[Video | Failure]:
        """Hands out results, those of all or of these requests. They are not held here any longer."""
        with self._lock:
            wanted = None if ids is None else set(ids)
            ended = [entry for entry in self.entries(State.ENDED) if wanted is None or entry.request.id in wanted]
            results = [entry.result for entry in ended if entry.result is not None]
            taken = {result.request.id for result in results}
            self._cancelled -= taken  # a request of the same id that comes later is another one
            self._entries = {id: entry for id, entry in self._entries.items() if id not in taken}
        return results

    def _ended(self, id: str, result: Video | Failure) -> Entry:
        return replace(self._entries[id], state=State.ENDED, sample=None, saved=None, result=result)

    def _put(self, *entries: Entry) -> None:
        with self._lock:
            self._entries.update({entry.request.id: entry for entry in entries})
