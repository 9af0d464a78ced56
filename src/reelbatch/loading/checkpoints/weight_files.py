"""Files of weights in any format: what tensors they hold, known before any is read, and the tensors one by one.

safetensors     read by its library, one file or several
PyTorch (.pt)   read with weights_only=True, mapped into memory: nothing in it can run
GGUF            read by the `gguf` package where it is installed; 4-bit weights and the like are made whole
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.stored import MOST_HEADER_BYTES, StoredTensor, read_header
from reelbatch.wording import shown_line

MOST_TENSORS = 100_000
MOST_PICKLE = 64 * 2**20
"""Bytes of the part of a PyTorch file that says what tensors there are; that of the largest model has about 1 MiB."""
CONTAINERS = ("module", "model", "state_dict")
"""Under which names the weights of a PyTorch file may lie: DeepSpeed's, and others'."""
TORCH_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
GGUF_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class WeightFile:
    """What a file, or several that belong together, hold.

    Attributes:
        path: what to call it. format: in words.
        tensors: by name; dtypes in safetensors' names, or in GGUF's.
        read: the tensor of a name; those that GGUF holds in few bits as fp32.
        metadata: texts that the file says besides.
    """

    path: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    read: Callable[[str], Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def part(self, prefix: str) -> WeightFile:
        """The tensors whose names begin with a prefix, without it."""
        named = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return replace(self, tensors=named, read=lambda name: self.read(prefix + name))


def open_weights(path: Path) -> WeightFile:
    """A file by what it begins with, whatever it is called.

    Raises:
        ModelFolderError: for a file that is none of these, that is damaged, or that needs a package that is not here.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MOST_HEADER_BYTES:
            return _safetensors(path)  # whose length may begin as the other formats do
        if start.startswith(b"GGUF"):
            return _gguf(path)
        if start.startswith(b"PK"):
            return _torch(path)
        if start.startswith(b"\x80"):
            raise ValueError(
                "is in the format of PyTorch before 1.6, which cannot be read without running it; load it where you "
                "trust it and save it again (torch.save, or safetensors)"
            )
        return _safetensors(path)
    except ValueError as error:
        raise ModelFolderError(f"{path}: {error}") from None


def open_several(paths: Sequence[Path]) -> WeightFile:
    """The parts of one set of weights. Raises ModelFolderError also for tensors that two of them have."""
    files = [open_weights(path) for path in paths]
    if len(files) == 1:
        return files[0]
    homes: dict[str, WeightFile] = {}
    for file in files:
        for name in file.tensors:
            if name in homes:
                raise ModelFolderError(f"{file.path}: has {name[:200]}, which {homes[name].path.name} has as well")
            homes[name] = file
    tensors = {name: home.tensors[name] for name, home in homes.items()}
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    return WeightFile(paths[0].parent, files[0].format, tensors, lambda name: homes[name].read(name), metadata)


def _safetensors(path: Path) -> WeightFile:
    try:
        tensors = read_header(path)
    except ValueError as error:
        raise ValueError(f"is no whole safetensors, PyTorch or GGUF file: {error}") from None
    _check_count(tensors)
    file = safe_open(path, "pt")  # maps it; read_header has checked it
    return WeightFile(path, "safetensors", tensors, file.get_tensor, file.metadata() or {})


def _torch(path: Path) -> WeightFile:
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever the unpickler says of what it does not allow, or of damage
        raise ValueError(
            f"is no file of weights alone, and is not run ({shown_line(str(error))}); get safetensors files"
        ) from None
    weights = _weights_in(content)
    tensors = {
        name: StoredTensor(TORCH_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes)
        for name, tensor in weights.items()
    }
    _check_count(tensors)
    return WeightFile(path, "PyTorch", tensors, weights.__getitem__)


def _check_archive(path: Path) -> None:
    """A PyTorch file is an archive of stored, not compressed, parts: one that unpacks to more than itself is not."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"is no whole PyTorch file ({shown_line(str(error))}); download it again") from None
    if len(parts) > 2 * MOST_TENSORS or any(part.file_size != part.compress_size for part in parts):
        raise ValueError("is no PyTorch file as torch.save writes it (its parts are compressed, or too many)")
    pickles = [part for part in parts if part.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MOST_PICKLE:
        raise ValueError(f"is no PyTorch file of weights (one data.pkl of at most {MOST_PICKLE} bytes is expected)")


def _weights_in(content: Any) -> dict[str, Tensor]:
    for _ in CONTAINERS:
        inner = [
            content[name] for name in CONTAINERS if isinstance(content, dict) and isinstance(content.get(name), dict)
        ]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"holds no dictionary of weights, but {type(content).__name__}")
    for name, tensor in content.items():
        plain = (
            isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and type(tensor) in (Tensor, torch.nn.Parameter)
        )
        if not isinstance(name, str) or not plain:
            raise ValueError(f"holds {str(name)[:200]!r}, which is no weight but {type(tensor).__name__}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"holds {name[:200]}, a tensor of {list(tensor.shape)} that is not all there")
    return content


def _check_count(tensors: Mapping[str, StoredTensor]) -> None:
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"holds {len(tensors)} tensors; {MOST_TENSORS} are read at most")


# GGUF -------------------------------------------------------------------------------------------------------------


def _gguf(path: Path) -> WeightFile:
    try:
        import gguf  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise ValueError(
            "is a GGUF file, which is read by the package gguf; it is not installed: pip install 'reelbatch[gguf]'"
        ) from None
    with path.open("rb") as stream:
        count = int.from_bytes(stream.read(24)[8:16], "little")
    if count > MOST_TENSORS:
        raise ValueError(f"says that it holds {count} tensors; {MOST_TENSORS} are read at most")
    try:
        reader = gguf.GGUFReader(path)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {name: _gguf_shape(reader, tensor) for name, tensor in stored.items()}
        tensors = {
            name: StoredTensor(tensor.tensor_type.name, shapes[name], int(tensor.n_bytes))
            for name, tensor in stored.items()
        }
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged header leads to
        reason = shown_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"is no whole GGUF file ({reason}); download it again") from None

    def read(name: str) -> Tensor:
        tensor = stored[name]
        if tensor.tensor_type.name == "BF16":
            bits = torch.from_numpy(tensor.data.view("int16").copy())
            return bits.view(torch.bfloat16).reshape(shapes[name])
        if tensor.tensor_type.name in GGUF_FLOATS:
            return torch.from_numpy(tensor.data.copy()).reshape(shapes[name])
        try:
            return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(shapes[name])
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ModelFolderError(f"{path}: holds {name} as {kind}, which the package gguf cannot read") from None

    return WeightFile(path, "GGUF", tensors, read)


def _gguf_shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """GGUF counts dimensions from the last. ComfyUI-GGUF stores some weights in another shape, and says in which."""
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    original = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    if original is not None:
        said = tuple(int(size) for size in original.contents())
        if torch.Size(said).numel() != torch.Size(shape).numel():
            raise ValueError(f"{tensor.name} is of {list(shape)}, and should be of {list(said)}")
        shape = said
    return shape
