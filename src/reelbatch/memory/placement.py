"""Offload: weights that wait on the CPU or on disk while others work.

Component by component, a network comes to the device when its work begins, and leaves when another's does. Block by
block, weights come for as long as their block works (Diffusers' group offload). A block of the transformer receives all
packs of a step at once, so one fetch of its weights serves the whole batch.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from reelbatch.device import gibibytes, trim_heap

Offload = Literal["none", "component", "block"]
"""Which weights are on the device: all; those of the component at work; the block at work and the one that follows."""
Where = Literal["none", "cpu", "disk"]
Part = Literal["text", "transformer", "vae"]
CPU = torch.device("cpu")
GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Diffusers' names of what group offload hangs into a network."""


def check_offload(kind: Offload, device: torch.device, int8: bool = False) -> None:
    """Raises ValueError where weights cannot be offloaded so, saying what to use instead."""
    if kind not in ("none", "component", "block"):
        raise ValueError(f"offload is {kind!r}; it must be 'none', 'component' or 'block'.")
    if kind == "component" and device.type == "cpu":
        raise ValueError(
            "offload 'component' keeps weights on the CPU, out of another device's memory; this device is the CPU: use "
            "offload 'block', which keeps them on disk."
        )
    if kind == "block" and int8 and device.type == "cpu":
        raise ValueError(
            "8-bit weights cannot be offloaded to disk: use a dtype of bfloat16 with offload 'block', or int8 with "
            "offload 'none'."
        )


def offloads(device: torch.device, int8: bool = False) -> list[Offload]:
    """What can be used here, the quickest first."""
    kinds: list[Offload] = ["none"]
    if device.type != "cpu":
        kinds.append("component")
    if device.type != "cpu" or not int8:
        kinds.append("block")
    return kinds


# -- block by block --------------------------------------------------------------------------------


class _MemoryGroup(ModuleGroup):
    """Weights that wait on the CPU; also those that joined after the others were pinned, as a LoRA's do."""

    def _onload_from_memory(self) -> None:
        if self.stream is not None:
            for tensor in (t for module in self.modules for t in (*module.parameters(), *module.buffers())):
                if tensor not in self.cpu_param_dict:
                    self.cpu_param_dict[tensor] = self._to_cpu(tensor, self.low_cpu_mem_usage)
        super()._onload_from_memory()


class _DiskGroup(ModuleGroup):
    """Weights that wait on disk, of which nothing stays in memory. Those that joined later (a LoRA's) stay there."""

    def _offload_to_disk(self) -> None:
        if not self._is_offloaded_to_disk:
            super()._offload_to_disk()
        for tensor in self.tensor_to_key:  # where Diffusers would leave as much memory, unwritten
            tensor.data = torch.empty(1, dtype=tensor.dtype).expand(tensor.shape)

    def cast(self, dtype: torch.dtype) -> None:
        """Of all weights, as `from_pretrained` would have cast them."""
        if all(tensor.dtype == dtype for tensor in self._weights()):
            return
        self.onload_()
        for tensor in self._weights():
            tensor.data = tensor.data.to(dtype)
        Path(self.safetensors_file_path).unlink()
        self._is_offloaded_to_disk = False
        self.offload_()

    def _weights(self) -> list[nn.Parameter]:
        return [t for t in self.tensor_to_key if isinstance(t, nn.Parameter) and t.is_floating_point()]


def offload(networks: dict[str, nn.Module], device: torch.device, where: Where, folder: Path | None = None) -> None:
    """Makes the networks' weights wait elsewhere; a block's come to `device` for as long as it works.

    Args:
        networks: by name, each on the CPU.
        where: "cpu" (for a device that is not the CPU) or "disk".
        folder: for "disk", an empty folder, one per run.
    """
    if where == "none":
        return
    if where == "cpu" and device.type == "cpu":
        raise ValueError("offload='cpu' frees the memory of another device; this one is the CPU: use 'disk'.")
    if where == "disk" and folder is None:
        raise ValueError("offload='disk' needs a folder for the weights.")
    for name, network in networks.items():
        _stream(network, device, None if folder is None or where == "cpu" else folder / name)


def _stream(network: nn.Module, device: torch.device, folder: Path | None, prefetch: bool = True) -> None:
    """prefetch: on CUDA, whether the next block's weights come while one works."""
    apply_group_offloading(
        network,
        onload_device=device,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        # 8-bit weights are tensors of a kind of their own, which Diffusers moves in the main stream only safely
        use_stream=prefetch and device.type == "cuda" and not getattr(network, "is_quantized", False),
        offload_to_disk_path=None if folder is None else str(folder),
    )
    for group in _groups(network):
        group.__class__ = _MemoryGroup if folder is None else _DiskGroup
        if folder is not None:
            group.offload_()


def _groups(network: nn.Module) -> list[Any]:
    hooks = (module._diffusers_hook.get_hook(GROUP_HOOKS[0]) for module in _hooked(network))
    return list(dict.fromkeys(hook.group for hook in hooks if hook is not None))


def _hooked(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if hasattr(module, "_diffusers_hook")]


@contextmanager
def streamed(network: nn.Module, device: torch.device, back: torch.device | None = None) -> Iterator[None]:
    """While entered, a network's weights wait on the CPU and come to `device` block by block, one block at a time.

    back: where the weights go afterwards, if not to `device`.
    """
    _stream(network, device, None, prefetch=False)
    try:
        yield
    finally:
        registry = HookRegistry.check_if_exists_or_initialize(network)
        for name in GROUP_HOOKS:
            registry.remove_hook(name, recurse=True)
        network.to(device if back is None else back)


def streamed_bytes(network: nn.Module) -> int:
    """The most that a network's weights take on the device when they come block by block: what is outside of blocks, a
    block, and the one that follows."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = [network_bytes(block) for child in lists for block in child]
    return network_bytes(network) - sum(blocks) + sum(sorted(blocks)[-2:])


# -- component by component ------------------------------------------------------------------------


class _Visit(ModelHook):
    """Accelerate's kind of hook: told before a network works, it has the weights come, and the others' leave.

    execution_device: where the network computes.
    """

    def __init__(self, residence: Residence, part: Part) -> None:
        self.residence, self.part = residence, part
        self.execution_device = residence.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.residence.enter(self.part)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class Residence:
    """Where the weights of a model's parts are, and when they move: only one part's are on the device.

    Args:
        device: where the networks compute.
        kind: "component", or "block" for the transformer and Llama block by block (the rest by component).
        weight_bytes: of all networks; where they wait on disk, so much must be free there.

    Raises:
        ValueError: for what cannot be done here, saying what to do instead.
    """

    def __init__(self, device: torch.device, kind: Offload, weight_bytes: int = 0) -> None:
        self.device, self.kind = device, kind
        self.here: Part | None = None
        self._visitors: dict[Part, list[tuple[nn.Module, _Visit, Any]]] = {}
        self._folder: TemporaryDirectory[str] | None = None
        if kind == "block" and device.type == "cpu":
            free = shutil.disk_usage(gettempdir()).free
            if free < weight_bytes:
                raise ValueError(
                    f"offload 'block' writes {gibibytes(weight_bytes)} of weights to {gettempdir()}, where "
                    f"{gibibytes(free)} are free: set TMPDIR to a folder on a larger disk."
                )
            self._folder = TemporaryDirectory(prefix="reelbatch-offload-")  # removed with this, or at the end

    @property
    def folder(self) -> Path | None:
        """Of the weights that wait on disk."""
        return None if self._folder is None else Path(self._folder.name)

    def take(self, name: str, network: nn.Module, dtype: torch.dtype) -> None:
        """Has a loaded network's weights wait. `name`: of its component.

        dtype: to compute in. Weights that wait on disk may come in another, and are cast a block at a time.
        """
        part: Part = "text" if name.startswith("text") else "vae" if name == "vae" else "transformer"
        hook, group = _Visit(self, part), None
        if self.kind == "block" and name != "vae":
            offload({name: network}, self.device, "cpu" if self.folder is None else "disk", self.folder)
        elif self.folder is not None:  # as a VAE is not used through its forward, group offload does not see it work
            group = _DiskGroup(
                modules=[network],
                offload_device=CPU,
                onload_device=CPU,
                offload_leader=network,
                offload_to_disk_path=str(self.folder / name),
                group_id=name,
            )
            group.offload_()
        if self.folder is not None:
            for each in [*_groups(network), *([group] if group else [])]:
                each.cast(dtype)
            gc.collect()
            trim_heap()
        self._visitors.setdefault(part, []).append((network, hook, group))
        add_hook_to_module(network, hook)

    def enter(self, part: Part) -> None:
        """A part begins to work: its weights come, unless they are here or come block by block."""
        if self.here == part:
            return
        self.leave()
        self.here = part
        for network, hook, group in self._visitors.get(part, []):
            if group is not None:
                group.onload_()
            elif not _groups(network) and hook.execution_device != CPU:
                network.to(hook.execution_device)

    def leave(self) -> None:
        """All weights leave the device."""
        for network, _, group in self._visitors.get(self.here, []) if self.here else []:
            if group is not None:
                group.offload_()
            elif not _groups(network) and self.device != CPU:
                network.to(CPU)
        self.here = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def working_on_the_cpu(self, *parts: Part) -> Iterator[None]:
        """While entered, these parts do not come to the device, and compute on the CPU if they must. What comes block
        by block goes on doing so."""
        self.leave()
        hooks = [hook for part in parts for network, hook, _ in self._visitors.get(part, []) if not _groups(network)]
        for hook in hooks:
            hook.execution_device = CPU
        try:
            yield
        finally:
            self.leave()
            for hook in hooks:
                hook.execution_device = self.device


# -- counting --------------------------------------------------------------------------------------


class Fetched:
    """Bytes of weights that came to the device."""

    bytes = 0


@contextmanager
def counting_fetches() -> Iterator[Fetched]:
    """While entered, counts what group offload fetches, in this process."""
    fetched, onload = Fetched(), ModuleGroup.onload_

    def counted(group: Any) -> None:
        fetched.bytes += sum(network_bytes(module) for module in group.modules)
        fetched.bytes += sum(tensor.nbytes for tensor in (*group.parameters, *group.buffers))
        onload(group)

    ModuleGroup.onload_ = counted
    try:
        yield fetched
    finally:
        ModuleGroup.onload_ = onload


def network_bytes(module: nn.Module) -> int:
    """Of all its weights, wherever they are."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
