"""Images from outside: opened safely, known by their bytes."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from reelbatch import VideoRequest
from reelbatch import image as room
from reelbatch.image import ImageSource
from reelbatch.jobs.job import Settings
from reelbatch.jobs.prompts import make_requests, read_entries
from reelbatch.request import ModelLimits, RequestError

SETTINGS = Settings("m", "w", "cpu", "float32", "auto", "exact")


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = encoded(PIL.Image.new("RGB", (6, 4), "red"))


def test_two_images_are_one_if_their_bytes_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    by_path, by_bytes = ImageSource.read(tmp_path / "a.png"), ImageSource.read(RED)
    assert by_path == by_bytes
    assert hash(by_path) == hash(by_bytes)
    assert (by_path.height, by_path.width) == (4, 6)
    assert by_path != ImageSource.read(encoded(PIL.Image.new("RGB", (6, 4), "blue")))
    assert by_path.open().tobytes() == by_bytes.open().tobytes() == bytes((255, 0, 0)) * 24


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_shown_upright(orientation: int) -> None:
    image = PIL.Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 4, 4))  # a mark in the corner
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    source = ImageSource.read(encoded(image, exif=exif))
    shown = source.open()
    assert (shown.width, shown.height) == (source.width, source.height)
    assert (shown.width, shown.height) == ((16, 8) if orientation < 5 else (8, 16))
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    right, bottom = corners[orientation]
    assert shown.getpixel((right * (shown.width - 1), bottom * (shown.height - 1))) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    shown = ImageSource.read(encoded(image.convert(mode))).open()
    assert shown.mode == "RGB"
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def huge_png(width: int, height: int) -> bytes:
    """A header that promises pixels which are not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "is no image in any of the formats PNG, JPEG"),
        (b"GIF89a", "is no image in any of the formats"),
        (encoded(PIL.Image.effect_noise((64, 64), 50))[:-500], "is a damaged image"),
        (huge_png(10_000, 10_000), "has 10000 × 10000 pixels; at most 67108864"),
        (huge_png(60_000, 60_000), "has far more than the 67108864 pixels that are read"),
        (encoded(PIL.Image.new("RGB", (2, 2)), "TIFF"), "is no image in any of the formats"),
        ("no/such.png", r"no/such\.png: no such image file"),
        ("half \ud800 a character.png", "is no path of a file"),
        ("~nobody-has-this-name/a.png", "is no path of a file"),
        ("x" * 5000, "File name too long"),
        ("", "must be the path of an image file, or its bytes"),
        (3, "must be the path of an image file, or its bytes"),
        ({"path": "a.png"}, "must be a path, bytes, or"),
        ({"sha256": "0", "data": "?"}, "in base64"),
        ({"sha256": "0", "data": ""}, "is not the image that it was"),
    ],
)
def test_what_is_no_image_is_refused_in_words(given: Any, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match=f"image=.*{message}") as refused:
            VideoRequest(prompt="a", image=given)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_bytes_are_refused_in_words_or_are_an_image(kind: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    options = {} if kind == "BMP" else {"exif": exif}
    whole = encoded(PIL.Image.effect_noise((9, 7), 50).convert("RGB"), kind, **options)
    draw, refused = random.Random(kind), 0
    for _ in range(150):
        data = bytearray(whole[: draw.randrange(1, len(whole) + 1)] if draw.random() < 0.3 else whole)
        for _ in range(draw.choice([1, 1, 4, 30])):
            data[draw.randrange(len(data))] = draw.choice([0, 255, draw.randrange(256)])
        try:
            image = ImageSource.read(bytes(data)).open()
        except ValueError as error:
            assert type(error) is ValueError  # noqa: PT017
            refused += 1
        else:
            assert image.mode == "RGB"
    assert refused


def test_files_are_bounded_before_they_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_BYTES", 50)
    (tmp_path / "a.png").write_bytes(RED + b"x" * 200)
    with pytest.raises(ValueError, match="is 51 bytes; at most 50 are read"):
        ImageSource.read(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no such image file"):
        ImageSource.read(tmp_path)


def test_a_request_with_an_image_is_the_same_after_json(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), RED):
        request = VideoRequest(prompt="a", image=given)
        again = VideoRequest(**json.loads(request.model_dump_json()))
        assert again == request
        assert again.image.open().size == (6, 4)


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(RED)
    request = VideoRequest(prompt="a", image=path)
    recorded = json.loads(request.model_dump_json())
    path.write_bytes(encoded(PIL.Image.new("RGB", (6, 4), "blue")))
    with pytest.raises(ValueError, match=r"a\.png: is not the image that it was"):
        request.image.open()
    with pytest.raises(RequestError, match="is not the image that it was"):
        VideoRequest(**recorded)


def test_its_bytes_and_not_its_place_decide_about_the_fingerprint(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(RED)
    requests = [
        VideoRequest(prompt="a", seed=1, image=image) for image in (tmp_path / "a.png", tmp_path / "b.png", RED)
    ]
    assert len({SETTINGS.fingerprint(request) for request in requests}) == 1
    without = VideoRequest(prompt="a", seed=1)
    assert SETTINGS.fingerprint(without) != SETTINGS.fingerprint(requests[0])
    assert "image" not in without.model_dump()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "prompt,image\na cat,pictures/a.png\na dog,\n"),
        ("p.jsonl", '{"prompt": "a cat", "image": "pictures/a.png"}\n"a dog"\n'),
    ],
)
def test_prompt_files_name_images_beside_them(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(RED)
    (tmp_path / name).write_text(text)
    cat, dog = make_requests(read_entries(tmp_path / name))
    assert cat.image == ImageSource.read(RED)
    assert dog.image is None


LIMITS = ModelLimits(image_size=lambda height, width: (16 * height, 16 * width), tile_stride=64)


def test_without_a_size_the_video_gets_one_for_the_image() -> None:
    assert VideoRequest(prompt="a", image=RED).for_model(LIMITS).size[:2] == (64, 96)
    assert VideoRequest(prompt="a", image=RED, height=32, width=32).for_model(LIMITS).size[:2] == (32, 32)
    assert VideoRequest(prompt="a").for_model(LIMITS).size[:2] == (720, 1280)


def test_models_of_text_alone_take_no_image() -> None:
    with pytest.raises(RequestError, match="makes videos from text alone"):
        VideoRequest(prompt="a", image=RED).for_model(ModelLimits())


def test_tiles_fit_the_model() -> None:
    with pytest.raises(RequestError, match="vae_tiling=96 must be a multiple of 64 for this model; nearest: 64 or 128"):
        VideoRequest(prompt="a", vae_tiling=96).for_model(LIMITS)


@pytest.mark.parametrize(
    ("asked", "scale", "negative"),
    [
        ({}, 6.0, ""),
        ({"guidance": 3}, 3.0, ""),
        ({"true_cfg": 4, "negative_prompt": "blur"}, 4.0, "blur"),
        ({"guidance": 1, "negative_prompt": "blur"}, 1.0, "blur"),
        ({"guidance": 0}, 1.0, None),
    ],
)
def test_guidance_of_models_without_an_embedded_one_is_classifier_free(
    asked: dict[str, Any], scale: float, negative: str | None
) -> None:
    limits = ModelLimits(guidance="classifier-free")
    request = VideoRequest(prompt="a", **asked).for_model(limits)
    assert (request.true_cfg, request.negative_prompt) == (scale, negative)
    assert request.uses_cfg == (scale > 1)
    assert request.for_model(limits) == request
    assert VideoRequest(prompt="a").for_model(ModelLimits()).true_cfg == 1.0
