"""Commands about a job: which folder, what is shown of it, and where rows are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.jobs.manifest import Finished, Manifest, State, VideoRow

FINISHED = Finished("aa", 12, "bb", {"denoise": 1.0}, 4, "exact", "weights", {"torch": "2"})


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def manifest(here: Path) -> Manifest:
    """A job in `suite`: one video each that is done, failed, running, and three that wait, two with a saved step."""
    (here / "suite").mkdir()
    made = Manifest.in_folder(here / "suite")
    names = ("done", "failed", "running", "saved", "begun", "fresh")
    job = made.add_job({"model": "m"}, [_row(name, number) for number, name in enumerate(names)])
    owner = made.enlist()
    made.claim(owner, job, 5)
    made.finish(owner, "done", FINISHED, lambda: None)
    made.fail(owner, "failed", "out of paper")
    made.saved(owner, {"saved": 300, "begun": 34}, let_go=True)
    return made


def _row(id: str, number: int) -> VideoRow:
    request = VideoRequest(prompt=id, seed=0, height=32, width=32, frames=5, steps=300, id=id)
    return VideoRow(
        id=id,
        number=number,
        turn=number,
        request=request.model_dump(mode="json"),
        fingerprint=id,
        prompt=id,
        seed="0",
        tags=[],
        file=f"{id}.mp4",
    )


def test_status_shows_the_steps_that_were_saved(manifest: Manifest) -> None:
    shown = call("job", "status", "suite").stdout
    assert "waiting, 334 of 900 steps done" in shown
    assert "running, " not in shown
    status = json.loads(call("job", "status", "suite", "--json").stdout)
    assert status["saved_steps"] == {"waiting": {"done": 334, "of": 900}, "running": {"done": 0, "of": 300}}
    assert (status["waiting"], status["videos"]) == (3, 6)


@pytest.mark.parametrize("words", [("status",), ("status", "--json"), ("verify",), ("verify", "--json"), ("export",)])
def test_a_folder_is_an_argument_or_an_option(manifest: Manifest, words: tuple[str, ...]) -> None:
    command, *more = words
    by_option = call("job", command, "--out", "suite", *more)
    assert call("job", command, "suite", *more).output == by_option.output
    assert by_option.output
    refused = call("job", command, "suite", "--out", "other", *more)
    assert "two folders were given, suite and --out other" in str(refused.exception)
    assert "nowhere" in str(call("job", command, "nowhere", *more).exception)


def test_a_folder_may_stand_before_ids_and_before_a_file(manifest: Manifest, here: Path) -> None:
    assert call("job", "cancel", "suite", "fresh").exit_code == 0
    assert manifest.row("fresh").state == State.CANCELLED
    assert "1 videos are in line again" in call("job", "retry", "suite", "fresh").stderr
    assert "1 videos are in line again" in call("job", "retry", "suite", "--failed").stderr
    assert manifest.row("failed").state == State.WAITING
    assert "6 rows in rows.csv" in call("job", "export", "suite", "rows.csv").stderr
    assert "nothing was named" in str(call("job", "cancel", "suite").exception)
    assert "nothing was named" in str(call("job", "retry", "suite").exception)


def test_a_report_is_drawn_at_any_time(manifest: Manifest, here: Path) -> None:
    shown = call("job", "report", "suite")
    assert shown.exit_code == 0
    assert "report: suite/report.html" in shown.stderr
    assert "out of paper" in (here / "suite" / "report.html").read_text(encoding="utf-8")


def test_a_retry_of_nothing_says_so(manifest: Manifest) -> None:
    assert call("job", "retry", "suite", "--failed").exit_code == 0
    again = call("job", "retry", "suite", "--failed")
    assert again.exit_code == 0
    assert again.stderr.strip() == "nothing to do: no video of this job failed"
    assert "none of these videos failed or cancelled" in call("job", "retry", "suite", "done").stderr


def test_where_rows_cannot_be_written_is_said(manifest: Manifest, here: Path) -> None:
    (here / "folder.csv").mkdir()
    for name, message in {
        "nodir/x.csv": "nodir/x.csv: there is no folder nodir; make it first, or name another file",
        "folder.csv": "folder.csv: is a folder; name a file",
        "rows.txt": "rows.txt: name a .csv or a .jsonl file",
    }.items():
        refused = call("job", "export", name, "--out", "suite")
        assert message in str(refused.exception)
    assert sorted(path.name for path in here.iterdir()) == ["folder.csv", "suite"]


def test_a_file_is_no_folder(here: Path) -> None:
    (here / "report.html").touch()
    assert "report.html: is a file" in str(call("job", "status", "report.html").exception)
