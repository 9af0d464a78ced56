"""Gauges: how much memory is in use, and the most that was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil
import torch

from reelbatch.device import device_memory_bytes

SPARE = 0.95
"""The share of the free memory that measuring may take."""


class Memory(Protocol):
    """Bytes of the device's allocator, or of the process where the CPU computes."""

    what: str

    def used(self) -> int: ...

    def reset(self) -> None:
        """Forgets the peak so far."""

    def peak(self) -> int:
        """The most that was used since `reset`."""

    def limit(self) -> int:
        """What may be used without anything being refused or killed."""


def memory_of(device: torch.device) -> Memory:
    return DeviceMemory(device) if device.type == "cuda" else ResidentMemory()


class DeviceMemory:
    """The allocator of a CUDA device."""

    what = "device allocator"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def used(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def limit(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return int((free + torch.cuda.memory_reserved(self.device)) * SPARE)


class ResidentMemory:
    """The resident set of this process: by the kernel's mark of its peak where it can be reset, else by looking."""

    what = "resident set of the process"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._watch: _Watch | None = None
        self._marks = _high_water_mark() is not None and self._cleared()

    def used(self) -> int:
        return int(self._process.memory_info().rss)

    def reset(self) -> None:
        if not (self._marks and self._cleared()):
            if self._watch is None:
                self._watch = _Watch(self.used)
            self._watch.highest = self.used()

    def peak(self) -> int:
        mark = _high_water_mark() if self._marks else None
        return max(self.used(), mark or 0, self._watch.highest if self._watch else 0)

    def limit(self) -> int:
        free = psutil.virtual_memory().available + self.used()
        return int(min(free, device_memory_bytes("cpu")) * SPARE)

    @staticmethod
    def _cleared() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or not allowed
            return False
        return True


class _Watch:
    """A thread that looks every 5 ms, for systems without a mark that can be reset."""

    def __init__(self, used: Callable[[], int]) -> None:
        self.highest = 0
        self._used = used
        threading.Thread(target=self._look, daemon=True, name="memory").start()

    def _look(self) -> None:
        while True:
            self.highest = max(self.highest, self._used())
            time.sleep(0.005)


def _high_water_mark() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
