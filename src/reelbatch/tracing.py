"""How much memory some work takes: it runs on fake tensors, and the bytes alive at its worst moment are counted.

Fake tensors have a shape, a dtype and a device, and no memory. The networks' own code runs on them, so what is counted
is what that code does, whichever network it is. Networks of many equal parts say so (`run_block`, `run_tile`), so that
a trace runs one of them; functions that keep tensors are `cached`, so that no fake tensor outlives its trace.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Hashable
from functools import cache, lru_cache, partial, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

P = ParamSpec("P")
R = TypeVar("R")

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""The mode of all fake tensors here, as those of one mode do not mix with another's."""
LOCK = threading.Lock()
"""Held while `FAKE` is entered: modes belong to a thread, but this one keeps state while an operator runs."""
CONV_BLOCK = 16
"""Channels that oneDNN lays side by side; their number is rounded up to a multiple of it."""


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors created by `work` take at once.

    What was there before (weights, inputs) does not count and is not changed. Views count once, with their storage.
    What an operator takes besides its result counts for convolutions, where it is large; elsewhere not.

    Args:
        work: runs without gradients. Where it reads a tensor's values, it gets True or 1.
        device: what the work is for; the tensors may be on the CPU where it is not here.
    """
    with LOCK, FAKE, _Trace(on_cpu=device.type == "cpu") as trace, torch.no_grad():
        _thread.trace = trace
        try:
            work()
        finally:
            _thread.trace = None
        return trace.peak


class _Trace(TorchDispatchMode):
    """Counts the storages of the tensors that operators return, until they are freed."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.live = self.peak = 0
        self.results: dict[Hashable, Any] = {}
        """Results of cached functions and of parts that were run, for as long as this trace."""
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._input, (args, kwargs or {}))
        convolution: Any = args[:2] if func is torch.ops.aten.convolution.default else None
        if func is torch.ops.aten.mkldnn_convolution.default:  # has no kernel for fake tensors
            convolution, (padding, stride, dilation, groups) = args[:2], args[3:]
            func = partial(torch.ops.aten.convolution.default, *args[:3], stride, padding, dilation, False)
            args = ([0] * len(stride), groups)
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:  # `.item()`, `bool(tensor)`, `torch.equal`
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else True if dtype == torch.bool else 1
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, leaf.untyped_storage().nbytes())
        if convolution:
            self.peak = max(
                self.peak, self.live + _convolution_bytes(result, convolution[0], convolution[1], self.on_cpu)
            )
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

    def run(self, key: Hashable, call: Callable[[], R], again: Callable[[Any], R]) -> R:
        """`call()` the first time; for an equal key later, its peak is taken to be there again and `again` gives the
        result, from the first one's shapes."""
        if key in self.results:
            extra, shapes = self.results[key]
            self.peak = max(self.peak, self.live + extra)
            return again(shapes)
        before, highest, self.peak = self.live, self.peak, self.live
        result = call()
        shapes = [(leaf.shape, leaf.dtype, leaf.device) for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
        self.results[key] = self.peak - before, shapes
        self.peak = max(self.peak, highest)
        return result


class _Thread(threading.local):
    trace: _Trace | None = None


_thread = _Thread()


def _convolution_bytes(result: Tensor, images: Tensor, weight: Tensor, on_cpu: bool) -> int:
    """What a convolution takes besides input and result.

    oneDNN computes in blocks of channels: it copies the input into that layout, and then its result out of it. For
    dtypes that it does not compute in, PyTorch writes out every window of the input. A GPU's workspace is taken to be
    as large as oneDNN's copies; it was not measured.
    """
    if on_cpu and not _onednn_computes(result.dtype):
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


# -- what networks say to a trace ------------------------------------------------------------------


def tracing() -> bool:
    """Whether the calling thread traces."""
    return _thread.trace is not None


def run_block(block: nn.Module, packs: list[R]) -> list[R]:
    """`block(packs)`, for blocks whose output takes as much as their input. A trace runs one of equal ones."""
    if _thread.trace is None:
        return block(packs)
    alike = type(block), tuple((name, weight.shape, weight.dtype) for name, weight in block.named_parameters())
    return _thread.trace.run(alike, lambda: block(packs), lambda _: packs)


def run_tile(kind: str, network: Callable[[Tensor], Tensor], tile: Tensor) -> Tensor:
    """`network(tile)`. A trace runs one of the tiles of each kind and shape."""
    if _thread.trace is None:
        return network(tile)
    return _thread.trace.run((kind, tile.shape, tile.dtype), lambda: network(tile), _empty)


def _empty(shapes: list[tuple[torch.Size, torch.dtype, torch.device]]) -> Tensor:
    ((shape, dtype, device),) = shapes
    return torch.empty(shape, dtype=dtype, device=device)


class Cached(Generic[P, R]):
    """`functools.lru_cache` around a function, and one of its own for each trace."""

    def __init__(self, function: Callable[P, R], maxsize: int) -> None:
        self._function, self._kept = function, lru_cache(maxsize)(function)
        self.cache_clear, self.cache_info = self._kept.cache_clear, self._kept.cache_info
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if _thread.trace is None:
            return self._kept(*args, **kwargs)  # type: ignore[arg-type]  # its arguments can be hashed
        results, key = _thread.trace.results, (self, args, tuple(kwargs.items()))
        if key not in results:
            results[key] = self._function(*args, **kwargs)
        return results[key]


def cached(maxsize: int) -> Callable[[Callable[P, R]], Cached[P, R]]:
    """Decorator: keeps the results of the last `maxsize` different calls."""
    return lambda function: Cached(function, maxsize)
