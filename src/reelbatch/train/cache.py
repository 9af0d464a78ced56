"""Encoded clips and captions, made once and kept on disk.

An entry is a safetensors file, named by a hash of all that it is made from: the bytes of the video file, the rules by
which it is cut, and the weights of the VAE (of a caption: its text, the prompt template and the text encoders). It
carries a checksum of its tensors, and one that does not pass is made anew.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reelbatch.loading.model import Model
from reelbatch.models.hunyuan_video.text import TextStates
from reelbatch.models.hunyuan_video.vae import SingleSampleConv3d
from reelbatch.train.data import Clip, ClipRules, read_clip

FORMAT = "1"
"""Raised when what is encoded, or how, changes: older entries are then made anew."""
CAPTIONS_KEPT = 4096
"""Captions whose encodings stay in memory."""


class EncodedClips:
    """Latents of clips and conditioning of captions, from the cache or else from the model.

    Args:
        folder: of the cache; any number of runs, models and rules may share it.
        model: whose VAE and text encoders encode.
        rules: by which files become clips.
    """

    def __init__(self, folder: Path, model: Model, rules: ClipRules) -> None:
        self.folder, self.model, self.rules = folder, model, rules
        self.made = 0
        """Entries that were encoded, not found."""
        for module in model.family.decoder.vae.encoder.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = SingleSampleConv3d
        self.caption = lru_cache(CAPTIONS_KEPT)(self._caption)

    def latents(self, clip: Clip) -> Float[Tensor, "channels frames height width"]:
        """Scaled as the transformer sees them, fp32, on the CPU. Raises BrokenClip if the file cannot be used."""
        return self._entry(self._clip_key(clip.path), lambda: {"latents": self._encode(clip.path)})["latents"]

    def _caption(self, caption: str) -> TextStates:
        """fp32, on the CPU."""

        def encode() -> dict[str, Tensor]:
            found = self.model.family.text.encode(caption)
            return {"text": found.text.float().cpu(), "pooled": found.pooled.float().cpu()}

        return TextStates(**self._entry(_hash("caption", self._text_key, caption), encode))

    # -- entries -----------------------------------------------------------------------------------

    def _entry(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self.folder / key[:2] / f"{key}.safetensors"
        found = read_entry(path)
        if found is None:
            found = {name: tensor.contiguous() for name, tensor in make().items()}
            write_entry(path, found)
            self.made += 1
        return found

    def _clip_key(self, path: Path) -> str:
        return _hash("clip", file_hash(path), self.rules.as_text(), self._vae_key)

    @cached_property
    def _vae_key(self) -> str:
        config = json.dumps(dict(self.model.family.decoder.vae.config), sort_keys=True, default=str)
        return _hash(config, _weights_hash(self.model.family.decoder.vae))

    @cached_property
    def _text_key(self) -> str:
        text = self.model.family.text
        tokens = json.dumps([text.tokenizer.get_vocab(), text.tokenizer_2.get_vocab()], sort_keys=True)
        template = f"{text.template} {text.max_tokens}"
        return _hash(template, tokens, _weights_hash(text.llama), _weights_hash(text.clip))

    @torch.no_grad()
    def _encode(self, path: Path) -> Float[Tensor, "channels frames height width"]:
        """The posterior's mean, not a sample of it: a clip is the same every time it is seen."""
        frames = torch.from_numpy(read_clip(path, self.rules))
        decoder, vae = self.model.family.decoder, self.model.family.decoder.vae
        video = frames.permute(3, 0, 1, 2)[None].to(vae.device).float().div(127.5).sub(1).to(vae.dtype)
        shape = (
            vae.config.latent_channels,
            (len(frames) - 1) // vae.temporal_compression_ratio + 1,
            *(side // vae.spatial_compression_ratio for side in frames.shape[1:3]),
        )
        found, vae.use_tiling = vae.use_tiling, decoder.tiles(shape)  # encoding takes about what decoding takes
        try:
            latents = vae.encode(video.contiguous()).latent_dist.mean[0]
        finally:
            vae.use_tiling = found
        return (latents.float() * vae.config.scaling_factor).cpu()


def read_entry(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry; None if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            known = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors if known == checksum(tensors) else None


def write_entry(path: Path, tensors: dict[str, Tensor]) -> None:
    """Written aside and put in its place at once, so that what has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        save_file(tensors, part, metadata={"checksum": checksum(tensors)})


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, put in its place when all went well and removed when not."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
    """Of the weights in memory: it tells a dtype and a fine-tuned model apart, wherever their files lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join((FORMAT, *parts)).encode()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """A clip that can be trained on: what is known of it without opening its entry.

    Attributes:
        shape: of its latents, `[channels, frames, height, width]`.
        video_tokens, text_tokens: rows that it puts through the transformer; the text is its longest caption.
    """

    clip: Clip
    shape: tuple[int, ...]
    video_tokens: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens
