"""Jobs in other formats and namings: the same frames, resumable alike, and what is there stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import Folder
from sqlalchemy import update
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.engine.engine import Engine
from reelbatch.formats import ENDINGS, Format, pictures_in
from reelbatch.jobs.job import JobChanged
from reelbatch.jobs.manifest import JobRow
from reelbatch.jobs.verify import verify
from reelbatch.video import embedded_record, sidecar

FORMATS = list(ENDINGS)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(str(tiny_folder), max_batch_size=3)


@pytest.fixture
def folder(tmp_path: Path, engine: Engine) -> Folder:
    return Folder(tmp_path / "o", engine)


def asked(engine: Engine, *prompts: str) -> list[VideoRequest]:
    sizes = {"height": 32, "width": 32, "frames": 5, "steps": 1}
    return [VideoRequest(prompt=p, seed=i, **sizes).for_model(engine.limits) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("format", FORMATS)
def test_a_job_in_any_format_makes_the_same_frames_and_is_verified(folder: Folder, format: Format) -> None:
    requests = asked(folder.engine, "a cat", "a dog")
    job = folder.open(requests, format=format)
    assert [row.file for row in job.rows] == [f"a-cat-seed0{ENDINGS[format]}", f"a-dog-seed1{ENDINGS[format]}"]
    list(folder.run(job))
    alone = {request.prompt: folder.engine.generate([request])[0].frames_sha256 for request in requests}
    assert folder.frames() == alone
    assert [checked.problem for checked in verify(folder.manifest, folder.path)] == [None, None]
    for row in folder.manifest.rows():
        path = folder.path / row.file
        assert sidecar(path).is_file()
        assert embedded_record(path)["frames_sha256"] == row.frames_sha256
    assert folder.open(requests, format=format).open == []
    path = folder.path / job.rows[0].file
    file = pictures_in(path)[-1] if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert [checked.problem for checked in verify(folder.manifest, folder.path)][1] is None
    assert "its hash differs" in next(iter(verify(folder.manifest, folder.path))).problem
    file.unlink()
    lost = folder.open(requests, format=format)
    assert (lost.remade, [row.prompt for row in lost.open]) == (1, ["a cat"])
    list(folder.run(lost))
    assert folder.frames() == alone


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_kill_left_in_place_is_adopted(folder: Folder, format: Format) -> None:
    requests = asked(folder.engine, "a cat", "a dog")
    (outcome, _) = folder.run(folder.open(requests, format=format))
    before = {row.id: (row.sha256, row.frames_sha256, row.size) for row in folder.manifest.rows()}
    folder.manifest.remake(list(before))  # as if the process had died before its rows were done
    sidecar(outcome.path).unlink()
    steps = []
    folder.engine.on_progress = steps.append
    try:
        list(folder.run(folder.open(requests, format=format)))
    finally:
        folder.engine.on_progress = None
    assert not steps
    assert {row.id: (row.sha256, row.frames_sha256, row.size) for row in folder.manifest.rows()} == before
    assert sidecar(outcome.path).is_file()


@pytest.mark.parametrize("format", FORMATS)
def test_a_strangers_file_is_never_replaced(folder: Folder, format: Format) -> None:
    job = folder.open(asked(folder.engine, "a cat", "a dog"), format=format)
    path = folder.path / job.rows[0].file
    path.mkdir() if format == "png" else path.write_bytes(b"mine")
    list(folder.run(job))
    assert folder.states() == {"a cat": "failed", "a dog": "done"}
    assert list(path.iterdir()) == [] if format == "png" else path.read_bytes() == b"mine"


def test_another_format_is_refused_or_made_beside_under_a_name_and_sidecar_of_its_own(folder: Folder) -> None:
    requests = asked(folder.engine, "a cat")
    folder.make(requests)
    with pytest.raises(JobChanged) as refused:
        folder.open(requests, format="gif")
    assert refused.value.differences == ("format: mp4 → gif",)
    other = Folder(folder.path.with_name("other"), folder.engine)
    other.open(requests, format="gif")
    with pytest.raises(JobChanged, match="format: gif → mp4"):
        other.open(requests)
    kept = sidecar(folder.path / "a-cat-seed0.mp4").read_bytes()
    for format, overwrite, file in (("gif", False, "-2.gif"), ("webm", True, "-3.webm"), ("png", True, "-4")):
        new = [request.model_copy(update={"id": format}) for request in requests]
        added = folder.open(new, "add", format=format, overwrite=overwrite)
        assert [row.file for row in added.open] == [f"a-cat-seed0{file}"]
        list(folder.run(added, overwrite=overwrite))
    again = [request.model_copy(update={"id": "again"}) for request in requests]
    assert [row.file for row in folder.open(again, "add", format="gif").kept] == ["a-cat-seed0-2.gif"]
    rows = folder.manifest.rows()
    assert len(rows) == 4 and len({row.frames_sha256 for row in rows}) == 1
    assert sidecar(folder.path / "a-cat-seed0.mp4").read_bytes() == kept


def test_a_job_in_mp4_is_recorded_as_it_was_before_there_were_formats(folder: Folder) -> None:
    folder.make(asked(folder.engine, "a cat"))
    (job,) = folder.manifest.jobs()
    assert "format" not in job.settings


@pytest.mark.parametrize("naming", ["default", "ascii"])
def test_a_job_of_ascii_names_goes_on_with_the_names_in_its_manifest(folder: Folder, naming: str) -> None:
    requests = asked(folder.engine, "一只猫", "Café")
    assert [row.file for row in folder.open(requests, naming="ascii").rows] == ["video-seed0.mp4", "cafe-seed1.mp4"]
    with folder.manifest._transaction() as session:  # as earlier versions called it
        (job,) = folder.manifest.jobs()
        session.execute(update(JobRow).values(settings={**job.settings, "naming": "default"}))
    job = folder.open(requests, naming=naming)
    assert [row.file for row in job.open] == ["video-seed0.mp4", "cafe-seed1.mp4"]
    list(folder.run(job))
    assert len(folder.manifest.rows()) == 2


def test_another_naming_is_a_difference_where_it_gives_other_names(folder: Folder) -> None:
    requests = asked(folder.engine, "一只猫")
    assert folder.open(requests).rows[0].file == "一只猫-seed0.mp4"
    with pytest.raises(JobChanged, match="naming: default → ascii"):
        folder.open(requests, naming="ascii")


def test_the_commands_take_a_format_and_a_naming(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny_folder), "--steps", "1", "--frames", "5", "--height", "32", "--width", "32"]
    out = tmp_path / "o"
    for format, naming, file in (("gif", "ascii", "video-seed0.gif"), ("png", "default", "猫-seed0")):
        result = CliRunner().invoke(
            app, ["generate", "猫", *words, "--out", str(out), "--format", format, "--naming", naming]
        )
        assert result.exit_code == 0, result.output
        assert (out / file).exists()
    assert (out / "contact-sheet.png").is_file()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "img-src 'self' file: data:" in page
    assert '"video-seed0.gif"' in page and '"%E7%8C%AB-seed0"' in page


def test_vbench_names_are_for_formats_that_its_scorer_reads(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    words = ["job", "run", str(tmp_path / "p.txt"), "--model", str(tiny_folder), "--out", str(tmp_path / "o")]
    for format in ("webm", "png"):
        result = CliRunner().invoke(app, [*words, "--naming", "vbench", "--format", format])
        assert "VBench's scorer reads mp4 and gif only" in str(result.exception)
    assert not (tmp_path / "o").exists()
