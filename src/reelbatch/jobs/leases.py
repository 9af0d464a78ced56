"""Leases: which processes have lost what they had claimed.

A process of this machine that ended is seen at once. Any other, also one of this machine that was stopped or hangs, has
lost its rows when its counter stood still for the lease. The observer's own monotonic clock counts, and only while the
observer looks, so neither a clock that is set nor an observer that was itself stopped takes anybody for dead.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

from reelbatch.jobs.processes import host, runs
from reelbatch.jobs.schema import ProcessRow

LEASE_SECONDS = 60.0
"""A process whose counter stands still for so long has lost what it had claimed."""

End = Literal["died", "silent"]
"""How a process lost its rows: it ended; or it runs on this machine, but does not work."""


class _Watched(NamedTuple):
    beat: int
    looked: float
    still: float  # seconds for which the counter was seen to stand still


class Leases:
    """What one observer has seen of the processes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._watched: dict[str, _Watched] = {}

    def end(self, process: ProcessRow) -> End | None:
        """How a process lost its rows; None: it holds them."""
        here = process.host == host()
        if here and not runs(process.pid, process.born):
            return "died"
        if not self._ran_out(process):
            return None
        return "silent" if here else "died"  # elsewhere it cannot be known; there, few processes are stopped

    def _ran_out(self, process: ProcessRow) -> bool:
        now = time.monotonic()
        before = self._watched.get(process.id)
        if before is None or before.beat != process.beat:
            self._watched[process.id] = _Watched(process.beat, now, 0.0)
            return False
        # A long pause between two looks is the observer's own: it waited for a lock, or was stopped together with all.
        still = before.still + min(now - before.looked, self.seconds * 2 / 3)
        self._watched[process.id] = _Watched(process.beat, now, still)
        return still > self.seconds
