"""Running out of memory: how it is recognised, what is freed, and how it is told."""

from __future__ import annotations

import errno
import gc
import logging
import re

import torch

log = logging.getLogger("reelbatch")

_TOLD = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|could not create a primitive$",
    re.IGNORECASE,
)
"""The last is oneDNN's, which has no memory for its workspace."""


class OutOfMemory(MemoryError):
    """A request for which there is not enough memory, whatever was tried; says what it needed and what there was."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's refusal: of the device, of PyTorch's CPU allocator, or of the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _TOLD.search(str(error)) is not None


def free_memory() -> None:
    """Gives back what nobody holds any more: a failed step's activations, and the device allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
