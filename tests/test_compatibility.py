"""What version 0.1.0 left behind opens and goes on: jobs, tune profiles, calibrations, training caches, checkpoints.

`fixtures/make_before.py` made the files with that version. Frames are compared with frames of this machine: those of
another processor may differ in the last bit.
"""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from diffusers import HunyuanVideoPipeline
from typer.testing import CliRunner

import reelbatch.demo
from reelbatch import Engine, HunyuanVideoTransformer3DModel, Video, VideoRequest
from reelbatch.cli import app
from reelbatch.engine.sample import SavedState
from reelbatch.jobs.job import Settings
from reelbatch.jobs.manifest import Manifest, VideoRow
from reelbatch.jobs.states import States
from reelbatch.loading.hashing import weights_hash
from reelbatch.tune import profiles

FIXTURES = Path(__file__).parent / "fixtures" / "before"
COMMANDS: dict[str, list[str]] = json.loads((FIXTURES / "commands.json").read_text())
IDENTITIES = json.loads((FIXTURES / "identities.json").read_text(encoding="utf-8"))
DEMO = Path(reelbatch.demo.__file__).parent / "model"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which the commands of `COMMANDS` were run, as the current folder."""
    folder = tmp_path / "before"
    shutil.copytree(FIXTURES, folder)
    (folder / "model").symlink_to(DEMO)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("REELBATCH_CACHE", "cache")
    return folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("demo", device="cpu", dtype="float32", max_batch_size=1)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def call_well(*words: str) -> Result:
    result = call(*words)
    assert result.exit_code == 0, (result.exception, result.output)
    return result


def rows() -> list[VideoRow]:
    return Manifest.in_folder(Path("job")).rows()


def video_from(engine: Engine, request: VideoRequest, saved: SavedState | None = None) -> Video:
    engine.submit(request, saved)
    (video,) = engine.run()
    assert isinstance(video, Video)
    return video


# Jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_goes_on_by_the_same_command(before: Path, engine: Engine) -> None:
    old = {row.id: row.record() for row in rows()}
    done = {id: row for id, row in old.items() if row["state"] == "done"}
    assert (len(old), len(done), sorted(row["step"] for row in old.values())) == (6, 2, [0, 0, 0, 0, 0, 1])
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("job").glob("a-*")}

    said = call_well(*COMMANDS["job"]).stderr
    assert "2 of 6 videos are there already and are kept" in said
    assert "1 videos go on from a saved step" in said
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == files
    now = {row.id: row for row in rows()}
    assert now.keys() == old.keys()
    assert {row.state for row in now.values()} == {"done"}
    assert {id: now[id].record() for id in done} == done
    same = ("number", "turn", "request", "fingerprint", "prompt", "seed", "tags", "file", "job")
    assert [[getattr(now[id], name) for name in same] for id in old] == [
        [row[name] for name in same] for row in old.values()
    ]
    for id, row in old.items():
        if row["state"] == "waiting" and not row["step"]:
            assert now[id].frames_sha256 == video_from(engine, now[id].to_request()).frames_sha256
    assert not Path("job", ".reelbatch").exists()
    call_well("job", "verify", "--out", "job")

    again = call_well(*COMMANDS["job"]).stderr
    assert "6 of 6 videos are there already and are kept" in again
    assert {row.id: row.record() for row in rows()} == {id: row.record() for id, row in now.items()}


@pytest.mark.parametrize("changed", [False, True])
def test_a_saved_state_goes_on_from_its_step(before: Path, engine: Engine, changed: bool) -> None:
    """`changed`: the state's latents are others than those of its request, so that a video that starts anew differs."""
    (row,) = (row for row in rows() if row.step)
    states = States(Path("job", ".reelbatch", "states"))
    saved = states.load(row.fingerprint)
    assert saved is not None and saved.step == row.step == 1
    if changed:
        saved = replace(saved, latents=saved.latents.flip(-1))
        states.save(row.fingerprint, saved)
    call_well(*COMMANDS["job"])
    (now,) = (other for other in rows() if other.id == row.id)
    resumed, fresh = video_from(engine, row.to_request(), saved), video_from(engine, row.to_request())
    assert now.frames_sha256 == resumed.frames_sha256
    levels = np.abs(resumed.frames.astype(int) - fresh.frames.astype(int)).max()
    assert (levels > 16) if changed else (levels <= 2)  # of 255; another processor's first step is equal to rounding


def test_a_job_of_other_settings_is_still_refused(before: Path) -> None:
    refused = str(call(*COMMANDS["job"], "--isolation", "packed").exception)
    assert "isolation: exact → packed" in refused
    refused = str(call(*COMMANDS["job"], "--guidance", "3").exception)
    assert "guidance: 6 → 3" in refused
    assert sum(row.state == "done" for row in rows()) == 2


def test_what_is_done_is_kept_when_a_prompt_is_added(before: Path) -> None:
    done = {row.id: row.record() for row in rows() if row.state == "done"}
    with Path("prompts.csv").open("a", encoding="utf-8") as file:
        file.write("a large red star,7,32,32,1,,,\n")
    said = call_well(*COMMANDS["job"], "--add").stderr
    assert "2 of 7 videos are there already and are kept" in said
    now = {row.id: row.record() for row in rows()}
    assert len(now) == 7
    assert {id: now[id] for id in done} == done
    assert {row["state"] for row in now.values()} == {"done"}


def test_a_folder_is_looked_at_without_a_change(before: Path) -> None:
    with closing(sqlite3.connect("job/manifest.sqlite")) as database:
        old = list(database.iterdump())
    found = json.loads(call_well("job", "status", "--out", "job", "--json").stdout)
    assert (found["videos"], found["done"], found["waiting"]) == (6, 2, 4)
    with closing(sqlite3.connect("job/manifest.sqlite")) as database:
        assert list(database.iterdump()) == old


# Fingerprints -----------------------------------------------------------------------------------------------------


def test_the_bundled_model_has_the_hash_of_before() -> None:
    assert weights_hash(DEMO) == IDENTITIES["weights_hash"]


@pytest.mark.parametrize("number", range(len(IDENTITIES["cases"])))
def test_requests_and_fingerprints_are_those_of_before(engine: Engine, number: int) -> None:
    case: dict[str, Any] = IDENTITIES["cases"][number]
    request = VideoRequest(**case["fields"]).for_model(engine.limits)
    assert json.dumps(request.model_dump(mode="json")) == json.dumps(case["request"])
    assert VideoRequest(**case["request"]) == request
    assert Settings.of_record(case["settings"]).fingerprint(request) == case["fingerprint"]
    own = Settings(**{**case["settings"], "lora": tuple(case["settings"]["lora"])})
    assert own.fingerprint(request) == case["fingerprint"]


# What was measured ------------------------------------------------------------------------------------------------


def identity_of_today(shapes: str) -> profiles.Identity:
    return profiles.identity(DEMO, "demo", shapes, device="cpu", dtype="float32")


def as_if_measured_here(folder: str, shapes: str) -> Path:
    """A stored file as this machine and its libraries would have given it."""
    (path,) = Path("cache", folder).iterdir()
    stored = json.loads(path.read_text())
    today = identity_of_today(shapes).model_dump()
    # the rest is as it was stored: it would have to be found by today's names
    stored["identity"] |= {name: today[name] for name in ("device", "versions")}
    path.write_text(json.dumps(stored))
    return path


def test_a_tune_profile_is_listed_and_used(before: Path) -> None:
    (path,) = Path("cache", "profiles").iterdir()
    (listed,) = json.loads(call_well("tune", "--show", "--json").stdout)
    assert listed["profile"] == json.loads(path.read_text())
    ((_, profile),) = profiles.stored()
    assert isinstance(profile, profiles.Profile)
    written = path.read_text()
    path.unlink()
    assert profiles.store(profile).resolve() == path.resolve()
    assert path.read_text() == written

    as_if_measured_here("profiles", "32×32×5")
    advice = profiles.advice([identity_of_today("32×32×5")], "exact", 8)
    assert advice.batch_size == profile.exact_batch_size
    assert advice.line is not None and "as tuned for 32×32×5 on" in advice.line


def test_a_calibration_of_other_estimates_is_refused_with_the_reason(before: Path) -> None:
    """It corrected fitted formulas; what is estimated now is traced, and was wrong in other ways."""
    as_if_measured_here("calibrations", "any shape")
    plan = json.loads(call_well("plan", "--model", "demo", "--device", "cpu", "--dtype", "float32", "--json").stdout)
    assert "it corrects the estimates of an earlier version" in plan["calibrated"]
    assert "run `reelbatch plan --calibrate`" in plan["calibrated"]


# Training ---------------------------------------------------------------------------------------------------------


def losses() -> dict[int, float]:
    with Path("training", "metrics.csv").open(encoding="utf-8") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize(("resume", "step"), [("auto", 2), ("training/checkpoints/step-0000001", 1)])
def test_a_training_goes_on_with_its_cache_and_checkpoint(before: Path, resume: str, step: int) -> None:
    known, cached = losses(), sorted(Path("cache", "encoded").rglob("*.safetensors"))
    said = call_well(*COMMANDS["train"], "--steps", "3", "--resume", resume).output
    assert "2 clips to train on, 0 held out, 0 skipped; 0 newly encoded" in said
    assert sorted(Path("cache", "encoded").rglob("*.safetensors")) == cached
    assert f"resumed at step {step} from" in said
    assert "are not those of the checkpoint" not in said
    assert losses() == {**{number: pytest.approx(loss, rel=1e-3) for number, loss in known.items()}, 3: losses()[3]}
    assert [path.name for path in sorted(Path("training", "checkpoints").iterdir())] == ["step-0000002", "step-0000003"]


def test_a_trained_lora_is_loaded(before: Path) -> None:
    words = ["--model", "demo", "--device", "cpu", "--steps", "1", "--frames", "1", "--height", "32", "--width", "32"]
    call_well("generate", "a red circle", *words, "--lora", "training/lora.safetensors:2", "--out", "o")
    (row,) = Manifest.in_folder(Path("o")).rows()
    assert row.state == "done"


def test_a_saved_pipeline_is_opened_by_diffusers_and_by_us(tiny_folder: Path, tmp_path: Path) -> None:
    """The module that a model_index.json names is that of before: later files open with it, and earlier ones here."""
    pipeline = HunyuanVideoPipeline.from_pretrained(
        tiny_folder, transformer=HunyuanVideoTransformer3DModel.from_pretrained(tiny_folder, subfolder="transformer")
    )
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["reelbatch.models.hunyuan_video", "HunyuanVideoTransformer3DModel"]
    assert type(HunyuanVideoPipeline.from_pretrained(tmp_path).transformer) is HunyuanVideoTransformer3DModel
    Engine.from_pretrained(tmp_path, device="cpu")
