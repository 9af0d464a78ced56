"""Training data: which files and captions are found, what becomes of their frames, what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path

import av
import clips
import numpy as np
import pytest
import torch
from PIL import Image

from reelbatch.loading.load import load
from reelbatch.models.hunyuan_video.family import HunyuanVideo
from reelbatch.train import data
from reelbatch.train.cache import EncodedClips
from reelbatch.train.data import BrokenClip, Clip, ClipRules, DataError, find_clips, read_clip

# Which clips ------------------------------------------------------------------------------------------------------


def test_the_three_ways_to_list_clips_find_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        clips.write_video(tmp_path / f"{name}.mp4", clips.counted(1))
    rows = [{"file_name": "a.mp4", "text": "one, two"}, {"file_name": "b.mp4", "text": "three"}]
    expected = [Clip(tmp_path / "a.mp4", ("one, two",)), Clip(tmp_path / "b.mp4", ("three",))]

    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert find_clips([tmp_path / "list.jsonl"]) == expected
    for row in rows:
        (tmp_path / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    assert find_clips([tmp_path]) == expected
    (tmp_path / "metadata.csv").write_text('file_name,caption,extra\na.mp4,"one, two",1\nb.mp4,three,2\n')
    assert find_clips([tmp_path]) == expected
    rows[1]["text"] = ["three", "drei"]  # type: ignore[assignment]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert find_clips([tmp_path])[1].captions == ("three", "drei")


def test_names_and_captions_may_be_in_any_script(tmp_path: Path) -> None:
    file = clips.write_video(tmp_path / "Vidéo 猫.mp4", clips.counted(1))
    file.with_suffix(".txt").write_text("eine Katze, 一只猫", encoding="utf-8")
    assert find_clips([tmp_path]) == [Clip(file, ("eine Katze, 一只猫",))]
    row = {"file_name": file.name, "text": "кошка"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert find_clips([tmp_path]) == [Clip(file, ("кошка",))]
    assert read_clip(file, ClipRules()).shape == (1, 32, 32, 3)


def test_every_fault_of_a_list_is_told_with_its_place(tmp_path: Path) -> None:
    clips.write_video(tmp_path / "a.mp4", clips.counted(1))
    lines = [
        '{"file_name": "a.mp4"}',
        '{"file": "a.mp4", "text": ""}',
        "nonsense",
        '{"file_name": "b.mp4", "text": "x"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "wrong.csv").write_text("video_file,description\na.mp4,a cat\n")
    with pytest.raises(DataError) as caught:
        find_clips([tmp_path, tmp_path / "wrong.csv", tmp_path / "nowhere"])
    told = str(caught.value).splitlines()
    assert "line 1: has the columns 'file_name'; expected file_name, and text or caption" in told[0]
    assert "line 2: the caption of a.mp4 is ''" in told[1]
    assert "line 3: is no JSON" in told[2]
    assert "line 4: there is no file" in told[3]
    assert "line 1: has the columns 'video_file', 'description'; expected file_name and text (or caption)" in told[4]
    assert "nowhere: no such file or folder" in told[5]


def test_a_missing_or_empty_caption_beside_a_file_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        clips.write_video(tmp_path / f"{name}.mp4", clips.counted(1))
    (tmp_path / "b.txt").write_text("  \n")
    with pytest.raises(DataError, match=r"a\.mp4: has no caption; write one into a\.txt") as caught:
        find_clips([tmp_path])
    assert "b.txt: is empty" in str(caught.value)


# Their frames -----------------------------------------------------------------------------------------------------


def shades(path: Path, rules: ClipRules) -> list[int]:
    """Which frames of a `counted` video are in the clip."""
    return [int(frame[0, 0, 0]) // 10 for frame in read_clip(path, rules)]


def test_frames_are_the_nearest_in_time_and_as_many_as_the_model_takes(tmp_path: Path) -> None:
    video = clips.write_video(tmp_path / "a.mp4", clips.counted(20), rate=24)
    assert shades(video, ClipRules()) == list(range(1, 18))  # 20 frames: 4k + 1 are 17
    assert shades(video, ClipRules(max_frames=8)) == [1, 2, 3, 4, 5]
    assert shades(video, ClipRules(fps=8)) == [1, 4, 7, 10, 13]  # 7 at 8 a second, of which 5 are kept
    assert shades(video, ClipRules(fps=8, temporal_stride=1)) == [1, 4, 7, 10, 13, 16, 19]
    assert shades(video, ClipRules(fps=48, max_frames=9)) == [1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_uneven_time_stamps_are_gone_by(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.5, 0.8]
    video = clips.write_video(tmp_path / "a.mp4", clips.counted(5), rate=25, times=times)
    # at 0, 0.2, 0.4, 0.6 and 0.8 s
    assert shades(video, ClipRules(fps=5)) == [1, 3, 4, 4, 5]


def test_pictures_are_only_made_smaller_and_cropped_about_the_middle_to_the_stride(tmp_path: Path) -> None:
    rules = ClipRules()
    assert rules.size(50, 67) == (48, 64)
    frames = np.zeros((1, 50, 66, 3), np.uint8)
    frames[:, 1:49, 1:65] = 200  # what a crop of one pixel on each side leaves
    video = clips.write_video(tmp_path / "a.mp4", frames)
    assert (read_clip(video, rules) == 200).all()
    small = ClipRules(max_pixels=64 * 32)
    assert small.size(64, 128) == (32, 64)  # half a side
    assert small.size(32, 64) == (32, 64)
    image = tmp_path / "b.png"
    Image.new("RGB", (128, 64), (10, 20, 30)).save(image)
    assert read_clip(image, small).shape == (1, 32, 64, 3)
    with pytest.raises(BrokenClip, match="is 8×8, less than the 16 pixels a side"):
        rules.size(8, 8)
    with pytest.raises(BrokenClip, match="is 128×64, 11×5 by max_pixels=64, less than the 16 pixels a side"):
        ClipRules(max_pixels=64).size(64, 128)


def test_files_that_are_no_videos_are_broken_clips(tmp_path: Path) -> None:
    whole = clips.write_video(tmp_path / "a.mp4", clips.counted(3)).read_bytes()
    for name, content in (("cut.mp4", whole[: len(whole) // 2]), ("text.mp4", b"no video"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenClip, match=f"{name}: cannot be decoded"):
            read_clip(tmp_path / name, ClipRules())


def test_what_a_decoder_does_not_know_is_a_broken_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object) -> None:
        raise av.error.PatchWelcomeError(1, "not yet implemented")  # no OSError, as most of PyAV's are

    monkeypatch.setattr(data, "_video", unknown)
    with pytest.raises(BrokenClip, match=r"a\.mp4: cannot be decoded: .*not yet implemented"):
        read_clip(tmp_path / "a.mp4", ClipRules())


# What is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tiny_folder: Path) -> HunyuanVideo:
    found = load(tiny_folder, "cpu").family
    assert isinstance(found, HunyuanVideo)
    return found


def test_clips_and_captions_are_encoded_once_and_anew_where_they_changed_or_are_damaged(
    tmp_path: Path, family: HunyuanVideo
) -> None:
    clip = Clip(clips.write_video(tmp_path / "a.mp4", clips.counted(5)), ("a red cat",))

    def encoded(**rules: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        clips = EncodedClips(tmp_path / "cache", family, ClipRules(**rules))
        return clips.clip(clip)[0], clips.caption("a red cat")["text"], clips.newly_encoded

    latents, text, made = encoded()
    assert made == 2
    assert latents.shape == (4, 2, 4, 4)
    torch.testing.assert_close(text, family.text.encode("a red cat").text)
    again = encoded()
    assert again[2] == 0 and torch.equal(again[0], latents) and torch.equal(again[1], text)

    (damaged, *_) = [file for file in (tmp_path / "cache").rglob("*.safetensors") if _shape(file) == [4, 2, 4, 4]]
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1  # a flipped bit, which the format itself does not see
    damaged.write_bytes(content)
    again = encoded()
    assert again[2] == 1 and torch.equal(again[0], latents)
    damaged.write_bytes(content[:20])
    assert encoded()[2] == 1

    assert encoded(max_frames=1)[2] == 1  # other rules, another entry
    clips.write_video(clip.path, clips.counted(5)[::-1])
    other = encoded()
    assert other[2] == 1 and not torch.equal(other[0], latents)


def test_latents_are_those_of_the_vae(tmp_path: Path, family: HunyuanVideo) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3)).astype(np.uint8)
    clip = Clip(clips.write_video(tmp_path / "a.mp4", frames), ("x",))
    found = EncodedClips(tmp_path / "cache", family, ClipRules()).clip(clip)[0]
    vae = family.decoder.vae
    with torch.no_grad():
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        expected = vae.encode(video).latent_dist.mode()[0] * vae.config.scaling_factor
    torch.testing.assert_close(found, expected)


def _shape(file: Path) -> list[int] | None:
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        return content.get_slice("latents").get_shape() if "latents" in content.keys() else None  # noqa: SIM118
