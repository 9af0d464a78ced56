"""The clips of a run, encoded: which are trained on, which are held out, which cannot be used."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from reelbatch.device import cache_folder
from reelbatch.models.family import TrainableFamily
from reelbatch.request import ModelLimits
from reelbatch.train.batches import generator_of
from reelbatch.train.cache import Encoded, EncodedClips
from reelbatch.train.config import TrainConfig
from reelbatch.train.data import BrokenClip, Clip, ClipRules, DataError, find_clips
from reelbatch.wording import duration

LOG_EVERY_SECONDS = 10.0
"""How often encoding logs how far it is."""


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


def make_dataset(
    config: TrainConfig, family: TrainableFamily, accelerator: Accelerator, log: Callable[[str], None]
) -> Dataset:
    """Encodes what is not in the cache, a share of it on each device, and finds out what can be used.

    Raises:
        DataError: if nothing is left to train on, and what `find_clips` raises.
    """
    train, held_out = _divided(config)
    folder = config.cache or cache_folder() / "encoded"
    encoded = EncodedClips(folder, family, _rules(config, family.limits))
    clips = train + held_out
    own_share = _encode(encoded, clips, accelerator, log)
    results = sorted(gather_object(own_share) if accelerator.num_processes > 1 else own_share)
    usable = {
        number: Encoded(clips[number], shape, family.geometry.grid(shape).tokens, rows)
        for number, shape, rows in (result for result in results if len(result) == 3)
    }
    dataset = Dataset(
        clips=tuple(usable[i] for i in range(len(train)) if i in usable),
        held_out=tuple(usable[i] for i in range(len(train), len(clips)) if i in usable),
        skipped=tuple(str(result[1]) for result in results if len(result) == 2),
        encoded=encoded,
    )
    if not dataset.clips:
        raise DataError(["none of the files can be used:", *dataset.skipped])
    _summarise(config, dataset, log)
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


def _rules(config: TrainConfig, limits: ModelLimits) -> ClipRules:
    d = limits.defaults
    return ClipRules(
        fps=config.fps or d.fps,
        max_frames=config.max_frames or d.frames,
        max_pixels=config.max_pixels or d.height * d.width,
        spatial_stride=limits.spatial_stride,
        temporal_stride=limits.temporal_stride,
    )


Result = tuple[int, tuple[int, ...], int] | tuple[int, str]
"""Number of a clip, shape of its latents and rows of its conditioning at most; or number and fault."""


def _encode(
    encoded: EncodedClips, clips: Sequence[Clip], accelerator: Accelerator, log: Callable[[str], None]
) -> list[Result]:
    """This device's share of the clips."""
    rank, devices = accelerator.process_index, accelerator.num_processes
    results: list[Result] = []
    share = range(rank, len(clips), devices)
    started = last_log = time.monotonic()
    for count, i in enumerate(share, 1):
        try:
            latents, first_frame = encoded.clip(clips[i])
        except BrokenClip as error:
            results.append((i, str(error)))
            continue
        captions = [encoded.caption(caption) for caption in clips[i].captions]
        rows = max(encoded.family.conditioning_rows({**caption, **first_frame}) for caption in captions)
        results.append((i, tuple(latents.shape), rows))
        now = time.monotonic()
        if now - last_log > LOG_EVERY_SECONDS:
            last_log, left = now, duration((now - started) * (len(share) - count) / count)
            log(f"{count * devices} of {len(clips)} clips are encoded (about {left} left)")
    encoded.caption("")  # for samples whose caption is dropped
    return results


def _summarise(config: TrainConfig, dataset: Dataset, log: Callable[[str], None]) -> None:
    if dataset.skipped:
        log(f"{len(dataset.skipped)} files cannot be used (skipped.txt lists them):")
        for line in dataset.skipped[:5]:
            log(f"  {line}")
    log(
        f"{len(dataset.clips)} clips to train on, {len(dataset.held_out)} held out, {len(dataset.skipped)} skipped; "
        f"{dataset.encoded.newly_encoded} newly encoded"
    )
    large = sum(one.tokens > config.batch_tokens for one in dataset.clips) if config.batch_tokens else 0
    if large:
        most = max(one.tokens for one in dataset.clips)
        log(
            f"warning: {large} clips are larger than batch_tokens={config.batch_tokens} (the largest has {most}); each "
            "is a pack of its own, which takes more memory"
        )
