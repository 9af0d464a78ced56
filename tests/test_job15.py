"""Jobs of HunyuanVideo 1.5: prompts, prompts with words in quotes, and prompts with images, in one prompt file."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny15
from diffusers import HunyuanVideo15ImageToVideoPipeline
from folders import Folder
from test_harnesses import BENCHMARKS
from tiny15 import mixed
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.engine.engine import Engine

MOST_BYTES = 6_000_000


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole image-to-video model, as the command writes it."""
    folder = tmp_path_factory.mktemp("tiny15") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tiny15.py", str(folder)])
        runpy.run_path(tiny15.__file__, run_name="__main__")
    return folder


@pytest.fixture(scope="module")
def engine(small_folder: Path) -> Engine:
    return Engine.from_pretrained(str(small_folder), device="cpu", dtype="float32", max_batch_size=3)


def test_the_tiny_model_is_small_whole_and_diffusers_own(small_folder: Path, engine: Engine) -> None:
    assert sum(file.stat().st_size for file in small_folder.rglob("*") if file.is_file()) < MOST_BYTES
    theirs = HunyuanVideo15ImageToVideoPipeline.from_pretrained(small_folder)
    for name, part in engine.model.family.parts.items():
        weights = getattr(theirs, name).state_dict()
        assert all(weights[key].float().equal(weight.float()) for key, weight in part.state_dict().items()), name


def alone(engine: Engine, requests: list[VideoRequest]) -> list[str]:
    videos = []
    for request in requests:
        engine.model.family.forget()
        videos += engine.generate([request])
    return [video.frames_sha256 for video in videos]


def test_a_job_that_was_stopped_goes_on_with_images_that_lie_elsewhere(engine: Engine, tmp_path: Path) -> None:
    def requests(images: str) -> list[VideoRequest]:
        folder = tmp_path / images
        folder.mkdir()
        given = []
        for request in mixed():
            update = {}
            if request.image is not None:
                path = folder / f"{request.id}.png"
                path.write_bytes(request.image.data or b"")
                update["image"] = path
            fields = {name: getattr(request, name) for name in request.model_fields_set}
            given.append(VideoRequest(**fields | update).for_model(engine.limits))
        return given

    folder, asked = Folder(tmp_path / "o", engine), requests("here")
    steps = iter(range(100))
    stopped = list(folder.run(folder.open(asked), stopping=lambda: next(steps) >= 2))
    assert len(stopped) < len(asked)
    for file in (tmp_path / "here").iterdir():
        file.unlink()
    again = requests("there")
    folder.manifest.close()
    folder = Folder(folder.path, Engine(engine.model, max_batch_size=2))
    folder.make(again)
    assert folder.states() == dict.fromkeys((request.prompt for request in asked), "done")
    assert list(folder.frames().values()) == alone(engine, again)


def test_an_image_that_is_gone_fails_its_video_alone(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(tiny15.picture(40, 24))
    common: dict[str, Any] = {"frames": 1, "steps": 1}
    asked = [VideoRequest(prompt="a cat", **common), VideoRequest(prompt="a dog", image=path, **common)]
    folder = Folder(tmp_path / "o", engine)
    job = folder.open([request.for_model(engine.limits) for request in asked])
    path.write_bytes(tiny15.picture(40, 24, seed=1))
    list(folder.run(job))
    cat, dog = folder.manifest.rows()
    assert (cat.state, dog.state) == ("done", "failed")
    assert "a.png: is not the image that it was" in str(dog.error)
    path.write_bytes(tiny15.picture(40, 24))
    folder.manifest.retry(["failed"])
    folder.make([request.for_model(engine.limits) for request in asked])
    assert list(folder.frames().values()) == alone(engine, [r.for_model(engine.limits) for r in asked])


def test_a_prompt_file_with_images_is_a_job(small_folder: Path, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(tiny15.picture(96, 32))
    (tmp_path / "tall.png").write_bytes(tiny15.picture(32, 64))
    (tmp_path / "p.csv").write_text(
        'prompt,image\na cat,\n"a sign, ""go"" ",\na dog,wide.png\na horse,tall.png\n', encoding="utf-8"
    )
    words = ["job", "run", tmp_path / "p.csv", "--out", tmp_path / "o", "--model", small_folder, "--device", "cpu"]
    options = ["--frames", 1, "--steps", 1, "--batch-size", 4, "--dtype", "float32", "--seed", 5]
    result = CliRunner().invoke(app, [str(word) for word in [*words, *options]])
    assert result.exit_code == 0, result.output
    made = [json.loads(file.read_text(encoding="utf-8")) for file in (tmp_path / "o").glob("*.json")]
    assert len(made) == 4
    assert len({(row["request"]["width"], row["request"]["height"]) for row in made}) == 3
    requests = [VideoRequest(**row["request"]) for row in made]
    assert [row["frames_sha256"] for row in made] == alone(engine, requests)


def test_a_job_with_images_that_is_killed_is_the_undisturbed_one(small_folder: Path) -> None:
    words = ["--images", "--lines", "6", "--copies", "1", "--kills", "2", "--signal", "KILL", "--races", "0"]
    words += ["--processes", "1", "--longest", "0.1", "--model", str(small_folder)]
    command = [sys.executable, str(BENCHMARKS / "kills.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 KILL" in done.stdout
    assert "lost 0, doubled 0, wrong 0, crashed 0" in done.stdout
