"""A forecast of a job is what opening it then gives, whatever its folder holds, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reelbatch import VideoRequest
from reelbatch.jobs.job import Job, JobChanged, Settings, forecast, open_job
from reelbatch.jobs.manifest import FILE, Finished, Manifest, State
from reelbatch.request import ModelLimits

SETTINGS = Settings("m", "w", "cpu", "float32", "auto", "exact")
FINISHED = Finished("aa", 5, "bb", {"denoise": 1.0}, 4, "exact", "weights", {"torch": "2"})
STATES = ("done", "gone", "failed", "cancelled", "saved", "running", "waiting")


def requests(*prompts: str) -> list[VideoRequest]:
    sizes = {"height": 32, "width": 32, "frames": 5, "steps": 4}
    return [VideoRequest(prompt=prompt, seed=0, **sizes).for_model(ModelLimits()) for prompt in prompts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a job that has a video in every state; the file of one that is done is gone."""
    manifest = Manifest.in_folder(tmp_path)
    job = open_job(manifest, tmp_path, requests(*STATES), SETTINGS, mode="resume")
    ids = {row.prompt: row.id for row in job.rows}
    owner = manifest.enlist()
    manifest.claim(owner, job.number, 6)
    for name in ("done", "gone"):
        manifest.finish(owner, ids[name], FINISHED, lambda: None)
    manifest.fail(owner, ids["failed"], "no reason")
    manifest.saved(owner, {ids["saved"]: 2}, let_go=True)
    manifest.cancel([ids["cancelled"]])
    (tmp_path / job.rows[0].file).write_bytes(b"video")
    assert {row.prompt: row.state for row in manifest.rows()} == {
        **{name: name for name in ("done", "failed", "cancelled", "running", "waiting")},
        "gone": "done",
        "saved": "waiting",
    }
    return tmp_path


@pytest.mark.parametrize(("mode", "overwrite"), [("resume", False), ("add", False), ("add", True), ("new", False)])
@pytest.mark.parametrize("asked", [STATES, STATES[:3], ("done", "done", "other"), ("other",), STATES[::-1]])
def test_a_forecast_is_what_then_comes(folder: Path, mode: str, overwrite: bool, asked: tuple[str, ...]) -> None:
    before = (folder / FILE).read_bytes()
    how = {"mode": mode, "overwrite": overwrite}
    foreseen, refusal = _result(lambda: forecast(Manifest.existing(folder), folder, requests(*asked), SETTINGS, **how))
    assert (folder / FILE).read_bytes() == before
    opened, refused = _result(lambda: open_job(Manifest.in_folder(folder), folder, requests(*asked), SETTINGS, **how))
    assert refusal == refused
    if foreseen is None or opened is None:
        assert refusal
        return
    states = [(row.prompt, row.step, row.state) for row in foreseen.rows]
    assert states == [(row.prompt, row.step, row.state) for row in opened.rows]
    assert [row.prompt for row in foreseen.kept] == [row.prompt for row in opened.kept]
    assert foreseen.remade == opened.remade


def _result(call: Callable[[], Job]) -> tuple[Job | None, str]:
    try:
        return call(), ""
    except JobChanged as error:
        return None, str(error)


def test_a_folder_without_a_job_has_all_to_make(tmp_path: Path) -> None:
    foreseen = forecast(None, tmp_path / "none", requests("a cat", "a dog"), SETTINGS, mode="resume")
    assert [row.state for row in foreseen.open] == [State.WAITING] * 2
    assert not list(tmp_path.iterdir())
