"""Videos in every format: whole or not there, with their record in them, and the same hash of the frames in all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reelbatch import Video, VideoRequest, formats
from reelbatch.formats import ENDINGS, Format, check_format, digest, size
from reelbatch.video import embedded_record, read_record, read_video, sidecar

PATHS = [f"v{ending}" for ending in ENDINGS.values()]
LOSS: dict[str, float] = {".mp4": 6, ".webm": 6, ".gif": 12, "": 0}
"""Levels of 255, on average; a GIF of noise is far off."""


def make_video(frames: int = 5, height: int = 32, width: int = 48, fps: int = 8, still: int = 0) -> Video:
    """A ramp of colours; its last `still` frames are one picture."""
    ramp = np.linspace(30, 220, frames * height * width * 3).astype(np.uint8).reshape(frames, height, width, 3)
    ramp[frames - still :] = ramp[-1]
    request = VideoRequest(prompt="a “red” circle, 日本 😀", height=height, width=width, frames=frames, fps=fps, seed=3)
    return Video(request, ramp, {"model": "demo", "isolation": "exact"})


@pytest.mark.parametrize("name", PATHS)
def test_a_video_comes_back_with_its_record_in_it_and_beside_it(tmp_path: Path, name: str) -> None:
    video = make_video(still=3)
    path = video.save(tmp_path / name)
    pictures = read_video(path)
    assert pictures.shape == video.frames.shape
    assert np.abs(pictures.astype(int) - video.frames).mean() <= LOSS[path.suffix]
    assert json.loads(sidecar(path).read_text(encoding="utf-8")) == embedded_record(path) == read_record(path)
    assert embedded_record(path)["frames_sha256"] == video.frames_sha256
    assert {file.name for file in tmp_path.iterdir()} == {name, "v.json"}
    assert size(path) == digest(path)[1] > 0


@settings(deadline=None, max_examples=25)
@given(fps=st.integers(1, 240), frames=st.integers(1, 12), still=st.integers(0, 12), name=st.sampled_from(PATHS))
def test_no_frame_is_lost_at_any_pace(
    tmp_path_factory: pytest.TempPathFactory, fps: int, frames: int, still: int, name: str
) -> None:
    video = make_video(frames, 16, 16, fps, min(still, frames))
    assert read_video(video.save(tmp_path_factory.mktemp("v") / name)).shape == video.frames.shape


def test_a_gif_takes_as_long_as_its_video(tmp_path: Path) -> None:
    path = make_video(25, 16, 16, fps=24).save(tmp_path / "v.gif")
    with Image.open(path) as image:
        lengths = [image.info["duration"] for i in range(image.n_frames) if image.seek(i) is None]
    assert sum(lengths) == 1040 and set(lengths) == {40, 50}


def test_png_is_a_picture_a_frame_without_loss(tmp_path: Path) -> None:
    video = make_video(height=33, width=47)
    path = video.save(tmp_path / "v")
    assert sorted(file.name for file in path.iterdir()) == [f"{i:04}.png" for i in range(5)]
    np.testing.assert_array_equal(read_video(path), video.frames)


@pytest.mark.parametrize("name", PATHS)
def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    path = make_video().save(tmp_path / name)
    before = digest(path)
    with pytest.raises(FileExistsError, match="overwrite"):
        make_video(frames=9).save(path)
    assert digest(path) == before
    make_video(frames=9).save(path, overwrite=True)
    assert len(read_video(path)) == 9
    assert {file.name for file in tmp_path.iterdir()} == {name, "v.json"}


@pytest.mark.parametrize("there", ["folder", "file", "dangling link"])
def test_a_folder_of_pictures_replaces_only_such_folders(tmp_path: Path, there: str) -> None:
    path = make_video().save(tmp_path / "v")
    if there == "folder":
        (path / "notes.txt").write_text("mine")
    else:
        formats.remove(path)
        path.write_text("mine") if there == "file" else path.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="is no folder of pictures alone; give another name"):
        make_video().save(path, overwrite=True)
    assert os.path.lexists(path) and {file.name for file in tmp_path.iterdir()} == {"v", "v.json"}


@pytest.mark.parametrize("there", ["empty folder", "file", "dangling link"])
def test_a_folder_of_pictures_takes_no_strangers_place(tmp_path: Path, there: str) -> None:
    path = tmp_path / "v"
    if there == "empty folder":
        path.mkdir()
    elif there == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")
    with make_video().written_aside(path, tmp_path) as aside, pytest.raises(FileExistsError):
        aside.put_in_place()
    assert os.path.lexists(path) and [file.name for file in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("name", PATHS)
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = []

    def fails(path: Path) -> None:
        calls.append(path)
        if len(calls) == (3 if name == "v" else 1):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "sync", fails)
    with pytest.raises(OSError, match="No space"):
        make_video().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PATHS)
def test_broken_files_raise_only_what_is_expected(tmp_path: Path, name: str) -> None:
    path = make_video().save(tmp_path / name)
    file = path / "0000.png" if path.is_dir() else path
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for broken in (b"", b"no video", whole[: len(whole) // 2], *(_changed(whole, rng) for _ in range(20))):
        file.write_bytes(broken)
        for read in (read_video, formats.comment_of):
            with suppress(OSError, ValueError):
                read(path)
        embedded_record(path)
    path = tmp_path / "empty"
    path.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        read_video(path)


def _changed(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), 8):
        changed[place] = rng.integers(256)
    return bytes(changed)


def test_a_gif_of_others_is_read_picture_by_picture(tmp_path: Path) -> None:
    pictures = [Image.new("L", (16, 16), 80 * i) for i in range(3)]
    for comment in (b"hello", b'{"request": {"fps": 0, "frames": 9}}', b'{"request": {"fps": 240, "frames": 4}}'):
        pictures[0].save(tmp_path / "v.gif", save_all=True, append_images=pictures[1:], duration=9000, comment=comment)
        assert 3 <= len(read_video(tmp_path / "v.gif")) <= 6


def test_other_endings_and_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"\.mp4, \.gif or \.webm, or, without an ending, as a folder of PNG"):
        make_video().save(tmp_path / "v.avi")
    with pytest.raises(ValueError, match="format 'avi' is unknown; give mp4, gif, webm, png"):
        check_format("avi")
    for name in ENDINGS:
        check_format(name)
    monkeypatch.setitem(formats.ENCODERS, "webm", ("libvpx-none", {}, {}))
    with pytest.raises(ValueError, match="cannot write webm: it has no libvpx-none; give gif or png"):
        check_format("webm")


@pytest.mark.parametrize(("name", "beside"), [("a.b", "a.b.json"), ("a.mp4", "a.json"), ("a.GIF", "a.json")])
def test_a_sidecar_is_named_after_the_stem(name: str, beside: str) -> None:
    assert sidecar(Path(name)).name == beside


def test_every_format_has_an_ending() -> None:
    assert set(ENDINGS) == set(Format.__args__)
