"""What happened, as data. Events are published between changes of state, so a listener that raises loses nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from reelbatch.models.family import Phase

Stage = Literal["text", "denoise", "decode", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """Where one request stands. `seconds_per_step` is that of its last step, None before the first."""

    id: str
    phase: Stage
    step: int
    steps: int
    seconds_per_step: float | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Worked:
    """Work that was done.

    Attributes:
        phase: its kind. ids: of the requests that it was for.
        seconds: that it took.
        calls: forwards that a step was done in: more than one where memory ran out.
        peak_bytes: the most memory in use meanwhile, if the engine has a gauge.
    """

    phase: Phase
    ids: tuple[str, ...]
    seconds: float
    calls: int = 1
    peak_bytes: int | None = None


@dataclass(frozen=True)
class FellBack:
    """Memory ran out, and the work was tried again with a fallback.

    Attributes:
        what: the work. how: the fallback, as the end of "tried again …".
    """

    what: str
    how: str


Event = Progress | Worked | FellBack


class Publisher:
    """Gives events to those who listen, each event once to each. Where one raises, the others see the event, and all
    see those behind it, at the next call."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Event], None]] = []
        self._events: deque[Event] = deque()
        self._calls = 0
        """Of the first event, with those that raised."""

    def publish(self, events: Iterable[Event], on_progress: Callable[[Progress], None] | None) -> None:
        self._events.extend(events)

        def progress(event: Event) -> None:
            if on_progress is not None and isinstance(event, Progress):
                on_progress(event)

        while self._events:
            listeners = [progress, *self.listeners]
            while self._calls < len(listeners):
                self._calls += 1
                listeners[self._calls - 1](self._events[0])
            self._events.popleft()
            self._calls = 0
