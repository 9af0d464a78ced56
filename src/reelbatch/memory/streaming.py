"""Weights that come to the device while their block works: Diffusers' group offload, from memory or from disk."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from reelbatch.memory.alignment import ALIGNMENT

CPU = torch.device("cpu")
GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Diffusers' names of what group offload hangs into a network."""


class MemoryGroup(ModuleGroup):
    """Weights that wait on the CPU; also those that joined after the others were pinned, as a LoRA's do."""

    def _onload_from_memory(self) -> None:
        if self.stream is not None:
            for tensor in (t for module in self.modules for t in (*module.parameters(), *module.buffers())):
                if tensor not in self.cpu_param_dict:
                    self.cpu_param_dict[tensor] = self._to_cpu(tensor, self.low_cpu_mem_usage)
        super()._onload_from_memory()


class DiskGroup(ModuleGroup):
    """Weights that wait on disk, of which nothing stays in memory. Those that joined later (a LoRA's) stay there."""

    def _offload_to_disk(self) -> None:
        if not self._is_offloaded_to_disk:
            super()._offload_to_disk()
        for tensor in self.tensor_to_key:  # where Diffusers would leave as much memory, unwritten
            # not a number, so that no result of weights that are not here passes for one
            nothing = torch.full((1,), torch.nan) if tensor.is_floating_point() else torch.zeros(1)
            tensor.data = nothing.to(tensor.dtype).expand(tensor.shape)

    def _onload_from_disk(self) -> None:
        """Reads into pages of its own, which go back to the system when the weights leave, each weight at an aligned
        address; in a mapped file they are not."""
        if not self._is_offloaded_to_disk:  # writing them failed: they are here
            return
        with Path(self.safetensors_file_path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            sizes = {tensor: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensor_to_key}
            pages, start = mmap.mmap(-1, max(sum(sizes.values()), 1)), 0
            for key, tensor in self.key_to_tensor.items():
                file.seek(8 + length + header[key]["data_offsets"][0])
                if file.readinto(memoryview(pages)[start : start + tensor.nbytes]) != tensor.nbytes:
                    raise OSError(f"{self.safetensors_file_path}: is cut short; these weights cannot come back")
                if tensor.numel():
                    loaded = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                    tensor.data = loaded.view(tensor.shape)
                start += sizes[tensor]

    def cast(self, dtype: torch.dtype) -> None:
        """Casts all weights, as `from_pretrained` would have."""
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


def nested_parts(network: nn.Module) -> tuple[str, ...]:
    """Names of the networks within a network that have blocks of their own, and of what is entered beside them, as
    Diffusers' group offload reads them too; most networks have none."""
    return tuple(getattr(network, "_group_offload_block_modules", None) or ())


def stream(network: nn.Module, device: torch.device, folder: Path | None, prefetch: bool = True) -> None:
    """Makes a network's weights wait elsewhere; a block's come to `device` for as long as it works.

    Args:
        network: on the CPU, or on `device`.
        folder: an empty one for weights that wait on disk; None: they wait in the CPU's memory.
        prefetch: on CUDA, whether the next block's weights come while one works.
    """
    nested = nested_parts(network)
    apply_group_offloading(
        network,
        onload_device=device,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        # 8-bit weights are tensors of a kind of their own, which Diffusers moves in the main stream only safely; and a
        # network within another may be left out of a forward, which its prefetching does not expect
        use_stream=prefetch and device.type == "cuda" and not nested and not getattr(network, "is_quantized", False),
        offload_to_disk_path=None if folder is None else str(folder),
    )
    for group in groups_of(network):
        group.__class__ = MemoryGroup if folder is None else DiskGroup
        if folder is not None:
            group.offload_()


def stop_streaming(network: nn.Module, device: torch.device) -> None:
    """Undoes `stream`; the weights are on `device` then."""
    for group in groups_of(network):
        if group.offload_to_disk_path is not None:
            group.onload_()
    registry = HookRegistry.check_if_exists_or_initialize(network)
    for name in GROUP_HOOKS:
        registry.remove_hook(name, recurse=True)
    network.to(device)


def groups_of(network: nn.Module) -> list[Any]:
    """The groups of weights of a streamed network; none for another."""
    registries: list[Any] = [getattr(module, "_diffusers_hook", None) for module in network.modules()]
    hooks = [registry.get_hook(GROUP_HOOKS[0]) for registry in registries if registry is not None]
    return list(dict.fromkeys(hook.group for hook in hooks if hook is not None))


def streamed_bytes(network: nn.Module) -> int:
    """The most that a network's weights take on the device when they come block by block: what is outside of blocks, a
    block, and the one that follows."""
    blocks = [network_bytes(block) for block in _blocks(network, frozenset(nested_parts(network)))]
    return network_bytes(network) - sum(blocks) + sum(sorted(blocks)[-2:])


def _blocks(network: nn.Module, nested: frozenset[str]) -> Iterator[nn.Module]:
    """What comes and leaves by itself."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name in nested:
            if next(child.children(), None) is None:
                yield child
            yield from _blocks(child, nested)


def network_bytes(module: nn.Module) -> int:
    """Bytes of all its weights, wherever they are."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


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
