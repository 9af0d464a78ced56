"""The CUDA path on a machine without a GPU: tensors on a fake CUDA device, which have shapes and no values.

    with fake_cuda() as trace:
        model = weightless(lambda: Network()).to("cuda")
        model(...)
    trace.kernels, trace.waits, trace.peak_bytes

Shows tensors on the wrong device (an error of FakeTensorMode), every wait for the device (`item`, `nonzero`, copies
to and from the CPU), which operators are launched, and the peak of live tensors. Does not show numbers, speed, what a
CUDA kernel refuses, its workspace, streams or fragmentation.

PyTorch's CPU build has no device guard for CUDA, without which most operators on such tensors fail. Its own no-op
guard is registered for CUDA by a few lines of C++, compiled once a PyTorch version.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import linecache
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
PACKAGE = f"{os.sep}reelbatch{os.sep}"
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct FakeCuda final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeCuda)
}
"""
T = TypeVar("T")


def nothing(*args: Any) -> None:
    """In the place of a function that has no part in this."""


def compiler() -> str | None:
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


_LIBRARIES: list[ctypes.CDLL] = []


def register_guard() -> None:
    """Registers the guard, once a process. A CUDA build has one, also where there is no GPU."""
    if _LIBRARIES or torch.version.cuda is not None:
        return
    root = Path(torch.__file__).parent
    version = hashlib.sha256((GUARD + torch.__version__).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fake_cuda_{os.getuid()}_{version}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, part = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(GUARD)
            options = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10"]
            subprocess.run([str(compiler()), str(source), "-o", str(part), *options], check=True, capture_output=True)
            part.replace(library)
    _LIBRARIES.append(ctypes.CDLL(str(library)))


class Place(NamedTuple):
    """A line of the package."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}"


ELSEWHERE = Place("elsewhere", 0, "")


def place() -> Place:
    """The innermost line of the package that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if PACKAGE in file and "site-packages" not in file.rpartition(PACKAGE)[2]:
            line = frame.f_lineno
            return Place(file.rpartition(PACKAGE)[2], line, linecache.getline(file, line).strip())
        frame = frame.f_back
    return ELSEWHERE


VIEWS = ("detach", "lift_fresh", "alias", "_unsafe_view")
ANSWERS = {"isfinite": True, "allowed.any(-1).all()": True}
"""What a boolean that is read from the device is, by a part of the line that reads it; False else."""


class Trace(TorchDispatchMode):
    """What ran on the device.

    Attributes:
        kernels: operators that were launched, by name; views are none.
        waits: reads and copies for which the CPU waits, by kind and place.
        live, peak_bytes: bytes of the device's tensors, now and at most; `peak_at` is where.
        largest: elements of the largest tensor; `largest_of` is the operator that returned it.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[tuple[str, Place]] = Counter()
        self.live = self.peak_bytes = self.largest = 0
        self.peak_at, self.largest_of = ELSEWHERE, ""
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._paused = False
        self._read_last: int | None = None

    def reset(self) -> None:
        """Begins to count anew; what is alive stays counted."""
        self.kernels.clear()
        self.waits.clear()
        self.peak_bytes, self.largest = self.live, 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While entered, operators run and are not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def launches(self) -> int:
        return self.kernels.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in inputs)
        if func in READS:
            return self._read(func, inputs[0], on_device)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._hold(tensor, name)
        if name in ("_to_copy", "copy_"):
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            source, target = (inputs[0], outputs[0]) if name == "_to_copy" else (inputs[-1], inputs[0])
            if waits and source.device.type != target.device.type:
                self._wait(f"copy from {source.device.type} to {target.device.type}")
        on_device = on_device or any(tensor.device.type == "cuda" for tensor in outputs)
        if on_device and namespace != "prim" and not self._paused and not is_view(func, name, inputs, outputs):
            self._read_last = None
            self.kernels[name if namespace == "aten" else f"{namespace}.{name}"] += 1
        return result

    def _read(self, func: Any, tensor: Tensor, on_device: bool) -> Any:
        """A value that is not there. CPU tensors are fake too."""
        storage = tensor.untyped_storage()._cdata
        if on_device and storage != self._read_last:  # `tolist` of fake tensors reads element by element
            self._wait(func._schema.name.partition("::")[2])
        self._read_last = storage
        if func is torch.ops.aten.nonzero.default:  # as if all were set
            return torch.empty(tensor.numel(), max(tensor.ndim, 1), dtype=torch.int64, device=tensor.device)
        if func is torch.ops.aten.equal.default:
            return True
        if tensor.dtype == torch.bool:
            code = place().code
            return next((answer for part, answer in ANSWERS.items() if part in code), False)
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _wait(self, kind: str) -> None:
        if not self._paused:
            self.waits[kind, place()] += 1

    def _hold(self, tensor: Tensor, name: str) -> None:
        if tensor.device.type != "cuda":
            return
        if tensor.numel() > self.largest:
            self.largest, self.largest_of = tensor.numel(), name
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def released(_: object) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, released)
        self.live += size
        if self.live > self.peak_bytes:
            self.peak_bytes, self.peak_at = self.live, place()


READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


def is_view(func: Any, name: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    if func.is_view or name in VIEWS or name.startswith("empty"):
        return True
    if name not in ("_reshape_alias", "reshape"):
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


# --------------------------------------------------------------------------------------------------
# What a CUDA build has one kernel for and the CPU build makes of several operators


@torch.library.custom_op("fake_cuda::rms_norm", mutates_args=())
def _rms_norm(rows: Tensor, weight: Tensor | None) -> Tensor:
    raise NotImplementedError


@_rms_norm.register_fake
def _(rows: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("fake_cuda::flex_attention", mutates_args=())
def _flex_attention(query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor]) -> Tensor:
    raise NotImplementedError


@_flex_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor]) -> Tensor:
    assert all(tensor.device == query.device for tensor in (key, value, *tables)), "FlexAttention takes one device"
    return query.new_empty(*query.shape[:3], value.shape[3])


def rms_norm(cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        one_kernel = input.device.type == "cuda" and (weight is None or weight.dtype == input.dtype)
        return _rms_norm(input, weight) if one_kernel else cpu(input, normalized_shape, weight, eps)

    return call


def scaled_dot_product_attention(cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    aten = torch.ops.aten

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        if query.device.type != "cuda" or more.get("enable_gqa"):
            return cpu(query, key, value, attn_mask, dropout_p, is_causal, **more)
        assert attn_mask is None or attn_mask.device == query.device, "attention takes one device"
        if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # PyTorch makes scores of it
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, 1)
        return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False, 0.0, is_causal)[0]

    return call


def flex_attention(trace: Trace) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        with trace.paused():  # what the rules hold has to be on the device as well
            indices = [torch.zeros((), dtype=torch.int64, device=query.device)] * 4
            assert block_mask.mask_mod(*indices).device == query.device
        tables = [part for part in block_mask.as_tuple() if isinstance(part, Tensor)]
        return _flex_attention(query, key, value, tables)

    return call


def _replace_everywhere(stack: contextlib.ExitStack, name: str, kernel: Callable[..., Any]) -> None:
    """Replaces a function of torch.nn.functional wherever it was imported to."""
    cpu = getattr(torch.nn.functional, name)
    replacement = kernel(cpu)
    for module in list(sys.modules.values()):
        room = getattr(module, "__name__", "").partition(".")[0]
        if room in ("torch", "reelbatch", "diffusers", "transformers") and vars(module).get(name) is cpu:
            stack.enter_context(mock.patch.object(module, name, replacement))


# --------------------------------------------------------------------------------------------------


class _Mode(FakeTensorMode):
    avoid_device_init = True  # whatever `torch.cuda.is_available` says


@contextlib.contextmanager
def fake_cuda(memory: int = 80 * 10**9, capability: tuple[int, int] = (9, 0)) -> Iterator[Trace]:
    """One CUDA device, as far as PyTorch and the package can see."""
    register_guard()
    trace = Trace()
    major, minor = capability
    properties = SimpleNamespace(total_memory=memory, name="fake", major=major, minor=minor, multi_processor_count=132)
    with contextlib.ExitStack() as stack:
        for name, function in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda *args: properties,
            "get_device_name": lambda *args: "fake",
            "get_device_capability": lambda *args: capability,
            "is_bf16_supported": lambda *args: True,
            "memory_allocated": lambda *args: trace.live,
            "max_memory_allocated": lambda *args: trace.peak_bytes,
            "mem_get_info": lambda *args: (memory - trace.live, memory),
            "empty_cache": nothing,
            "synchronize": nothing,
            "reset_peak_memory_stats": nothing,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for kernel in (rms_norm, scaled_dot_product_attention):
            _replace_everywhere(stack, kernel.__name__, kernel)
        stack.enter_context(mock.patch("reelbatch.attention.flex._compiled", return_value=flex_attention(trace)))
        clear_caches()
        stack.callback(clear_caches)
        stack.enter_context(_Mode(allow_non_fake_inputs=False))
        stack.enter_context(trace)
        yield trace


def clear_caches() -> None:
    """Empties the package's caches of results: fake tensors must not outlive their mode, nor real ones enter it."""
    for function in gc.get_objects():
        if type(function).__name__ == "_lru_cache_wrapper" and str(function.__module__).startswith("reelbatch"):
            function.cache_clear()


def weightless(make: Callable[[], T], dtype: torch.dtype = torch.bfloat16) -> T:
    """What `make` builds, on the fake device and in a dtype, with nothing drawn for its weights."""
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for layer in (torch.nn.Linear, torch.nn.Embedding, _ConvNd):
            stack.enter_context(mock.patch.object(layer, "reset_parameters", nothing))
        stack.enter_context(CUDA)
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(dtype)
        return make()


@pytest.fixture
def cuda() -> Iterator[Trace]:
    """A fake CUDA device; skips where none can be made."""
    if compiler() is None and torch.version.cuda is None:
        pytest.skip("the fake CUDA device needs a C++ compiler (g++ or clang++)")
    try:
        with fake_cuda() as trace:
            torch.ones(2, device=CUDA).add_(1)
    except (RuntimeError, AssertionError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this build of PyTorch has no fake CUDA device: {error}")
    with fake_cuda() as trace:
        yield trace
