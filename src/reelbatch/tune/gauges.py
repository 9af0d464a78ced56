"""What can be read of a machine while it works: energy, other programs, matrix rate, floating point operations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# -- energy ----------------------------------------------------------------------------------------


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """A function that gives joules since some moment, or None where the device does not measure them."""
    return _cuda_joules(device) if device.type == "cuda" else _cpu_joules()


def _cuda_joules(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, an old device
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def _cpu_joules(root: Path = Path("/sys/class/powercap")) -> Callable[[], float] | None:
    """All processor packages (Intel's and AMD's RAPL as Linux shows it); wraps of the counters are undone."""
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


# -- neighbours ------------------------------------------------------------------------------------


class Neighbours:
    """Other programs: processor cores that they have used since this object was created, on average."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started, self._before = time.perf_counter(), self._seconds()

    def cores(self) -> float:
        wall = time.perf_counter() - self._started
        return max(self._seconds() - self._before, 0.0) / wall if wall else 0.0

    def _seconds(self) -> float:
        """Processor time of all programs, less our own."""
        times = psutil.cpu_times()._asdict()
        idle = {"idle", "iowait", "guest", "guest_nice"}  # guests are counted as user time already
        own = self._process.cpu_times()
        return float(sum(value for name, value in times.items() if name not in idle)) - own.user - own.system


# -- arithmetic ------------------------------------------------------------------------------------


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of the best of many products of two square matrices: what the device can do."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b}, num_threads=torch.get_num_threads())
    return float(2 * size**3 / min(timer.blocked_autorange(min_run_time=seconds).times))


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


@contextlib.contextmanager
def counting(networks: Iterable[nn.Module]) -> Iterator[Callable[[], int]]:
    """Gives a function that returns the FLOPs that ran inside these networks (matrix products, attention,
    convolutions)."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not in PyTorch's own table
    counter = FlopCounterMode(display=False, custom_mapping={cpu: _cpu_attention})
    names = {type(network).__name__ for network in networks}
    with counter:
        yield lambda: sum(sum(counter.get_flop_counts().get(name, {}).values()) for name in names)
