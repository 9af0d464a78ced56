"""Videos on disk: whole or not there, each under a name of its own, with its record in and beside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from reelbatch import Video, VideoRequest, video
from reelbatch.video import contact_sheet, read_record, read_video, sheet_path, sidecar

MADE_BY = {"model": "demo", "dtype": "float32", "isolation": "exact"}


def make_video(prompt: str = "a red circle", frames: int = 5, height: int = 32, width: int = 48, **fields) -> Video:
    request = VideoRequest(prompt=prompt, height=height, width=width, frames=frames, **{"fps": 8, "seed": 3, **fields})
    ramp = np.linspace(30, 220, frames * height * width * 3).astype(np.uint8)
    return Video(request, ramp.reshape(frames, height, width, 3), dict(MADE_BY))


def test_a_saved_video_comes_back_with_its_size_pace_and_nearly_its_colours(tmp_path: Path) -> None:
    made = make_video()
    path = made.save(tmp_path / "deep" / "v.mp4")
    found = read_video(path)
    assert found.shape == made.frames.shape
    assert np.abs(found.astype(int) - made.frames).mean() < 6
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].average_rate == 8


def test_the_record_is_beside_the_video_and_within_it(tmp_path: Path) -> None:
    made = make_video("a “quoted” prompt, 日本 😀")
    path = made.save(tmp_path / "v.mp4")
    beside = json.loads(sidecar(path).read_text(encoding="utf-8"))
    assert beside["request"]["prompt"] == made.request.prompt
    assert beside["frames_sha256"] == hashlib.sha256(made.frames.tobytes()).hexdigest()
    assert beside["model"] == "demo"
    sidecar(path).unlink()
    assert read_record(path) == beside


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = make_video().save(tmp_path / "v.mp4")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        make_video(frames=9).save(path)
    assert path.read_bytes() == before
    make_video(frames=9).save(path, overwrite=True)
    assert len(read_video(path)) == 9


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_encode", fails)
    with pytest.raises(OSError, match="No space"):
        make_video().save(tmp_path / "v.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames", [np.zeros((5, 8, 8, 3)), np.zeros((5, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_frames_of_another_kind_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[frames, height, width, 3\]"):
        Video(VideoRequest(prompt="x"), frames)


def test_a_contact_sheet_has_a_row_a_video_of_any_size_and_says_what_it_cannot_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    videos = [make_video(), make_video("a very long prompt " * 30, frames=1, height=64, width=16), broken]
    three = contact_sheet(videos, tmp_path / "three.png")
    one = contact_sheet(videos[:1], tmp_path / "one.png")
    with Image.open(three) as tall, Image.open(one) as low:
        assert tall.height == 3 * low.height
        assert tall.width == low.width


def test_a_sheet_is_replaced_only_by_one_that_shows_as_much(tmp_path: Path) -> None:
    files = [make_video(seed=i).save(tmp_path / f"v{i}.mp4") for i in range(2)]
    assert sheet_path(files, tmp_path).name == "contact-sheet.png"
    contact_sheet(files, tmp_path / "contact-sheet.png")
    assert sheet_path(files, tmp_path).name == "contact-sheet.png"
    assert sheet_path(files[:1], tmp_path).name == "contact-sheet-2.png"
    files[1].unlink()  # what it shows and is gone keeps its place for nobody
    assert sheet_path(files[:1], tmp_path).name == "contact-sheet.png"
    contact_sheet([make_video()], tmp_path / "contact-sheet.png")  # of a video that is in no file
    assert sheet_path(files[:1], tmp_path).name == "contact-sheet-2.png"
