"""A cache for functions that return tensors, which keeps nothing that was computed on fake tensors.

Estimates of memory run the real networks on fake tensors, which have shapes and no values (`memory/estimate.py`). What is
cached meanwhile would reach real work later, so such calls go past the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_fake_tensors() -> bool:
    """Whether the calling thread works on fake tensors: modes belong to a thread, so others are not affected."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class Cached(Generic[P, R]):
    """`functools.lru_cache` around a function, except on fake tensors."""

    def __init__(self, function: Callable[P, R], maxsize: int) -> None:
        self._function, self._kept = function, lru_cache(maxsize)(function)
        self.cache_clear, self.cache_info = self._kept.cache_clear, self._kept.cache_info
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if on_fake_tensors():
            return self._function(*args, **kwargs)
        result: R = self._kept(*args, **kwargs)  # type: ignore[arg-type]  # lru_cache takes hashable arguments
        return result


def cached(maxsize: int) -> Callable[[Callable[P, R]], Cached[P, R]]:
    """Decorator: keeps the results of the last `maxsize` different calls."""
    return lambda function: Cached(function, maxsize)
