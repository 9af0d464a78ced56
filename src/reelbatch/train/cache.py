"""Encoded clips and captions, computed once and kept on disk.

An entry is a safetensors file, named by a hash of all that it depends on: the bytes of the video file, the rules by
which it is cut, and what encodes it, with its weights (of a caption: its text and what encodes it). It carries a
checksum of its tensors, and one that does not pass is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reelbatch.files import aside
from reelbatch.models.family import EncoderIdentity, TrainableFamily
from reelbatch.train.data import Clip, ClipRules, read_clip

FORMAT = "1"
"""Raised when what is encoded, or how, changes: older entries are then made again."""
CAPTIONS_KEPT = 4096
"""Captions whose encodings stay in memory."""


class EncodedClips:
    """Clips and captions, encoded, from the cache or else from the model.

    Args:
        folder: of the cache; any number of runs, models and rules may share it.
        family: encodes.
        rules: by which files become clips.

    Attributes:
        newly_encoded: entries that were not in the cache.
    """

    def __init__(self, folder: Path, family: TrainableFamily, rules: ClipRules) -> None:
        self.folder, self.family, self.rules = folder, family, rules
        self.newly_encoded = 0
        self.caption = lru_cache(CAPTIONS_KEPT)(self._caption)

    def clip(self, clip: Clip) -> tuple[Float[Tensor, "channels frames height width"], Mapping[str, Tensor]]:
        """Latents, and what the first frame gives to a model that takes one as an image (`encode_clip` of
        `TrainableFamily`). Raises BrokenClip if the file cannot be used."""
        key = _hash("clip", file_hash(clip.path), self.rules.as_text(), self._clip_encoder)
        first_frame = self._entry(key, lambda: self._encode(clip.path))
        return first_frame.pop("latents"), first_frame

    def _encode(self, path: Path) -> Mapping[str, Tensor]:
        return self.family.encode_clip(torch.from_numpy(read_clip(path, self.rules)))

    def _caption(self, caption: str) -> Mapping[str, Tensor]:
        """As `TrainableFamily.encode_caption`."""
        key = _hash("caption", self._caption_encoder, caption)
        return self._entry(key, lambda: self.family.encode_caption(caption))

    # -- entries -----------------------------------------------------------------------------------

    def _entry(self, key: str, encode: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        path = self.folder / key[:2] / f"{key}.safetensors"
        tensors = read_entry(path)
        if tensors is None:
            tensors = {name: tensor.contiguous() for name, tensor in encode().items()}
            write_entry(path, tensors)
            self.newly_encoded += 1
        return tensors

    @cached_property
    def _clip_encoder(self) -> str:
        return self._identity(self.family.clip_encoder)

    @cached_property
    def _caption_encoder(self) -> str:
        return self._identity(self.family.caption_encoder)

    def _identity(self, encoder: EncoderIdentity) -> str:
        parts = self.family.parts
        return _hash(*encoder.settings, *(_weights_hash(parts[name]) for name in encoder.parts))


def read_entry(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry; None if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors if stored == checksum(tensors) else None


def write_entry(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes an entry, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        save_file(tensors, part, metadata={"checksum": checksum(tensors)})


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@lru_cache(65536)
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; read again only if its size or time has changed. Raises OSError."""
    stat = path.stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


def _weights_hash(network: nn.Module) -> str:
    """Hash of the weights in memory: it differs by dtype and fine-tuning, wherever their files lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join((FORMAT, *parts)).encode()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """A clip that can be trained on: what is known without opening its entry.

    Attributes:
        shape: of its latents, `[channels, frames, height, width]`.
        video_tokens, conditioning_tokens: transformer rows; the conditioning is its longest caption, and its first
            frame.
    """

    clip: Clip
    shape: tuple[int, ...]
    video_tokens: int
    conditioning_tokens: int

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.conditioning_tokens
