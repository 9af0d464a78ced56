"""Admission: from a request in line to a sample that runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from reelbatch.device import is_out_of_memory, log
from reelbatch.engine.events import Event, Progress
from reelbatch.engine.fallback import Fallback
from reelbatch.engine.limit import MemoryLimit
from reelbatch.engine.results import Failure, end_of
from reelbatch.engine.sample import Sample
from reelbatch.engine.scheduler import Scheduler, State
from reelbatch.request import VideoRequest

TEXT_WINDOW = 16
"""Requests in line that are encoded while the text encoders are on the device, where they come and go."""


class Admission:
    """Lets requests join between two steps: first come, first served, while there is room."""

    def __init__(self, scheduler: Scheduler, fallback: Fallback, limit: MemoryLimit | None) -> None:
        self.scheduler, self.fallback, self.limit = scheduler, fallback, limit
        self.model = fallback.runner.model

    def admit(self, hold: bool) -> Iterator[Event]:
        """Starts who has room, and gives what happens, each event after its change of state.

        Args:
            hold: whether nobody may join now.
        """
        for entry in [] if hold else self.scheduler.entries(State.WAITING):
            request, running = entry.request, self.scheduler.samples(State.RUNNING)
            refused = self._refusal(request)
            if refused is None and ((entry.alone and running) or not self._has_room_for(request, running)):
                break
            yield Progress(request.id, "text", 0, request.steps or 1)
            if refused is not None:
                failure = Failure(request, refused)
                self.scheduler.ended(failure)
                yield end_of(failure)
                continue
            try:
                sample, events = self.fallback.start(request, entry.saved)
            except Exception as error:
                if is_out_of_memory(error) and running:
                    log.warning("out of memory in the text of %s: it waits until no other video runs", request.id)
                    self.scheduler.set_back(request.id)
                    break
                failure = Failure(request, error)
                self.scheduler.ended(failure)
                yield end_of(failure)
            else:
                self.scheduler.started(sample)
                yield from events
        self._encode_ahead()

    def _refusal(self, request: VideoRequest) -> Exception | None:
        """Why it cannot be made, whoever else runs."""
        try:
            return None if self.limit is None else self.limit.refusal(request)
        except Exception as error:
            return error

    def _has_room_for(self, request: VideoRequest, running: Sequence[Sample]) -> bool:
        """Whether it may join those that run; its text counts at its longest, as it is not encoded yet."""
        if not self.fallback.planner.admits(sum(self.model.family.rows(request)), running):
            return False
        return self.limit is None or self.limit.admits([sample.request for sample in running], request)

    def _encode_ahead(self) -> None:
        """Where the text encoders come and go: the next in line too while they are here, one by one."""
        if self.model.placement.here != "text":
            return
        for entry in islice(self.scheduler.entries(State.WAITING), TEXT_WINDOW):
            try:
                self.model.family.encode(entry.request)
            except Exception as error:  # is met again, and reported, when it is this request's turn
                if is_out_of_memory(error):
                    break


def as_requests(given: VideoRequest | str | Iterable[VideoRequest | str]) -> list[VideoRequest]:
    """Requests of requests, of prompts, or of one of them.

    Raises:
        TypeError: for what is neither, saying what it is.
        ValueError: for two of one id.
    """
    items = [given] if isinstance(given, VideoRequest | str) else list(given)
    for number, item in enumerate(items, 1):
        if not isinstance(item, VideoRequest | str):
            raise TypeError(
                f"generate takes VideoRequests, or prompts as text; number {number} is a {type(item).__name__}: "
                "VideoRequest(prompt=..., ...) makes a request."
            )
    requests = [VideoRequest(prompt=item) if isinstance(item, str) else item for item in items]
    ids = [request.id for request in requests]
    twice = next((id for number, id in enumerate(ids) if id in ids[:number]), None)
    if twice is not None:
        raise ValueError(f"id is {twice!r} in two of these requests; ids must differ (request.copies(n) makes some).")
    return requests
