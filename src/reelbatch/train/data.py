"""The clips of a training run: which files there are, their captions, and their frames by stated rules.

A source is one of

- a folder with `metadata.jsonl` or `metadata.csv` (the video-folder layout of Hugging Face Datasets): a row a file, its
  path under `file_name`, its caption under `text` or `caption`;
- a folder without: every video and image in it and below, each with a `.txt` of its name beside it;
- a `.jsonl` or `.csv` file with such rows; paths are relative to it.

A caption may be a list of captions: one of them is drawn whenever the clip is. An image is a video of one frame.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
FILE_COLUMNS = ("file_name", "path", "video", "file")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")
SHOWN_FAULTS = 20
ON_TIME = 1e-3
"""Share of a frame by which a time stamp may be late: they are rounded in files."""

UNREADABLE = (av.FFmpegError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, MemoryError, IndexError)
"""What PyAV and Pillow raise for files that they cannot decode."""

Frames = NDArray[np.uint8]


class DataError(ValueError):
    """Data that cannot be trained on: a line for each fault, the first 20 of them."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        more = len(faults) - SHOWN_FAULTS
        super().__init__("\n".join([*faults[:SHOWN_FAULTS], *([f"… and {more} more"] if more > 0 else [])]))


class BrokenClip(ValueError):
    """One file that cannot be used; the others can."""


@dataclass(frozen=True)
class Clip:
    """A file and what it shows, in one wording or in several."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ClipRules:
    """How a file becomes a clip that the model can take.

    1. Time: frame i of the clip is the frame of the file nearest to i / fps seconds after its first (the earlier of two
       equally near). A slower file repeats frames. `fps=None` takes the frames as they are.
    2. Length: the first frames, as many as are `temporal_stride · k + 1` and at most `max_frames`.
    3. Size: never larger. A picture of more than `max_pixels` (width × height) is scaled down to them; sides become
       multiples of `spatial_stride`, and what is over is cropped, as much on the left as on the right.
    """

    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None
    spatial_stride: int = 16
    temporal_stride: int = 4

    def length(self, frames: int) -> int:
        """Frames that are left of so many."""
        count = min(frames, self.max_frames or frames)
        return count - (count - 1) % self.temporal_stride

    def scale(self, height: int, width: int) -> float:
        """Factor of the sides of a picture of this size, 1 or less."""
        return min(1.0, math.sqrt((self.max_pixels or height * width) / (height * width)))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture of this size gets. Raises BrokenClip where nothing would be left."""
        scale, stride = self.scale(height, width), self.spatial_stride
        fitted = [int(side * scale + 1e-6) // stride * stride for side in (height, width)]
        if 0 in fitted:
            scaled = (
                "" if scale == 1 else f", {int(width * scale)}×{int(height * scale)} by max_pixels={self.max_pixels}"
            )
            raise BrokenClip(f"is {width}×{height}{scaled}, less than the {stride} pixels a side that the model needs")
        return fitted[0], fitted[1]

    def as_text(self) -> str:
        """The same text for the same rules."""
        return json.dumps(asdict(self), sort_keys=True)


# Which clips ------------------------------------------------------------------------------------------------------


def find_clips(sources: Iterable[str | Path]) -> list[Clip]:
    """The clips of all sources, in the order that they list them (folders without a list: by name).

    Raises:
        DataError: with every fault: a source that is not there, a file that is not there or has no caption, a list with
            wrong columns.
    """
    clips: list[Clip] = []
    faults: list[str] = []
    for source in map(Path, sources):
        for result in _clips_of(source):
            if isinstance(result, Clip):
                clips.append(result)
            else:
                faults.append(result)
    if faults:
        raise DataError(faults)
    if not clips:
        raise DataError(["no data: name folders of captioned videos, or .jsonl/.csv files that list them (data)"])
    return clips


def _clips_of(source: Path) -> Iterator[Clip | str]:
    if source.is_dir():
        listed = [source / name for name in METADATA if (source / name).is_file()]
        yield from _listed(listed[0]) if listed else _beside(source)
    elif not source.exists():
        yield f"{source}: no such file or folder"
    elif source.suffix.lower() in {".jsonl", ".ndjson", ".csv"}:
        yield from _listed(source)
    else:
        yield f"{source}: is a {source.suffix or 'file'}; give a folder, or a .jsonl or .csv file that lists videos"


def _beside(folder: Path) -> Iterator[Clip | str]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEOS | IMAGES)
    if not files:
        yield f"{folder}: holds no video or image ({', '.join(sorted(VIDEOS | IMAGES))})"
    for file in files:
        note = file.with_suffix(".txt")
        try:
            caption = note.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            yield f"{file}: has no caption; write one into {note.name} beside it, or list all in {METADATA[0]}"
        except (OSError, UnicodeDecodeError) as error:
            yield f"{note}: cannot be read: {error}"
        else:
            yield Clip(file, (caption,)) if caption else f"{note}: is empty; a caption says what {file.name} shows"


def _listed(path: Path) -> Iterator[Clip | str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield f"{path}: cannot be read: {error}"
        return
    rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text)
    empty = True
    for line, row in rows:
        empty = False
        where = f"{path}, line {line}"
        yield f"{where}: {row}" if isinstance(row, str) else _clip(path.parent, where, row)
    if empty:
        yield f"{path}: lists nothing"


def _clip(folder: Path, where: str, row: Mapping[str, Any]) -> Clip | str:
    name, caption = (_first(row, columns) for columns in (FILE_COLUMNS, CAPTION_COLUMNS))
    if name is None or caption is None:
        return f"{where}: has {_quoted(row)}; expected file_name, and text or caption"
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(one, str) and one.strip() for one in captions):
        return f"{where}: the caption of {name} is {caption!r}; expected a text, or a list of texts"
    file = folder / str(name)
    if not file.is_file():
        return f"{where}: there is no file {file}"
    return Clip(file, tuple(one.strip() for one in captions))


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)


def _quoted(row: Mapping[str, Any]) -> str:
    return "the columns " + ", ".join(map(repr, row)) if row else "no columns"


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, f"is no JSON ({error})"
                continue
            yield number, row if isinstance(row, dict) else 'expected an object, as {"file_name": "a.mp4", "text": "…"}'


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = [name or "" for name in reader.fieldnames or []]
    if not set(columns) & set(FILE_COLUMNS) or not set(columns) & set(CAPTION_COLUMNS):
        yield 1, f"has the columns {', '.join(map(repr, columns))}; expected file_name and text (or caption)"
        return
    for row in reader:
        yield reader.line_num, {name: cell for name, cell in row.items() if cell not in (None, "") and name}


# Their frames -----------------------------------------------------------------------------------------------------


def read_clip(path: Path, rules: ClipRules) -> Frames:
    """The frames of a file by these rules, uint8 `[frames, height, width, 3]`, RGB. Raises BrokenClip."""
    try:
        frames = _image(path) if path.suffix.lower() in IMAGES else _video(path, rules)
    except UNREADABLE as error:
        if isinstance(error, BrokenClip):
            raise BrokenClip(f"{path}: {error}") from None
        raise BrokenClip(f"{path}: cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not frames:
        raise BrokenClip(f"{path}: holds no frame")
    kept = frames[: rules.length(len(frames))]
    try:
        return np.stack([_fit(frame, rules) for frame in kept])
    except BrokenClip as error:
        raise BrokenClip(f"{path}: {error}") from None


def _image(path: Path) -> list[Frames]:
    with Image.open(path) as image:
        return [np.asarray(ImageOps.exif_transpose(image).convert("RGB"))]


def _video(path: Path, rules: ClipRules) -> list[Frames]:
    """The frames by the first two rules; decoding ends as soon as there are enough."""
    enough = rules.max_frames or math.inf
    chosen: list[av.VideoFrame] = []
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise BrokenClip("has no video in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if rules.fps is None:
            for frame in container.decode(stream):
                chosen.append(frame)
                if len(chosen) >= enough:
                    break
        else:
            chosen = list(_nearest(_timed(container, stream), rules.fps, enough))
        turned: dict[int, Frames] = {}
        return [turned.setdefault(id(frame), _upright(frame)) for frame in chosen]


def _timed(container: Any, stream: Any) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames with their seconds after the first one."""
    first, rate = None, float(stream.average_rate or 24)
    for index, frame in enumerate(container.decode(stream)):
        time = frame.time if frame.time is not None else index / rate
        first = time if first is None else first
        yield time - first, frame


def _nearest(frames: Iterable[tuple[float, av.VideoFrame]], fps: float, enough: float) -> Iterator[av.VideoFrame]:
    """The frame nearest to each of 0, 1 / fps, 2 / fps, … up to the time of the last one."""
    count = 0
    last: tuple[float, av.VideoFrame] | None = None
    for time, frame in frames:
        if last is not None:
            while count <= (last[0] + time) / 2 * fps + ON_TIME and count < enough:
                yield last[1]
                count += 1
        if count >= enough:
            return
        last = time, frame
    while last is not None and count <= last[0] * fps + ON_TIME and count < enough:
        yield last[1]
        count += 1


def _upright(frame: av.VideoFrame) -> Frames:
    turns = round(getattr(frame, "rotation", 0) / 90)
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _fit(frame: Frames, rules: ClipRules) -> Frames:
    """By the third rule."""
    height, width = rules.size(*frame.shape[:2])
    if rules.scale(*frame.shape[:2]) < 1:
        scale = max(height / frame.shape[0], width / frame.shape[1])
        size = (max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale)))
        frame = np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.LANCZOS))
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])
