"""Writes the components of a model folder: weights in shards, each read back; and what is taken as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelbatch.files import PART, aside, link_or_copy
from reelbatch.loading.hub import ModelFolderError
from reelbatch.wording import shown_line

SHARD_BYTES = 5 * 10**9
"""Of a file of weights, as Diffusers writes them."""
Progress = Callable[[Path, bool], None]
"""Told of each file of weights that is there, and whether it was there before."""


@dataclass(frozen=True)
class Weights:
    """The weights of a component, and how each is read.

    Attributes:
        base: what its files are called. sizes: bytes of each weight. config: writes config.json into a folder.
    """

    base: str
    sizes: Mapping[str, int]
    read: Callable[[str], Tensor]
    config: Callable[[Path], None]

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        """Writes what is not there yet; files that are there are compared with what they should be.

        Raises:
            ModelFolderError: where a file does not hold what was written.
            OSError: where it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        shards = list(self._shards(shard_bytes))
        names = [
            f"{self.base}.safetensors" if len(shards) == 1 else f"{self.base}-{n:05}-of-{len(shards):05}.safetensors"
            for n in range(1, len(shards) + 1)
        ]
        for stale in folder.glob(f".*{PART}"):
            stale.unlink()
        for other in folder.glob("*.safetensors*"):  # of another size of shards
            if other.name not in (*names, f"{self.base}.safetensors.index.json"):
                other.unlink()
        for name, shard in zip(names, shards, strict=True):
            path = folder / name
            tensors = {weight: self.read(weight) for weight in shard}
            there = not _difference(path, tensors)
            if not there:
                with aside(path) as part:
                    save_file(tensors, part, metadata={"format": "pt"})
                if fault := _difference(path, tensors):
                    raise ModelFolderError(
                        f"{path}: does not hold what was written to it ({fault}); is the disk sound?"
                    )
            progress(path, there)
        if len(shards) > 1:
            places = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
            index = {"metadata": {"total_size": self.size}, "weight_map": places}
            write_json(folder / f"{self.base}.safetensors.index.json", index)
        self.config(folder)

    def _shards(self, most: int) -> Iterator[Sequence[str]]:
        shard: list[str] = []
        size = 0
        for name, bytes_ in self.sizes.items():
            if shard and size + bytes_ > most:
                yield shard
                shard, size = [], 0
            shard.append(name)
            size += bytes_
        if shard:
            yield shard


def _difference(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """In what a file is not these tensors, bit for bit."""
    if not path.is_file():
        return "there is none"
    try:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != tensors.keys():
                return "other names"
            for name, tensor in tensors.items():
                stored = file.get_tensor(name)
                if stored.dtype != tensor.dtype or stored.shape != tensor.shape or not _same_bits(stored, tensor):
                    return name
    except (SafetensorError, OSError) as error:
        return shown_line(str(error))
    return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with aside(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def take(source: Path, folder: Path) -> None:
    """Links the files of a component, or copies them where they cannot be linked."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            link_or_copy(file, folder / file.name)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
