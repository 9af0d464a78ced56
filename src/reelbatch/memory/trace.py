"""How much memory some work takes: it runs on fake tensors, and the bytes alive at its worst moment are counted.

Fake tensors have a shape, a dtype and a device, and no memory. The networks' own code runs on them, so what is counted is
what that code does, whichever network it is.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""The mode of all fake tensors here, as those of one mode do not mix with another's."""
LOCK = threading.RLock()
"""Held while `FAKE` is entered: modes belong to a thread, but this one keeps state while an operator runs."""
CONV_BLOCK = 16
"""Channels that oneDNN lays side by side; their number is rounded up to a multiple of it."""


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors created by `work` take at once.

    What was there before (weights, inputs) does not count and is not changed. Views count once, with their storage. What
    an operator takes besides its result counts for convolutions on the CPU, where it is large; elsewhere not.

    Args:
        work: runs without gradients. Where it reads a tensor's values, it gets True or 1.
    """
    with LOCK, FAKE, _LiveBytes() as live, torch.no_grad():
        work()
        return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the storages of the tensors that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._input, (args, kwargs or {}))
        convolution = func is torch.ops.aten.convolution.default
        if func is torch.ops.aten.mkldnn_convolution.default:  # has no kernel for fake tensors
            convolution, (padding, stride, dilation, groups) = True, args[3:]
            call = partial(torch.ops.aten.convolution.default, *args[:3], stride, padding, dilation, False)
            func, args, kwargs = call, ([0] * len(stride), groups), {}
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:  # `.item()`, `bool(tensor)`, `torch.equal`
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else True if dtype == torch.bool else 1
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, leaf.untyped_storage().nbytes())
        if convolution:
            self.peak = max(self.peak, self.live + _convolution_bytes(result, *getattr(func, "args", args)[:2]))
        return result

    def _input(self, tensor: Tensor) -> Tensor:
        """A fake tensor in a real one's place. What was not created here does not count."""
        fake = tensor if isinstance(tensor, FakeTensor) else FAKE.from_tensor(tensor)
        self._add(fake, 0)
        return fake

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _convolution_bytes(result: Tensor, images: Tensor, weight: Tensor) -> int:
    """What a convolution on the CPU takes besides input and result.

    oneDNN computes in blocks of channels: it copies the input into that layout, and then its result out of it. For dtypes
    that it does not compute in, PyTorch writes out every window of the input.
    """
    if result.device.type != "cpu":
        return 0
    if not _onednn_computes(result.dtype):
        return result.numel() // result.shape[1] * math.prod(weight.shape[1:]) * result.element_size()
    blocked = result.nbytes // result.shape[1] * math.ceil(result.shape[1] / CONV_BLOCK) * CONV_BLOCK
    reordered = images.nbytes if images.shape[1] >= CONV_BLOCK else 0
    return max(reordered, result.nbytes) + blocked - result.nbytes


@cache
def _onednn_computes(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
