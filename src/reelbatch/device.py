"""The device: which there is, how much memory it has, what is held, how it runs out; and where caches are kept."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
import platform
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import psutil
import torch
from platformdirs import user_cache_path

from reelbatch.wording import printable

log = logging.getLogger("reelbatch")


def _without_controls(record: logging.LogRecord) -> bool:
    """Names of files and errors may hold what a request said; a log is read in a terminal."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


log.addFilter(_without_controls)

_OUT_OF_MEMORY = re.compile(
    r"out[ _]of[ _]memory"  # CUDA, HIP, the driver, NVRTC_ERROR_OUT_OF_MEMORY
    r"|(can't|cannot) allocate memory|not enough memory"  # PyTorch's CPU allocator, mmap
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|HIPSOLVER|ROCBLAS)_STATUS_ALLOC_FAILED|miopenStatusAllocFailed"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED"  # since cuDNN 9
    # cuDNN tried every algorithm; those for which there was no workspace were passed over in silence
    r"|unable to find a valid cuDNN algorithm|was unable to find an engine to execute this computation"
    r"|could not create a primitive$",  # oneDNN, which has no memory for its workspace
    re.IGNORECASE,
)


class OutOfMemory(MemoryError):
    """A request for which there is not enough memory, whatever was tried; says what it needed and what there was."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's refusal: of the device, of PyTorch's CPU allocator, or of the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def free_memory(whole: bool = False) -> None:
    """Gives back what nobody holds any more: a failed step's activations, and what the allocators keep.

    whole: whether old objects are looked through as well, such as a model that was let go. That takes most of a second;
        an error and its frames are young.
    """
    gc.collect(2 if whole else 1)
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gibibytes(count: int) -> str:
    """A size in GiB; one that would show as next to nothing is in the unit that shows it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def choose_device(device: torch.device | str = "auto") -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        ValueError: for a device that is not there, or on which nothing here has ever run.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; give auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(chosen)!r} is not supported; give auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(chosen)!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


UNITS = {"": 1, "B": 1, **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)}}
UNITS |= {f"{k}iB": 1024**i for i, k in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 20GiB, 20GB, 20480MiB or 1.5 GiB; a bare number is bytes.

    Raises:
        ValueError: for anything else, saying how to write it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise ValueError(f"memory size {text!r} cannot be read; write it as 20GiB, 20GB or 20480MiB")
    return int(float(match[1]) * units[match[2].lower()])


def trim_heap() -> None:
    """Gives memory that was freed back to the system, where the C library is glibc: its heap keeps what lies between
    blocks in use, and cannot always use it again."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library; Windows has no library without a name
        return None
    return trim


def held_bytes(device: torch.device | str) -> int:
    """What this process holds now: on a GPU its tensors there, on the CPU its resident memory."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def device_memory_bytes(device: torch.device | str) -> int:
    """Total memory of `device`; for the CPU what this process may use, a container's limit included."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([psutil.virtual_memory().total, *_cgroup_limits()])


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterable[int]:
    """Memory limits of the process's control group and of those above it (versions 1 and 2)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = base / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(base):
                break
            try:
                value = (folder / name).read_text().strip()
            except OSError:  # the root has no limit file; in a container the path may be the host's
                continue
            if value.isdigit():  # else "max": no limit
                yield int(value)


def cache_folder() -> Path:
    """REELBATCH_CACHE, or `reelbatch` in the user's cache directory."""
    given = os.environ.get("REELBATCH_CACHE")
    return Path(given).expanduser() if given else user_cache_path("reelbatch", appauthor=False)


def processor_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def device_name(device: torch.device | str) -> str:
    """A device with what its speed depends on."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()}, {torch.get_num_threads()} threads, {capability}"


def threads_of(device: torch.device) -> int | None:
    """Threads that a CPU computes with, which changes the last bits of results; None for other devices."""
    return torch.get_num_threads() if device.type == "cpu" else None
