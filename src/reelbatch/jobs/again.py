"""A video made again from its record alone: what the record says, and what may set the two apart."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelbatch.formats import decode, encode, format_of
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.inspection import ModelInfo
from reelbatch.loading.lora import lora_label, lora_record
from reelbatch.request import RequestDefaults, RequestError, VideoRequest
from reelbatch.video import Video, embedded_record, sidecar

MOST_BYTES = 2**24
"""A sidecar of more is none of ours."""
SETTINGS = ("device", "dtype", "isolation", "attention")
"""Entries of a record that options of the same names set."""
DEPENDS_ON = ("weights", "lora", "processor", "threads", *SETTINGS, "versions", "vae_tiles")
"""Entries of a record that frames depend on, besides the request."""
ALLOWED_LOSS = 1.0
"""Levels of 255 by which a file's pictures may be further from the frames than those of a file encoded now: encoders
change from version to version."""


@dataclass(frozen=True)
class Recorded:
    """A video on disk and its record. source: the file that the record was read from."""

    path: Path
    source: Path
    record: Mapping[str, Any]
    request: VideoRequest
    frames_sha256: str

    @property
    def unrecorded(self) -> list[str]:
        """What frames depend on and this record, of an earlier version, does not hold."""
        return [name for name in DEPENDS_ON if name not in self.record]


def read_recorded(path: Path) -> Recorded:
    """The record of a video from the sidecar beside it; where there is none, from the video itself.

    Raises:
        FileNotFoundError: if there is no record.
        ValueError: for a record that is damaged, with the file and what is wrong.
    """
    source = sidecar(path)
    record: dict[str, Any] | None
    if source.exists():
        record = _read_sidecar(source)
    else:
        source, record = path, embedded_record(path)
        if record is None:
            there = "carries no record itself" if path.exists() else "is not there either"
            raise FileNotFoundError(
                f"{path}: there is no sidecar {sidecar(path).name} beside it, and the video {there}; give a video that "
                "reelbatch made, with its sidecar"
            )
    request, frames = record.get("request"), record.get("frames_sha256")
    if not isinstance(request, dict) or not isinstance(frames, str) or not re.fullmatch("[0-9a-f]{64}", frames):
        raise ValueError(f"{source}: is damaged or no sidecar: it lacks the request or frames_sha256")
    try:
        return Recorded(path, source, record, VideoRequest(**request), frames)
    except (RequestError, TypeError) as error:
        raise ValueError(f"{source}: its request cannot be made: {error}") from None


def _read_sidecar(path: Path) -> dict[str, Any]:
    remedy = "the video itself carries the same record: without this file, that one is used"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"has more than {MOST_BYTES >> 20} MiB")
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("is no JSON object")
    except OSError as error:
        raise OSError(f"{path}: the sidecar cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the sidecar is damaged: {error}; {remedy}") from None
    return record


def model_of(recorded: Recorded) -> str:
    """The model's name, without its LoRAs; "" if the record has none."""
    return str(recorded.record.get("model", "")).split(" + ")[0]


def settings_of(recorded: Recorded) -> dict[str, Any]:
    """Values of the options that set what the record says."""
    values = {name: recorded.record[name] for name in SETTINGS if isinstance(recorded.record.get(name), str)}
    if "dtype" in values:
        values["dtype"] = re.sub(r"int8 in \w+", "int8", values["dtype"])
    return values


def check_model(recorded: Recorded, info: ModelInfo, loras: Sequence[tuple[Path, float]]) -> None:
    """Reads pieces of the weight files and whole LoRA files, and loads nothing.

    Raises:
        ValueError: if the model or a LoRA is another than the record's, or a LoRA file cannot be read.
    """
    weights = weights_hash(info.folder)
    known = recorded.record.get("weights")
    if known is not None and known != weights:
        raise ValueError(
            f"{recorded.path} was made by the model {model_of(recorded)} with weights {_short(known)}, and "
            f"{info.folder} has weights {_short(weights)}: give the model it was made by with --model"
        )
    given = [lora_record(path, scale) for path, scale in loras]
    wanted = recorded.record.get("lora")
    if isinstance(wanted, list) and all(isinstance(lora, dict) for lora in wanted):
        same = [_lora_key(lora) for lora in given] == [_lora_key(lora) for lora in wanted]
        labels = [f"{lora.get('file')}:{lora.get('scale')} ({_short(lora.get('sha256'))})" for lora in wanted]
    else:  # earlier versions named them beside the model, with the beginning of their hashes
        labels = str(recorded.record.get("model", "")).split(" + ")[1:]
        same = [lora_label(path, scale) for path, scale in loras] == labels
    if not same:
        made_with = " + ".join(labels) or "no LoRA"
        now = " + ".join(lora_label(path, scale) for path, scale in loras) or "none"
        raise ValueError(
            f"{recorded.path} was made with {made_with}, and given is {now}: give the same files, scales and order "
            "with --lora FILE:SCALE"
        )


def _lora_key(lora: Mapping[str, Any]) -> tuple[Any, Any]:
    return lora.get("sha256"), lora.get("scale")


def _short(digest: object) -> str:
    return f"{str(digest)[:12]}…"


@dataclass(frozen=True)
class OnDisk:
    """A file's pictures against the frames made again; mean absolute differences in levels of 255.

    Attributes:
        loss: of the file's pictures. new_loss: of those of a file encoded now in the same format.
        problem: why there is nothing to compare; None if there is.
    """

    loss: float | None = None
    new_loss: float | None = None
    problem: str | None = None

    @property
    def is_of_these_frames(self) -> bool:
        return self.loss is not None and self.new_loss is not None and self.loss <= 2 * self.new_loss + ALLOWED_LOSS


@dataclass(frozen=True)
class Comparison:
    """A video made again, next to the one that was recorded.

    Attributes:
        equal: whether the frames are the same, bit for bit, by their hashes.
        differences: in what the frames depend on, a line each.
        file: None if the video is not there; its record alone was used.
    """

    equal: bool
    differences: tuple[str, ...]
    file: OnDisk | None


def compare(recorded: Recorded, video: Video) -> Comparison:
    return Comparison(
        recorded.frames_sha256 == video.frames_sha256,
        tuple(_differences(recorded.record, video.record)),
        _on_disk(recorded.path, video) if recorded.path.exists() else None,
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in DEPENDS_ON:
        if name == "versions" and isinstance(before.get(name), dict):
            for library, version in now[name].items():
                if before[name].get(library) != version:
                    yield f"{library} was {before[name].get(library)} and is {version}"
        elif name in before and before[name] != now.get(name):
            yield f"{name} was {before[name]!r} and is {now.get(name)!r}"
    for when, record in (("then", before), ("now", now)):
        if record.get("fallbacks"):
            yield f"memory ran out {when}, which changed: {record['fallbacks']}"
    if before.get("isolation") == "packed":
        mates = (before.get("batch") or {}).get("mates") or []
        yield f"it was made in packed isolation beside {len(mates)} others, which is equal to rounding only"


def _on_disk(path: Path, video: Video) -> OnDisk:
    try:
        there = decode(path)
    except (OSError, ValueError) as error:
        return OnDisk(problem=f"cannot be decoded: {error}")
    if there.shape != video.frames.shape:
        return OnDisk(problem=f"holds {there.shape[:3]} frames, rows and columns, and not {video.frames.shape[:3]}")
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, f"new{path.suffix}")
        comment = json.dumps(video.record, default=str)
        encode(video.frames, video.request.fps or RequestDefaults.fps, new, format_of(path), comment)
        again = decode(new)
    return OnDisk(_mean_difference(there, video), _mean_difference(again, video))


def _mean_difference(pictures: np.ndarray[Any, Any], video: Video) -> float:
    return float(np.abs(pictures.astype(np.int16) - video.frames).mean())
