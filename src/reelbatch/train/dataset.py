"""The clips of a run, encoded: which are trained on, which are held out, which cannot be used."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from reelbatch.loading.model import Model
from reelbatch.train.batches import generator_of
from reelbatch.train.cache import Encoded, EncodedClips
from reelbatch.train.config import TrainConfig
from reelbatch.train.data import BrokenClip, Clip, ClipRules, DataError, find_clips
from reelbatch.wording import duration

TELL_EVERY_SECONDS = 10.0
"""How often encoding says how far it is."""


@dataclass(frozen=True)
class Dataset:
    """What a run learns from.

    Attributes:
        clips: those that are trained on. held_out: those of the validation loss.
        skipped: files that could not be used, with the reason.
        encoded: where latents and captions come from.
    """

    clips: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    skipped: tuple[str, ...]
    encoded: EncodedClips

    def hash(self) -> str:
        """The same for the same clips in the same order: what the numbers of samples mean."""
        known = str([(one.clip.path.name, one.clip.captions, one.shape) for one in self.clips])
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def make_dataset(config: TrainConfig, model: Model, accelerator: Accelerator, tell: Callable[[str], None]) -> Dataset:
    """Encodes what is not in the cache, a share of it on each device, and finds out what can be used.

    Raises:
        DataError: if nothing is left to train on, and what `find_clips` raises.
    """
    train, held_out = _divided(config)
    encoded = EncodedClips(config.cache or _cache_folder(), model, _rules(config, model))
    clips = train + held_out
    mine = _encode(encoded, clips, accelerator, tell)
    found = sorted(gather_object(mine) if accelerator.num_processes > 1 else mine)
    usable = {entry[0]: _known(clips[entry[0]], model, entry[1], entry[2]) for entry in found if len(entry) == 3}
    dataset = Dataset(
        clips=tuple(usable[i] for i in range(len(train)) if i in usable),
        held_out=tuple(usable[i] for i in range(len(train), len(clips)) if i in usable),
        skipped=tuple(str(entry[1]) for entry in found if len(entry) == 2),
        encoded=encoded,
    )
    if not dataset.clips:
        raise DataError(["none of the files can be used:", *dataset.skipped])
    _tell(config, dataset, tell)
    return dataset


def _divided(config: TrainConfig) -> tuple[list[Clip], list[Clip]]:
    """Clips to train on, and clips that are held out; a file that is held out is never trained on."""
    train, held_out = find_clips(config.data), find_clips(config.validation) if config.validation else []
    count = len(train)
    if config.validation_share:
        order = torch.randperm(count, generator=generator_of(config.seed, 0, 2)).tolist()
        held_out += [train[i] for i in sorted(order[: max(1, round(config.validation_share * count))])]
    apart = {clip.path.resolve() for clip in held_out}
    train = [clip for clip in train if clip.path.resolve() not in apart]
    if not train:
        raise DataError([f"all {count} clips are held out (validation, validation_share): none is left to train on"])
    return train, held_out


def _rules(config: TrainConfig, model: Model) -> ClipRules:
    limits = model.limits
    d = limits.defaults
    return ClipRules(
        fps=config.fps or d.fps,
        max_frames=config.max_frames or d.frames,
        max_pixels=config.max_pixels or d.height * d.width,
        spatial_stride=limits.spatial_stride,
        temporal_stride=limits.temporal_stride,
    )


def _encode(
    encoded: EncodedClips, clips: Sequence[Clip], accelerator: Accelerator, tell: Callable[[str], None]
) -> list[tuple[int, tuple[int, ...], int] | tuple[int, str]]:
    """This device's share: number, shape of the latents and rows of the longest caption; or number and fault."""
    rank, devices = accelerator.process_index, accelerator.num_processes
    mine: list[tuple[int, tuple[int, ...], int] | tuple[int, str]] = []
    share = range(rank, len(clips), devices)
    started = told = time.monotonic()
    for count, i in enumerate(share, 1):
        try:
            shape = tuple(encoded.latents(clips[i]).shape)
        except BrokenClip as error:
            mine.append((i, str(error)))
            continue
        mine.append((i, shape, max(len(encoded.caption(caption).text) for caption in clips[i].captions)))
        now = time.monotonic()
        if now - told > TELL_EVERY_SECONDS:
            told, left = now, duration((now - started) * (len(share) - count) / count)
            tell(f"{count * devices} of {len(clips)} clips are encoded (about {left} left)")
    encoded.caption("")  # for those whose caption is dropped
    return mine


def _known(clip: Clip, model: Model, shape: tuple[int, ...], text: int) -> Encoded:
    network = model.family.transformer.config
    _, frames, height, width = shape
    video = frames // network.patch_size_t * (height // network.patch_size) * (width // network.patch_size)
    return Encoded(clip, shape, video, text)


def _tell(config: TrainConfig, dataset: Dataset, tell: Callable[[str], None]) -> None:
    if dataset.skipped:
        tell(f"{len(dataset.skipped)} files cannot be used (skipped.txt lists them):")
        for line in dataset.skipped[:5]:
            tell(f"  {line}")
    tell(
        f"{len(dataset.clips)} clips to train on, {len(dataset.held_out)} held out, {len(dataset.skipped)} skipped; "
        f"{dataset.encoded.made} newly encoded"
    )
    large = sum(one.tokens > config.batch_tokens for one in dataset.clips) if config.batch_tokens else 0
    if large:
        most = max(one.tokens for one in dataset.clips)
        tell(
            f"warning: {large} clips are larger than batch_tokens={config.batch_tokens} (the largest has {most}); each "
            "is a pack of its own, which takes more memory"
        )


def _cache_folder() -> Path:
    from reelbatch.device import cache_folder

    return cache_folder() / "encoded"
