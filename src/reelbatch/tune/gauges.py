"""What a machine tells of itself while it works: memory, energy, matrix rate, floating point operations."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from reelbatch.device import device_memory_bytes, trim_heap

SPARE = 0.95
"""The share of the free memory that measuring may take."""

# -- memory ----------------------------------------------------------------------------------------


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


def tidy(device: torch.device) -> None:
    """Gives back what is free, so that the next peak is that of the next work alone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def weight_bytes(*modules: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for m in modules for t in [*m.parameters(), *m.buffers()])


# -- energy ----------------------------------------------------------------------------------------


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """A function that gives joules since some moment, or None where the device does not tell."""
    return _cuda_joules(device) if device.type == "cuda" else _cpu_joules()


def _cuda_joules(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, an old device: then it is not told
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def _cpu_joules(root: Path = Path("/sys/class/powercap")) -> Callable[[], float] | None:
    """Of all processor packages (Intel's and AMD's RAPL as Linux shows it); wraps of the counters are undone."""
    packages = sorted(root.glob("intel-rapl:[0-9]")) if root.is_dir() else []
    try:
        ranges = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        last = [int((package / "energy_uj").read_text()) for package in packages]
    except (OSError, ValueError):  # readable for the administrator only, mostly
        return None
    if not packages:
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for i, package in enumerate(packages):
            now = int((package / "energy_uj").read_text())
            total += (now - last[i]) % (ranges[i] + 1)
            last[i] = now
        return total / 1e6

    return joules


# -- the neighbours --------------------------------------------------------------------------------


class Others:
    """Processor cores that other programs have used since this was made, on average."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started, self._before = time.perf_counter(), self._seconds()

    def cores(self) -> float:
        wall = time.perf_counter() - self._started
        return max(self._seconds() - self._before, 0.0) / wall if wall else 0.0

    def _seconds(self) -> float:
        """Of all processors at work, less our own."""
        times = psutil.cpu_times()._asdict()
        idle = {"idle", "iowait", "guest", "guest_nice"}  # guests are counted as user time already
        own = self._process.cpu_times()
        return float(sum(value for name, value in times.items() if name not in idle)) - own.user - own.system


# -- arithmetic ------------------------------------------------------------------------------------


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of the best of many products of two square matrices: what the device can do."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> float:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    product()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, product())
    return 2 * size**3 / best


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


@contextlib.contextmanager
def counting(module: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Gives a function that says how many FLOPs ran inside `module` (matrix products, attention, convolutions)."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not in PyTorch's own table
    counter = FlopCounterMode(display=False, custom_mapping={cpu: _cpu_attention})
    name = type(module).__name__
    with counter:
        yield lambda: int(sum(counter.get_flop_counts().get(name, {}).values()))
