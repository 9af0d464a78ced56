"""How a process is identified: on this machine, and whether it still runs."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil


def host() -> str:
    """A name of this machine and, in a container, of its own numbering of processes."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _process_namespace):
        try:
            parts.append(read())
        except OSError:
            continue
    return "/".join(parts)


def _process_namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)


def runs(pid: int, born: float) -> bool:
    """Whether the process of this number that was born then still runs; True where it cannot be known."""
    try:
        return abs(born_at(pid) - born) < 1 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def born_at(pid: int) -> float:
    """Tells a process from a later one of the same number: clock ticks since the machine started, which setting the
    clock does not change; where they cannot be read, its time of creation."""
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return float(psutil.Process(pid).create_time())


def that_opened(path: Path) -> str:
    """The other processes that have a file open, for the end of a message: who holds a lock is one of them. Empty where
    none is seen."""
    seen = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(file.path == str(path) for file in process.open_files()):
                seen.append(f"process {process.pid} ({process.status()})")
    return f"; it is open in {', '.join(seen)}" if seen else ""
