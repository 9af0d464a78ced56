"""Video: frames and where they came from. Writes mp4, sidecar and contact sheet; reads them back.

A finished video on disk is two files: `name.mp4` (H.264) and `name.json`, its record: the request, the model and
versions that made it, and the SHA-256 of its frames as they were before compression. The mp4 carries the same record
in its `comment`. The mp4 is written under another name and renamed, so what has its name is whole.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from reelbatch.files import PART, aside, sync
from reelbatch.request import RequestDefaults, VideoRequest

if TYPE_CHECKING:
    import torch

Frames = NDArray[np.uint8]

CRF = "12"  # near lossless: little videos keep their colours, large ones are still small next to what they cost
MADE_BY = ("model", "dtype", "isolation")  # what makes two videos of one request the same, of a record's entries


@dataclass
class Video:
    """A finished video.

    request: with every default filled in.
    frames: uint8 `[frames, height, width, 3]`, RGB.
    provenance: what it depends on (model, versions, isolation, seconds, batch, …); JSON values.
    latents: the last latents, fp32 `[channels, latent frames, latent height, latent width]`, where they were asked for.
    """

    request: VideoRequest
    frames: Frames
    provenance: dict[str, Any] = field(default_factory=dict)
    latents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3 or not self.frames.size:
            raise ValueError(
                "frames must be uint8 [frames, height, width, 3] with at least one frame, "
                f"and are {self.frames.dtype} {list(self.frames.shape)}"
            )

    @cached_property
    def frames_sha256(self) -> str:
        """SHA-256, in hex, of the frames' bytes in C order: `hashlib.sha256(video.frames.tobytes())`."""
        return hashlib.sha256(np.ascontiguousarray(self.frames).data).hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """What the sidecar says: the request, the provenance and the hash of the frames."""
        request = self.request.model_dump(mode="json")
        return {"request": request, **self.provenance, "frames_sha256": self.frames_sha256}

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes `path` (an .mp4; its folder is created if need be) and the sidecar beside it; returns the path.

        Raises:
            FileExistsError: if the video is there already, unless `overwrite`.
            ValueError: for another ending than .mp4, and for odd sizes, which H.264 does not have.
            OSError: if it cannot be written; nothing half-written bears the name.
        """
        path = Path(path)
        if not overwrite and path.exists():
            raise FileExistsError(f"{path} exists; give another name, or overwrite=True")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.written_aside(path) as written:
            written.put_in_place(overwrite)
        return path

    @contextmanager
    def written_aside(self, path: Path, folder: Path | None = None) -> Iterator[Aside]:
        """The whole file that `path` is to become, on the disk under another name; removed if it is not put in place.

        folder: where it is written, on the same file system; `path`'s own by default.

        Raises:
            ValueError: for another ending than .mp4, and for odd sizes, which H.264 does not have.
            OSError: if it cannot be written.
        """
        if path.suffix.lower() != ".mp4":
            raise ValueError(f"{path}: videos are saved as .mp4")
        part = (folder or path.parent) / f".{secrets.token_hex(8)}{PART}"
        try:
            record = json.dumps(self.record, default=str)  # ASCII: no character that an mp4 tag could not hold
            _encode(self.frames, self.request.fps or RequestDefaults.fps, part, record)
            sync(part)
            yield Aside(part, path, self.record)
        finally:
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Aside:
    """A complete video file that waits for its final name. record: what its sidecar will say."""

    part: Path
    path: Path
    record: dict[str, Any]

    def put_in_place(self, overwrite: bool = False, with_sidecar: bool = True) -> None:
        """Raises `FileExistsError` if there is a file of that name, unless `overwrite`."""
        if overwrite:
            self.part.replace(self.path)
        else:
            _place_new(self.part, self.path)
        if with_sidecar:
            write_sidecar(self.path, self.record, self.part.parent)
        sync(self.path.parent)


def sidecar(path: Path) -> Path:
    """The JSON file beside a video."""
    return path.with_suffix(".json")


def write_sidecar(path: Path, record: Mapping[str, Any], folder: Path | None = None) -> None:
    """folder: where it is written before it is put beside `path`."""
    with aside(sidecar(path), folder) as part:
        part.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_video(path: str | Path) -> Frames:
    """The frames of a video file, uint8 `[frames, height, width, 3]`, RGB; H.264 is near what was saved, not equal.

    Raises:
        OSError, ValueError: for a file that cannot be read or decoded.
    """
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record of a saved video, from its sidecar or else from the mp4 itself; None if neither has one."""
    try:
        record = json.loads(sidecar(Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return embedded_record(path)
    return record if isinstance(record, dict) else None


def embedded_record(path: str | Path) -> dict[str, Any] | None:
    """The record that an mp4 itself carries."""
    try:
        with av.open(str(path)) as container:
            record = json.loads(container.metadata.get("comment", ""))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _candidates(stem: Path) -> Iterator[Path]:
    yield stem.with_name(stem.name + ".mp4")
    number = 2
    while True:
        yield stem.with_name(f"{stem.name}-{number}.mp4")
        number += 1


def contact_sheet(videos: Iterable[Video | str | Path], path: str | Path, *, frames: int = 6) -> Path:
    """A PNG of many videos, a row each: prompt, seed and size, and up to `frames` frames from first to last.

    videos: finished ones or their files, of any mixture of sizes and lengths; read one at a time. Past 100 rows,
    columns are added and the pictures get smaller. Replaces `path`. A file that cannot be read gets a row that says so.

    Raises:
        ValueError: for no videos.
        OSError: if it cannot be written.
    """
    path = Path(path)
    sources = list(videos)
    if not sources:
        raise ValueError("a contact sheet needs a video")
    style = _Style.for_rows(len(sources), frames)
    columns = -(-len(sources) // style.rows)
    sheet = Image.new("RGB", (columns * style.row_width, min(len(sources), style.rows) * style.row_height), "white")
    end = 0
    for index, source in enumerate(sources):
        column, row = divmod(index, style.rows)
        end = max(end, _draw_row(sheet, (column * style.row_width, row * style.row_height), source, style))
    sheet = sheet.crop((0, 0, end, sheet.height))
    path.parent.mkdir(parents=True, exist_ok=True)
    shows = PngImagePlugin.PngInfo()
    shows.add_itxt("Shows", json.dumps(_shown_names(sources)))
    with aside(path) as part:
        sheet.save(part, format="PNG", pnginfo=shows)
    return path


def sheet_path(videos: Sequence[Video | str | Path], folder: Path) -> Path:
    """Where a sheet of `videos` goes in `folder`: it replaces a sheet only if it shows all that that one shows and
    that is still there."""
    names = set(_shown_names(videos))
    for candidate in _candidates(folder / "contact-sheet"):
        path = candidate.with_suffix(".png")
        if not path.exists():
            return path
        try:
            with Image.open(path) as sheet:
                shown = set(json.loads(sheet.info["Shows"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if None not in shown and not any(_can_be_seen(name, folder) for name in shown - names):
            return path
    raise AssertionError("unreachable: the candidates never end")


def _can_be_seen(name: str | None, folder: Path) -> bool:
    return name is not None and Path(name).name == name and any(folder.rglob(glob.escape(name)))


def _shown_names(videos: Iterable[Video | str | Path]) -> list[str | None]:
    """Names of files; None for videos that are in none."""
    return [None if isinstance(video, Video) else Path(video).name for video in videos]


@dataclass(frozen=True)
class _Style:
    """Measures of a contact sheet, in pixels."""

    rows: int  # in a column
    frames: int
    height: int  # of a picture
    text: int  # size of the letters

    @classmethod
    def for_rows(cls, count: int, frames: int) -> _Style:
        return cls(100, frames, 96, 13) if count <= 100 else cls(100, min(frames, 4), 48, 9)

    @property
    def gap(self) -> int:
        return self.height // 12

    @property
    def label_width(self) -> int:
        return self.height * 3

    @property
    def cell_width(self) -> int:
        return self.height * 16 // 9

    @property
    def row_height(self) -> int:
        return self.height + self.gap

    @property
    def row_width(self) -> int:
        return self.label_width + self.frames * (self.cell_width + self.gap) + 2 * self.gap


def _draw_row(sheet: Image.Image, corner: tuple[int, int], source: Video | str | Path, style: _Style) -> int:
    """Returns where the row ends, in pixels from the left of the sheet."""
    left, top = corner[0] + style.gap, corner[1] + style.gap // 2
    pictures: list[Image.Image] = []
    try:
        prompt, about, frames = _row_of(source)
    except (OSError, ValueError) as error:
        prompt, note = str(source), f"cannot be read: {error}"
    else:
        note = f"{about}{frames.shape[2]}×{frames.shape[1]}, {len(frames)} frame{'s' if len(frames) > 1 else ''}"
        spread = np.linspace(0, len(frames) - 1, min(style.frames, len(frames))).round().astype(int)
        pictures = [_fit(frames[index], style.cell_width, style.height) for index in spread]
    draw = ImageDraw.Draw(sheet)
    font, line = _font(style.text), style.text * 5 // 4
    letters = int(style.label_width / (style.text * 0.58))
    lines = textwrap.wrap(_printable(prompt), letters, max_lines=style.height // line - 1, placeholder=" …")
    for row, (text, color) in enumerate(
        [*((text, "black") for text in lines), (_printable(note)[:letters], "dimgray")]
    ):
        draw.text((left, top + row * line), text, fill=color, font=font)
    x = left + style.label_width
    for picture in pictures:
        sheet.paste(picture, (x, top + (style.height - picture.height) // 2))
        x += picture.width + style.gap
    return x


def _row_of(source: Video | str | Path) -> tuple[str, str, Frames]:
    if isinstance(source, Video):
        return source.request.prompt, f"seed {source.request.seed}, ", source.frames
    request = (read_record(source) or {}).get("request", {})
    about = f"seed {request['seed']}, " if "seed" in request else ""
    return request.get("prompt", Path(source).name), about, read_video(source)


def _fit(frame: Frames, width: int, height: int) -> Image.Image:
    scale = min(width / frame.shape[1], height / frame.shape[0])
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its DejaVu Sans knows far more letters than Pillow's own font

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _place_new(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # unlike a rename, this fails if another process was faster
    except FileExistsError:
        raise FileExistsError(f"{path} exists; give another name, or overwrite=True") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} exists; give another name, or overwrite=True") from None
        part.rename(path)


def _encode(frames: Frames, fps: int, path: Path, comment: str) -> None:
    """H.264 in mp4, 4:2:0, BT.709 and marked so, for every player to show the same colours."""
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs even sizes, and the frames are {width}×{height}")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, width=width, height=height, options={"crf": CRF})
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1  # it writes beside the next steps, whose cores and memory it leaves alone
        codec.color_range, codec.colorspace = ColorRange.MPEG, Colorspace.ITU709
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        reformatter = VideoReformatter()  # one for all frames: each sets itself up anew
        for frame in frames:
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
