"""Offload: weights that wait on the CPU or on disk and come to the device block by block (Diffusers' group offload).

A block of the transformer receives all packs of a step at once, so one fetch of its weights serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

Where = Literal["none", "cpu", "disk"]


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
        apply_group_offloading(
            network,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            offload_to_disk_path=None if folder is None or where == "cpu" else str(folder / name),
        )


class Fetched:
    """Bytes of weights that came to the device."""

    bytes = 0


@contextmanager
def counting_fetches() -> Iterator[Fetched]:
    """While entered, counts what group offload fetches, in this process."""
    fetched, onload = Fetched(), ModuleGroup.onload_

    def counted(group: Any) -> None:
        fetched.bytes += sum(_bytes(module) for module in group.modules)
        fetched.bytes += sum(tensor.nbytes for tensor in (*group.parameters, *group.buffers))
        onload(group)

    ModuleGroup.onload_ = counted
    try:
        yield fetched
    finally:
        ModuleGroup.onload_ = onload


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
