"""Placement: which weights are on the device, and when they come and go.

Component by component, a network comes to the device when its work begins, and leaves when another's does. Block by
block, weights come for as long as their block works (Diffusers' group offload). A block of the transformer receives all
packs of a step at once, so one fetch of its weights serves the whole batch. Weights wait in the CPU's memory, or, where
the CPU is the device, on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal, NamedTuple

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from reelbatch.device import free_memory, gibibytes, log
from reelbatch.memory.alignment import align_weights
from reelbatch.memory.streaming import DiskGroup, groups_of, network_bytes, stop_streaming, stream, streamed_bytes
from reelbatch.models.family import PHASES, Phase

Offload = Literal["none", "component", "block"]
"""Which weights are on the device: all; those of the component at work; the block at work and the one that follows."""
CPU = torch.device("cpu")


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


class Relief(NamedTuple):
    """Something that lets work go on with less memory on the device.

    Attributes:
        what: it, as the end of "tried again …".
        entered: what to be in meanwhile.
        exact: whether results keep their bits.
    """

    what: str
    entered: Callable[[], AbstractContextManager[None]]
    exact: bool = True


ReliefKind = Literal["evict", "blocks", "cpu"]


def relief_kinds(
    phase: Phase,
    parts: Collection[tuple[Collection[Phase], bool]],
    offload: Offload,
    device: torch.device,
    storable: bool = True,
) -> list[ReliefKind]:
    """What can be done for a phase that runs out of memory, the cheapest first: by where weights can go, and whether
    there is a slower device to compute on.

    Args:
        parts: the phases that each network works in, and whether its weights can come block by block.
        storable: whether the weights can be written to disk, which is where those of a CPU go.
    """
    on_cpu = device.type == "cpu"
    kinds: list[ReliefKind] = []
    if storable or not on_cpu:
        if offload == "none" and any(phase not in phases for phases, _ in parts):
            kinds.append("evict")
        if offload != "block" and any(blockwise for phases, blockwise in parts if phase in phases):
            kinds.append("blocks")
    if not on_cpu and phase != "step":
        kinds.append("cpu")
    return kinds


def relief_words(kind: ReliefKind, device: torch.device) -> str:
    """A relief, as the end of "tried again …"."""
    away = "disk" if device.type == "cpu" else "the CPU"
    return {
        "evict": f"with the other networks moved to {away}",
        "blocks": "with weights that come block by block",
        "cpu": "on the CPU",
    }[kind]


@dataclass
class _Part:
    name: str
    network: nn.Module
    phase: Phase
    blockwise: bool
    also: tuple[Phase, ...] = ()
    """Further phases that it works in."""
    hook: _Visit | None = None
    group: DiskGroup | None = None
    """Where a whole network waits on disk."""

    @property
    def streams(self) -> bool:
        return bool(groups_of(self.network))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (self.phase, *self.also)


class _Visit(ModelHook):
    """Called before a network works: has its weights come, and the others' leave.

    execution_device: where the network computes.
    """

    def __init__(self, placement: Placement, phase: Phase, also: tuple[Phase, ...] = ()) -> None:
        self.placement, self.phase, self.also = placement, phase, also
        self.execution_device = placement.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.placement.here not in self.also:
            self.placement.enter(self.phase)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


@dataclass
class Placement:
    """Where the weights of a model's parts are, and when they move.

    Args:
        device: where the networks compute.
        offload: which weights are on the device.
        weight_bytes: of all networks; where they wait on disk, so much must be free there.
        storable: whether the weights can be written to disk (8-bit weights cannot).

    Raises:
        ValueError: for what cannot be done here, saying what to do instead.
    """

    device: torch.device
    offload: Offload = "none"
    weight_bytes: int = 0
    storable: bool = True
    here: Phase | None = field(default=None, init=False)
    """With an offload: the phase whose weights are on the device now."""

    def __post_init__(self) -> None:
        check_offload(self.offload, self.device, not self.storable)
        self._parts: list[_Part] = []
        self._folder: TemporaryDirectory[str] | None = None
        self._undo: list[Callable[[], object]] = []
        """Has come back what is elsewhere for a while."""
        if self.offload == "block" and self.device.type == "cpu":
            free = shutil.disk_usage(gettempdir()).free
            if free < self.weight_bytes:
                raise ValueError(
                    f"offload 'block' writes {gibibytes(self.weight_bytes)} of weights to {gettempdir()}, where "
                    f"{gibibytes(free)} are free: set TMPDIR to a folder on a larger disk."
                )

    @property
    def waits_on_disk(self) -> bool:
        """Whether offloaded weights wait on disk: those loaded for it may come in the dtype that they are stored in."""
        return self.offload == "block" and self.device.type == "cpu"

    def take(
        self,
        name: str,
        network: nn.Module,
        dtype: torch.dtype,
        phase: Phase,
        blockwise: bool,
        also: tuple[Phase, ...] = (),
    ) -> None:
        """Puts a loaded network's weights where they belong.

        Args:
            name: of the part. phase: which it works in.
            dtype: to compute in. Weights that wait on disk may come in another, and are cast a block at a time.
            blockwise: whether its weights can come block by block.
            also: further phases that it works in: its weights are on the device then too.
        """
        part = _Part(name, network, phase, blockwise, also)
        self._parts.append(part)
        if self.offload == "none":
            network.to(self.device)
            align_weights(network)
            return
        if self.offload == "block" and blockwise:
            stream(network, self.device, self._folder_of(name) if self.waits_on_disk else None)
        elif self.waits_on_disk:  # a network used by other methods than `forward` is not seen by group offload
            part.group = self._disk_group(part)
            part.group.offload_()
        if self.waits_on_disk:
            for group in [*groups_of(network), *([part.group] if part.group else [])]:
                group.cast(dtype)
            free_memory()
        part.hook = _Visit(self, phase, also)
        add_hook_to_module(network, part.hook)

    def enter(self, phase: Phase) -> None:
        """A phase begins: the weights of its parts come, unless they are here or come block by block."""
        if self.here == phase or self.offload == "none":
            return
        self.leave()
        self.here = phase
        for part in self._of(phase):
            if part.group is not None:
                part.group.onload_()
            elif not part.streams and part.hook is not None and part.hook.execution_device != CPU:
                part.network.to(part.hook.execution_device)

    def leave(self) -> None:
        """With an offload: all weights leave the device."""
        for part in self._of(self.here) if self.here else []:
            if part.group is not None:
                part.group.offload_()
            elif not part.streams and self.device != CPU:
                part.network.to(CPU)
        self.here = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def visiting_bytes(self, phase: Phase) -> int:
        """Bytes of weights that come to the device, at most at once, for a phase."""
        if self.offload == "none":
            return 0
        in_blocks = self.offload == "block"
        return sum(
            streamed_bytes(part.network) if in_blocks and part.blockwise else network_bytes(part.network)
            for part in self._of(phase)
        )

    # -- when memory runs out ----------------------------------------------------------------------

    def reliefs(self, phase: Phase) -> list[Relief]:
        """What can be done for a phase that runs out of memory, the cheapest first."""
        others = [other for other in PHASES if other != phase]
        entered: Mapping[ReliefKind, Callable[[], AbstractContextManager[None]]] = {
            "evict": lambda: self.evicted(*others),
            "blocks": lambda: self.block_by_block(phase),
            "cpu": lambda: self.on_cpu(phase),
        }
        parts = [(part.phases, part.blockwise) for part in self._parts]
        kinds = relief_kinds(phase, parts, self.offload, self.device, self.storable)
        return [Relief(relief_words(kind, self.device), entered[kind], exact=kind != "cpu") for kind in kinds]

    @contextmanager
    def evicted(self, *phases: Phase) -> Iterator[None]:
        """While entered, the weights of these phases' parts, none of which works meanwhile, are not on the device."""
        self.restore()  # what is still away from an earlier try must not be written over
        with self._for_a_while():
            for part in self._parts if self.offload == "none" else []:
                if not set(part.phases) <= set(phases):
                    continue
                if self.device.type != "cpu":
                    self._undo.append(partial(part.network.to, self.device))
                    part.network.to(CPU)
                else:
                    group = self._disk_group(part)
                    self._undo.append(group.onload_)
                    group.offload_()
            free_memory()
            yield

    @contextmanager
    def block_by_block(self, phase: Phase) -> Iterator[None]:
        """While entered, the weights of this phase's parts come to the device block by block where they can, and those
        of other phases are not there."""
        back_to = self.device if self.offload == "none" else CPU
        on_disk = self.device.type == "cpu"
        with self.evicted(*(other for other in PHASES if other != phase)), self._for_a_while():
            if self.offload != "none":
                self.leave()
            for part in self._of(phase):
                if part.blockwise and not part.streams:
                    self._undo.append(partial(stop_streaming, part.network, back_to))
                    folder = self._folder_of(f"{part.name}-streamed") if on_disk else None
                    stream(part.network, self.device, folder, prefetch=False)
            free_memory()
            yield

    @contextmanager
    def on_cpu(self, phase: Phase) -> Iterator[None]:
        """While entered, this phase's parts compute on the CPU. What comes block by block goes on doing so."""
        parts = [part for part in self._of(phase) if not part.streams]
        with self._for_a_while():
            if self.offload != "none":
                self.leave()
                self._undo.append(self.leave)
            for part in parts:
                if part.hook is None:
                    self._undo.append(partial(part.network.to, self.device))
                    part.network.to(CPU)
                else:
                    self._undo.append(partial(setattr, part.hook, "execution_device", self.device))
                    part.hook.execution_device = CPU
            free_memory()
            yield

    @contextmanager
    def _for_a_while(self) -> Iterator[None]:
        try:
            yield
        finally:
            free_memory()
            try:
                self.restore()
            except (OSError, MemoryError, RuntimeError) as error:
                log.warning("weights that left for a while come back before the next work, not yet: %s", error)

    def restore(self) -> None:
        """Brings back what left for a while. Where that fails, or is interrupted, the next call goes on.

        Raises:
            MemoryError, RuntimeError, OSError: if it cannot be; no work can be done before it is here.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    # -- small parts -------------------------------------------------------------------------------

    def _of(self, phase: Phase) -> list[_Part]:
        return [part for part in self._parts if phase in part.phases]

    def _disk_group(self, part: _Part) -> DiskGroup:
        """Its weights, which can now go to disk."""
        return DiskGroup(
            modules=[part.network],
            offload_device=CPU,
            onload_device=CPU,
            offload_leader=part.network,
            offload_to_disk_path=str(self._folder_of(part.name)),
            group_id=part.name,
        )

    def _folder_of(self, name: str) -> Path:
        """An empty folder on disk, removed with this object or at the end of the process."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="reelbatch-offload-")
        folder = Path(self._folder.name, name)
        shutil.rmtree(folder, ignore_errors=True)
        return folder
