"""`generate --again`: a sidecar alone makes its video again, and what is not the same is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.engine.engine import Engine
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.video import read_video, sidecar

BEFORE = Path(__file__).parent / "fixtures" / "before" / "job"
SMALL = ["--steps", "1", "--frames", "5", "--height", "32", "--width", "32"]


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def again(*words: object) -> tuple[int, dict[str, Any], str]:
    result = call("generate", "--again", *words, "--json")
    assert result.stdout, (result.exception, result.output)
    return result.exit_code, json.loads(result.stdout), result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of one batch in each format; to be read only."""
    folder = tmp_path_factory.mktemp("made")
    for format in ("mp4", "gif", "webm", "png"):
        out = folder / format
        result = call("generate", "a red circle", "a blue cross", *SMALL, "--seed", 7, "--format", format, "--out", out)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def video(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "mp4", tmp_path / "v")
    return tmp_path / "v" / "a-red-circle-seed7.mp4"


@pytest.fixture
def change(video: Path) -> Callable[..., Path]:
    """Changes entries of the sidecar; None removes one."""

    def changed(**entries: Any) -> Path:
        record = json.loads(sidecar(video).read_text(encoding="utf-8"))
        record = {name: value for name, value in {**record, **entries}.items() if value is not None}
        sidecar(video).write_text(json.dumps(record), encoding="utf-8")
        return video

    return changed


def test_a_sidecar_holds_what_the_video_depends_on(made: Path) -> None:
    record = json.loads((made / "mp4" / "a-red-circle-seed7.json").read_text(encoding="utf-8"))
    assert record["weights"] == weights_hash(DEMO_FOLDER)
    assert (record["model"], record["lora"]) == ("demo", [])
    assert record["processor"] and record["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", ["mp4/a-red-circle-seed7.mp4", "gif/a-blue-cross-seed7.gif", "png/a-red-circle-seed7"])
def test_a_video_is_made_again_equal_and_nothing_is_written(made: Path, name: str) -> None:
    files = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    code, found, said = again(made / name)
    assert (code, found["state"], found["differences"], found["not_recorded"]) == (0, "equal", [], [])
    assert "bit for bit" in said and "the file itself holds those frames" in said
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == files


def test_it_is_written_only_where_asked_and_never_over_another(video: Path, tmp_path: Path) -> None:
    before = video.read_bytes()
    result = call("generate", "--again", video, "--out", video.parent)
    assert isinstance(result.exception, FileExistsError) and "--overwrite" in str(result.exception)
    code, found, _ = again(video, "--out", tmp_path / "new")
    assert (code, found["written"]) == (0, str(tmp_path / "new" / video.name))
    np.testing.assert_array_equal(read_video(found["written"]), read_video(video))
    assert video.read_bytes() == before


def test_threads_of_the_record_are_used_and_those_of_the_process_come_back(
    change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    run = Engine.run

    def counted(self: Engine):
        seen.append(torch.get_num_threads())
        torch.set_num_threads(1)  # two are slow where others compute too
        return run(self)

    monkeypatch.setattr(Engine, "run", counted)
    again(change(threads=before + 1))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_a_difference_is_said_with_what_may_be_behind_it(change: Callable[..., Path]) -> None:
    video = change(frames_sha256="0" * 64, processor="another", versions={"torch": "1.0"}, threads=None)
    code, found, said = again(video, "--dtype", "bfloat16")
    assert (code, found["state"], found["not_recorded"]) == (1, "different", ["threads"])
    differences = "\n".join(found["differences"])
    assert "processor was 'another' and is" in differences
    assert "torch was 1.0 and is" in differences
    assert "dtype was 'float32' and is 'bfloat16'" in differences
    assert "  processor was 'another'" in said and "not checked, as its record does not hold it: threads" in said


def test_a_video_of_a_packed_batch_says_that_it_is_equal_to_rounding(change: Callable[..., Path]) -> None:
    code, found, _ = again(change(isolation="packed", batch={"largest": 2, "mates": ["x"]}, frames_sha256="0" * 64))
    assert code == 1
    assert any("in packed isolation beside 1 others" in line for line in found["differences"])


def test_a_file_that_holds_another_video_is_seen(video: Path, made: Path) -> None:
    other = made / "mp4" / "a-blue-cross-seed7.mp4"
    shutil.copy(other, video)
    code, found, said = again(video)
    assert (code, found["state"]) == (1, "equal")
    assert "the file itself holds other frames" in said
    video.write_bytes(b"no video")
    code, found, said = again(video)
    assert code == 1 and "the file itself cannot be decoded" in said
    video.unlink()
    code, found, said = again(video)
    assert code == 0 and "is not there: its record alone was compared" in said


def test_without_a_sidecar_the_record_in_the_video_is_used(video: Path) -> None:
    sidecar(video).unlink()
    code, found, said = again(video)
    assert (code, found["state"]) == (0, "equal")
    assert "it goes by the record in the video itself" in said


@pytest.mark.parametrize("number", [0, 1])
def test_a_sidecar_of_an_earlier_version_still_works(tmp_path: Path, number: int) -> None:
    shutil.copytree(BEFORE, tmp_path / "job")
    video = sorted((tmp_path / "job").glob("*.mp4"))[number]
    code, found, said = again(video)
    assert found["not_recorded"] == ["weights", "lora", "processor", "threads"]
    assert "not checked, as its record does not hold it: weights, lora, processor, threads" in said
    assert found["file"]["loss"] < 10  # another processor's frames are equal to rounding
    assert code == (0 if found["state"] == "equal" else 1)


# -- what cannot be made again --------------------------------------------------------------------------------


def refused(*words: object) -> str:
    result = call("generate", "--again", *words)
    assert isinstance(result.exception, ValueError | OSError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "the sidecar is damaged"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "the sidecar is damaged"),
        ("{}", "it lacks the request or frames_sha256"),
        ('{"request": {"prompt": "a"}, "frames_sha256": 7}', "it lacks the request or frames_sha256"),
        (json.dumps({"request": {"prompt": ""}, "frames_sha256": "0" * 64}), "its request cannot be made: prompt=''"),
        (json.dumps({"request": {"a": 1}, "frames_sha256": "0" * 64}), "its request cannot be made"),
    ],
)
def test_a_damaged_sidecar_is_refused_with_its_name(video: Path, text: str, reason: str) -> None:
    sidecar(video).write_text(text)
    said = refused(video)
    assert reason in said and said.startswith(str(sidecar(video)))


def test_a_missing_or_unreadable_sidecar_is_refused(tmp_path: Path, video: Path) -> None:
    assert "no sidecar none.json beside it, and the video is not there either" in refused(tmp_path / "none.mp4")
    (tmp_path / "x.mp4").write_bytes(b"no video")
    assert "the video carries no record itself" in refused(tmp_path / "x.mp4")
    sidecar(video).unlink()
    sidecar(video).mkdir()
    assert "the sidecar cannot be read: Is a directory" in refused(video)


def test_another_model_is_refused_before_it_is_loaded(
    video: Path, change: Callable[..., Path], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "open", lambda *_: pytest.fail("a model was loaded"))
    said = refused(video, "--model", tiny_folder)
    assert f"with weights {weights_hash(DEMO_FOLDER)[:12]}…, and {tiny_folder} has weights" in said
    assert "was made by the model some/one: say where that is with --model" in refused(change(model="some/one"))
    said = refused(change(model="demo", device="cuda:9"))
    assert "was made on cuda:9: device 'cuda:9' is not there" in said and "--device cpu makes it here" in said


def test_a_lora_must_be_the_same_file_at_the_same_scale(tmp_path: Path) -> None:
    lora, other = tmp_path / "style.safetensors", tmp_path / "other.safetensors"
    shutil.copy(BEFORE.parent / "training" / "lora.safetensors", lora)
    other.write_bytes(b"other")
    result = call("generate", "a red circle", *SMALL, "--lora", f"{lora}:2", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    (video,) = (tmp_path / "o").glob("*.mp4")
    record = json.loads(sidecar(video).read_text(encoding="utf-8"))
    (about,) = record["lora"]
    assert about == {"file": lora.name, "scale": 2.0, "sha256": hashlib.sha256(lora.read_bytes()).hexdigest()}
    digest = about["sha256"][:12]
    for given in ([], ["--lora", lora], ["--lora", f"{other}:2"]):
        said = refused(video, *given)
        assert f"was made with style.safetensors:2.0 ({digest}…), and given is " in said and "--lora FILE:SCALE" in said
    assert again(video, "--lora", f"{lora}:2")[:1] == (0,)
    del record["lora"]  # as earlier versions wrote it
    sidecar(video).write_text(json.dumps(record), encoding="utf-8")
    assert f"was made with style.safetensors:2 ({digest}), and given is none" in refused(video)
    code, found, _ = again(video, "--lora", f"{lora}:2")
    assert (code, found["not_recorded"]) == (0, ["lora"])


def test_options_that_the_sidecar_answers_are_refused(video: Path) -> None:
    assert "leave out --prompts, --steps" in refused(video, "a cat", "--steps", "3")
