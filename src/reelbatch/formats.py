"""The formats of a video on disk: H.264 in mp4, VP9 in webm, GIF, and a folder of PNG pictures, one a frame.

Each carries a text, the video's record: mp4 and webm in their `comment`, GIF in its comment, PNG in that of the first
picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageSequence, PngImagePlugin

from reelbatch.files import sync

Frames = NDArray[np.uint8]
Format = Literal["mp4", "gif", "webm", "png"]

ENDINGS: dict[Format, str] = {"mp4": ".mp4", "gif": ".gif", "webm": ".webm", "png": ""}
"""Of a file's name; a folder of pictures has none."""
ENCODERS: dict[Format, tuple[str, dict[str, str], dict[str, str]]] = {
    "mp4": ("libx264", {"crf": "12"}, {"movflags": "faststart"}),
    "webm": ("libvpx-vp9", {"crf": "12", "b": "0", "deadline": "good", "cpu-used": "2"}, {}),
}
"""Encoder, its options and those of the container. Near lossless: little videos keep their colours, large ones are
still small next to what they cost."""
PICTURE = re.compile(r"\d{4,}\.png")
LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")
GIF_PALETTE_FRAMES = 16
"""Frames that a GIF's 256 colours are chosen from."""


def format_of(path: Path) -> Format:
    """By the ending of the name; a name without one is a folder of pictures.

    Raises:
        ValueError: for another ending.
    """
    ending = path.suffix.lower()
    known = {own: name for name, own in ENDINGS.items()}
    if ending not in known:
        raise ValueError(f"{path}: videos are saved as .mp4, .gif or .webm, or, without an ending, as a folder of PNG")
    return known[ending]


def check_format(name: str) -> None:
    """Raises ValueError for a format that there is not, or that this build of PyAV cannot write."""
    if name not in get_args(Format):
        raise ValueError(f"format {name!r} is unknown; give {', '.join(get_args(Format))}")
    for known, (encoder, *_) in ENCODERS.items():
        if known == name and not _has_encoder(encoder):
            raise ValueError(f"this build of PyAV cannot write {name}: it has no {encoder}; give gif or png")


def _has_encoder(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except ValueError:
        return False
    return True


def encode(frames: Frames, fps: int, path: Path, format: Format, comment: str) -> None:
    """Writes a file, or for PNG a folder that is not there yet; all of it is on the disk afterwards.

    Args:
        frames: uint8 `[frames, height, width, 3]`, RGB.
        comment: ASCII.

    Raises:
        ValueError: for odd sizes in mp4, which H.264 does not have.
        OSError: if it cannot be written.
    """
    if format == "png":
        _write_pictures(frames, path, comment)
    elif format == "gif":
        _write_gif(frames, fps, path, comment)
    else:
        _write_stream(frames, fps, path, format, comment)
    sync(path)


def decode(path: str | Path) -> Frames:
    """The frames of a video file or of a folder of pictures, uint8 `[frames, height, width, 3]`, RGB.

    PNG gives what was saved; GIF has 256 colours; H.264 and VP9 are near what was saved, not equal.

    Raises:
        OSError, ValueError: for what cannot be read or decoded.
    """
    path = Path(path)
    if path.is_dir():
        pictures = pictures_in(path)
        if not pictures:
            raise ValueError(f"{path} holds no pictures 0000.png, 0001.png, …")
        return np.stack([_picture(file) for file in pictures])
    if path.suffix.lower() == ".gif":
        return np.stack(list(_gif_frames(path)))
    with _errors_of(path), av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def comment_of(path: str | Path) -> str:
    """The text that a video carries; "" if it has none. Raises OSError or ValueError for what cannot be read."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".gif":
        pictures = pictures_in(path) if path.is_dir() else [path]
        if not pictures:
            return ""
        with _errors_of(pictures[0]), Image.open(pictures[0], formats=["PNG", "GIF"]) as image:
            text = image.info.get("Comment", image.info.get("comment", ""))
        return text.decode("ascii", "replace") if isinstance(text, bytes) else str(text)
    with _errors_of(path), av.open(str(path)) as container:
        tags = {name.lower(): value for name, value in container.metadata.items()}
    return tags.get("comment", "")


def pictures_in(folder: Path) -> list[Path]:
    """Those of a video's frames, in their order."""
    return sorted((file for file in folder.iterdir() if PICTURE.fullmatch(file.name)), key=lambda file: int(file.stem))


def holds_only_pictures(path: Path) -> bool:
    """Whether it is a folder, no link to one, with nothing in it but a video's frames and what file managers leave."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(PICTURE.fullmatch(file.name) or file.name in LEFT_BY_SYSTEMS for file in path.iterdir())


def digest(path: Path) -> tuple[str, int]:
    """SHA-256, in hex, and size in bytes of a file; of a folder, over its pictures' names, sizes and bytes.

    Raises:
        OSError: if it cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), os.fstat(stream.fileno()).st_size
    whole, total = hashlib.sha256(), 0
    for picture in pictures_in(path):
        data = picture.read_bytes()
        whole.update(f"{picture.name}:{len(data)}:".encode())
        whole.update(data)
        total += len(data)
    return whole.hexdigest(), total


def size(path: Path) -> int:
    """Bytes of a file, or of a folder's pictures. Raises OSError if it is not there."""
    return sum(picture.stat().st_size for picture in pictures_in(path)) if path.is_dir() else path.stat().st_size


def remove(path: Path) -> None:
    """A video, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- pictures ---------------------------------------------------------------------------------------


def _write_pictures(frames: Frames, folder: Path, comment: str) -> None:
    folder.mkdir()
    digits = max(4, len(str(len(frames) - 1)))
    for number, frame in enumerate(frames):
        about = PngImagePlugin.PngInfo()
        if number == 0:
            about.add_text("Comment", comment)
        picture = folder / f"{number:0{digits}}.png"
        Image.fromarray(frame).save(picture, format="PNG", pnginfo=about)
        sync(picture)


def _picture(path: Path) -> Frames:
    with _errors_of(path), Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Whatever Pillow and PyAV raise for a broken file is an OSError or a ValueError."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except (SyntaxError, LookupError, TypeError, EOFError, av.FFmpegError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


# -- GIF --------------------------------------------------------------------------------------------


def _gif_start(number: int, fps: int) -> int:
    """When a frame begins, in hundredths of a second: GIF knows no smaller part. Browsers show none for less than 2."""
    return 2 * number if fps >= 50 else round(100 * number / fps)


def _write_gif(frames: Frames, fps: int, path: Path, comment: str) -> None:
    sampled = frames[np.linspace(0, len(frames) - 1, min(GIF_PALETTE_FRAMES, len(frames))).round().astype(int)]
    palette = Image.fromarray(np.concatenate(list(sampled))).quantize(256)  # one for all frames: none flickers
    first, *others = (Image.fromarray(frame).quantize(palette=palette) for frame in frames)
    starts = [_gif_start(number, fps) for number in range(len(frames) + 1)]
    lengths = [10 * (end - start) for start, end in pairwise(starts)]
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=lengths if others else lengths[0],
        loop=0,
        comment=comment.encode("ascii"),
    )


def _gif_frames(path: Path) -> Iterator[Frames]:
    """Equal frames that follow one another are one picture in the file, which lasts as long as all of them."""
    with _errors_of(path), Image.open(path, formats=["GIF"]) as image:
        fps, most = _gif_timing(image.info.get("comment"))
        number, now = 0, 0
        for picture in ImageSequence.Iterator(image):
            frame = np.asarray(picture.convert("RGB"))
            yield frame
            number, now = number + 1, now + round(picture.info.get("duration", 0) / 10)
            while fps and number < most and _gif_start(number, fps) < now:
                yield frame
                number += 1


def _gif_timing(comment: Any) -> tuple[int, int]:
    """Frames a second and their number, as the record in a GIF has them; 0 for a GIF of others."""
    try:
        request = json.loads(comment)["request"]
        fps, frames = request["fps"], request["frames"]
    except (TypeError, ValueError, KeyError, RecursionError):
        return 0, 0
    return (fps, frames) if type(fps) is type(frames) is int and fps > 0 else (0, 0)


# -- mp4 and webm -----------------------------------------------------------------------------------


def _write_stream(frames: Frames, fps: int, path: Path, format: Format, comment: str) -> None:
    """4:2:0, BT.709 and marked so, for every player to show the same colours."""
    height, width = frames.shape[1:3]
    if format == "mp4" and (height % 2 or width % 2):
        raise ValueError(f"H.264 needs even sizes, and the frames are {width}×{height}")
    encoder, options, of_container = ENCODERS[format]
    with av.open(str(path), "w", format=format, options=of_container) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream(encoder, rate=fps, width=width, height=height, options=options)
        assert isinstance(stream, av.VideoStream)
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
