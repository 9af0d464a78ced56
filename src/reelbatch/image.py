"""An image that a request gives: opened safely, checked and hashed once, at the door.

A file from outside is data: its size is bounded before it is read, its pixels before they are decoded, and only the
formats named here are tried. What it shows is its pixels upright (EXIF's orientation applied), without transparency
(laid over white), in RGB.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from PIL import Image, ImageOps, UnidentifiedImageError

from reelbatch.wording import printable, shorten, shown_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_KNOWN = 4096
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
"""8192 × 8192: decoded, 192 MiB."""


@dataclass(frozen=True)
class ImageSource:
    """Where an image is, and what is known of it. Two are equal if their bytes are.

    Attributes:
        sha256: of the file's bytes, in hexadecimal.
        height, width: in pixels, as shown.
        path: of the file; None for an image that was given as bytes.
        data: those bytes.
    """

    sha256: str
    height: int = field(compare=False)
    width: int = field(compare=False)
    path: Path | None = field(default=None, compare=False)
    data: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def read(cls, given: Any) -> Self:
        """Of a path, of a file's bytes, or of what `record` gave.

        Raises:
            ValueError: for anything else, and for a file that cannot be read, is too large, is no image, or is not the
                one that was recorded.
        """
        if isinstance(given, cls):
            return given
        expected = None
        if isinstance(given, dict):
            if not {"sha256"} < given.keys() <= {"sha256", "path", "data"}:
                raise ValueError('must be a path, bytes, or {"sha256": …, "path" or "data": …}')
            expected = given["sha256"]
            given = given["path"] if "path" in given else _decoded(given["data"])
        if isinstance(given, bytes):
            path, data = None, given
        elif isinstance(given, str | Path) and str(given).strip():
            path = _path_of(given)
            data = _bytes_of(path)
        else:
            raise ValueError("must be the path of an image file, or its bytes")
        name = "the image" if path is None else _shown(path)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{name}: is {len(data)} bytes; at most {MAX_BYTES} are read")
        digest = hashlib.sha256(data).hexdigest()
        if expected not in (None, digest):
            raise ValueError(f"{name}: is not the image that it was when this request was recorded; put that one back")
        try:
            height, width = _known_sizes.of(digest, data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return cls(digest, height, width, path, None if path else data)

    @classmethod
    def recorded(cls, record: Mapping[str, str]) -> Self:
        """Of what `record` gave, without looking at it: `open` does. Height and width are not known, and 0."""
        if "path" in record:
            return cls(record["sha256"], 0, 0, Path(record["path"]))
        return cls(record["sha256"], 0, 0, data=_decoded(record.get("data")))

    @property
    def record(self) -> dict[str, str]:
        """As `read` takes it, in JSON."""
        if self.path is not None:
            return {"sha256": self.sha256, "path": str(self.path)}
        return {"sha256": self.sha256, "data": base64.b64encode(self.data or b"").decode()}

    def open(self) -> Image.Image:
        """The pixels.

        Raises:
            ValueError: if the file is gone, or is another by now.
        """
        data = self.data if self.path is None else _bytes_of(self.path)
        if data is None or hashlib.sha256(data).hexdigest() != self.sha256:
            name = "the image" if self.path is None else _shown(self.path)
            raise ValueError(f"{name}: is not the image that it was when it was asked for; put that one back")
        return _open(data)


def _shown(path: str | Path) -> str:
    return printable(shorten(str(path), 200))


def _path_of(given: str | Path) -> Path:
    try:
        os.fsencode(given)
        return Path(given).expanduser().absolute()
    except (UnicodeEncodeError, RuntimeError):  # half a character; "~" of somebody who is not known here
        raise ValueError(f"{_shown(given)}: is no path of a file") from None


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ValueError(f"{_shown(path)}: no such image file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{_shown(path)}: cannot be read: {error.strerror}") from None


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error):
        raise ValueError("data must be the image file's bytes in base64") from None


class _KnownSizes(OrderedDict[str, tuple[int, int]]):
    """Height and width by the hash of the bytes, of the last images that were decoded to their end."""

    def of(self, digest: str, data: bytes) -> tuple[int, int]:
        if digest not in self:
            image = _open(data)
            self[digest] = image.height, image.width
            if len(self) > MAX_KNOWN:
                self.popitem(last=False)
        return self[digest]


_known_sizes = _KnownSizes()


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"has {image.width} × {image.height} pixels; at most {MAX_PIXELS} in all are read")
                upright = ImageOps.exif_transpose(image)
                return _flat(upright)
    except UnidentifiedImageError:
        raise ValueError(f"is no image in any of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"has far more than the {MAX_PIXELS} pixels that are read") from None
    except (MemoryError, ValueError):
        raise
    except Exception as error:  # decoders raise what they like for bytes that make no sense
        raise ValueError(f"is a damaged image: {shown_line(str(error)) or type(error).__name__}") from None


def _flat(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    white = Image.new("RGBA", pixels.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, pixels).convert("RGB")


def blank() -> ImageSource:
    """A white pixel: stands for any image where only the size of the video counts."""
    return ImageSource.read(_blank_bytes())


@lru_cache(maxsize=1)
def _blank_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(file, "PNG")
    return file.getvalue()
