"""Instruments that tests share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns while it is entered; views count as what they show."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors alive, at the moment at which they are most, while it is entered.

    Args:
        besides: tensors that do not count, such as weights.
    """

    def __init__(self, besides: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.uncounted = [StorageWeakRef(tensor.untyped_storage()) for tensor in besides]
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def besides(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        """Bytes that an operation takes while it runs, besides its arguments and its result."""
        return 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.live = {key: found for key, found in self.live.items() if not found[0].expired()}
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if all(reference.cdata != known.cdata for known in self.uncounted):
                    self.live.setdefault(reference.cdata, (reference, storage.nbytes()))
        now = sum(size for _, size in self.live.values())
        self.peak = max(self.peak, now + self.besides(func, args, result))
        return result
