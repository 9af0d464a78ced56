"""Starts: of several that begin at once, one adds the job; strangers' files, links and folders are left as they are."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from folders import Folder, asked
from manifests import rows
from sqlalchemy.exc import IntegrityError

from reelbatch import Video
from reelbatch.engine.engine import Engine
from reelbatch.jobs import worker as worker_room
from reelbatch.jobs.manifest import Manifest, ManifestError, State
from reelbatch.jobs.verify import DAMAGED, make_again, verify
from reelbatch.jobs.worker import FolderError
from reelbatch.video import sidecar


@pytest.fixture(scope="module")
def shared(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(str(tiny_folder), max_batch_size=3)


@pytest.fixture
def folder(tmp_path: Path, shared: Engine) -> Folder:
    return Folder(tmp_path / "o", Engine(shared.model, max_batch_size=3))


# -- starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["resume", "add"])
def test_of_three_starts_at_once_one_adds_the_job(
    tmp_path: Path, shared: Engine, manifest: Manifest, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All look before one adds, if they can."""
    requests, meet = asked(shared, 4), threading.Barrier(3)
    looked_at, opened = Manifest.jobs, []

    def look(manifest: Manifest) -> Any:
        found = looked_at(manifest)
        with suppress(threading.BrokenBarrierError):
            meet.wait(0.2)
        return found

    def start(number: int) -> None:
        own = Folder(tmp_path, shared, manifest.url)
        its = [request.model_copy(update={"id": f"{number}.{i}"}) for i, request in enumerate(requests)]
        opened.append(own.open(its, mode))

    monkeypatch.setattr(Manifest, "jobs", look)
    threads = [threading.Thread(target=start, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 3
    assert len(manifest.rows()) == 4
    assert {job.number for job in opened} == {1}
    assert len({tuple(row.id for row in job.rows) for job in opened}) == 1


def test_a_job_is_in_a_manifest_once(manifest: Manifest) -> None:
    manifest.add_job({}, rows(1), key="k")
    with manifest._transaction() as session, pytest.raises(IntegrityError), session.begin_nested():
        session.connection().exec_driver_sql("INSERT INTO job_key (fingerprint, job) VALUES ('k', 1)")
    assert manifest.job_of("k") == 1
    assert manifest.job_of("another") is None


def test_a_start_that_fails_leaves_no_row(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked(folder.engine, 2)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "add_job", broken)
    with pytest.raises(KeyboardInterrupt):
        folder.open(requests, overwrite=True)
    assert folder.manifest.rows() == []
    monkeypatch.undo()
    folder.make(requests)
    assert set(folder.states().values()) == {"done"}


# -- the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_every", [1, None])
def test_a_folder_that_vanishes_is_said_so_and_is_not_made_again(
    folder: Folder, checkpoint_every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_room, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(worker_room, "WRITE_AGAIN_AFTER", ())
    job, step, taken = folder.open(asked(folder.engine, 2)), folder.engine.step, [0]

    def vanishing() -> Any:
        taken[0] += 1
        if taken[0] == 2:
            folder.path.rename(folder.path.with_name("moved"))
        return step()

    folder.engine.step = vanishing  # type: ignore[method-assign]
    with pytest.raises((FolderError, ManifestError), match=r"the folder is gone|is not there"):
        list(folder.run(job, checkpoint_every=checkpoint_every))
    assert not folder.path.exists()
    with pytest.raises(ManifestError, match=f"the folder {folder.path} is not there"):
        Manifest.in_folder(folder.path)
    moved = Folder(folder.path.with_name("moved"), Engine(folder.engine.model))
    with moved.manifest._transaction() as session:
        session.connection().exec_driver_sql("UPDATE video SET state = 'waiting', owner = NULL WHERE state = 'running'")
    assert len([outcome for outcome in moved.run(job) if outcome.record]) == 2


def test_a_folder_that_is_gone_takes_no_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_room, "WRITE_AGAIN_AFTER", ())
    job = folder.open(asked(folder.engine, 1, steps=1))
    gone = folder.path.with_name("never made")
    worker = worker_room.Worker(folder.engine, folder.manifest, job.number, gone, weights="w")
    with pytest.raises(FolderError, match="the folder is gone"):
        list(worker.outcomes())
    assert not gone.exists()
    assert set(folder.states().values()) == {"waiting"}


# -- strangers' files ------------------------------------------------------------------------------


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def looping(path: Path) -> None:
    path.symlink_to(path.name)


def a_folder(path: Path) -> None:
    (path / "within").mkdir(parents=True)


def a_text(path: Path) -> None:
    path.write_text("[1, 2]")


STRANGE: list[Callable[[Path], None]] = [dangling, looping, a_folder, a_text]


def what_is(path: Path) -> object:
    if path.is_symlink():
        return os.readlink(path)
    return path.read_text() if path.is_file() else sorted(path.rglob("*"))


@pytest.mark.parametrize("which", ["video", "sidecar"])
@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_at_a_videos_names_is_never_replaced(
    folder: Folder, strange: Callable[[Path], None], which: str
) -> None:
    requests = asked(folder.engine, 2, steps=1)
    job = folder.open(requests)
    video = folder.path / job.rows[0].file
    taken = video if which == "video" else sidecar(video)
    strange(taken)
    before = what_is(taken)
    outcomes = {outcome.request.prompt: outcome for outcome in folder.run(job)}
    assert folder.states() == {"a cat 0": "failed", "a cat 1": "done"}
    assert isinstance(outcomes["a cat 0"].error, FileExistsError)
    assert "move it away" in str(folder.manifest.rows()[0].error)
    assert what_is(taken) == before
    assert [row.prompt for row in folder.open(requests).open] == []
    taken.rename(folder.path / "moved away")
    folder.manifest.retry([State.FAILED])
    folder.make(requests)
    assert set(folder.states().values()) == {"done"}
    assert not video.is_symlink() and sidecar(video).is_file()


@pytest.mark.parametrize("strange", STRANGE)
def test_a_new_job_takes_other_names_than_strangers(folder: Folder, strange: Callable[[Path], None]) -> None:
    strange(folder.path / "a-cat-0-seed0.mp4")
    strange(folder.path / "a-cat-1-seed1.json")
    folder.make(asked(folder.engine, 3, steps=1))
    assert set(folder.states().values()) == {"done"}
    names = [row.file for row in folder.manifest.rows()]
    assert names == ["a-cat-0-seed0-2.mp4", "a-cat-1-seed1-2.mp4", "a-cat-2-seed2.mp4"]


@pytest.mark.parametrize("strange", STRANGE)
def test_what_took_a_done_videos_place_is_not_lost(folder: Folder, strange: Callable[[Path], None]) -> None:
    requests = asked(folder.engine, 1, steps=1)
    folder.make(requests)
    video = folder.path / folder.manifest.rows()[0].file
    video.unlink()
    strange(video)
    before = what_is(video)
    (checked,) = verify(folder.manifest, folder.path)
    assert checked.problem
    make_again(folder.manifest, folder.path, [checked.row])
    kept = folder.path / DAMAGED / video.name if strange is a_text else video
    assert what_is(kept) == before
    folder.make(requests)
    assert what_is(kept) == before
    assert folder.states() == {"a cat 0": "done" if strange is a_text else "failed"}


def test_a_second_damaged_file_does_not_take_the_place_of_the_first(folder: Folder) -> None:
    requests = asked(folder.engine, 1, steps=1)
    for text in ("one", "two", "three"):
        folder.make(requests)
        (folder.path / folder.manifest.rows()[0].file).write_text(text)
    folder.make(requests)
    assert {path.name: path.read_text() for path in (folder.path / DAMAGED).iterdir()} == {
        f"a-cat-0-seed0{end}.mp4": text for end, text in (("", "one"), ("-2", "two"), ("-3", "three"))
    }


def test_a_broken_link_to_a_video_that_comes_back_is_that_video(folder: Folder, tmp_path: Path) -> None:
    requests = asked(folder.engine, 1, steps=1)
    folder.make(requests)
    video, store = folder.path / folder.manifest.rows()[0].file, tmp_path / "store"
    store.mkdir()
    shutil.move(video, store / "v.mp4")
    video.symlink_to(store / "v.mp4")
    assert folder.open(requests).open == []
    store.rename(tmp_path / "away")
    folder.make(requests)
    assert folder.states() == {"a cat 0": "failed"}
    (tmp_path / "away").rename(store)
    folder.manifest.retry([State.FAILED])
    folder.make(requests)
    assert folder.states() == {"a cat 0": "done"}
    assert video.is_symlink()


@pytest.mark.parametrize("strange", STRANGE)
def test_saving_a_video_replaces_no_strangers_file(
    folder: Folder, tmp_path: Path, strange: Callable[[Path], None]
) -> None:
    (video,) = folder.engine.generate(asked(folder.engine, 1, steps=1))
    assert isinstance(video, Video)
    for path, taken in ((tmp_path / "v.mp4", tmp_path / "v.mp4"), (tmp_path / "w.mp4", tmp_path / "w.json")):
        strange(taken)
        before = what_is(taken)
        with pytest.raises(FileExistsError):
            video.save(path)
        assert what_is(taken) == before
    again = tmp_path / "x.mp4"
    video.save(again)
    again.unlink()  # its sidecar is this package's own
    video.save(again)
    a_folder(tmp_path / "y.mp4")
    with pytest.raises(FileExistsError, match="is a folder"):
        video.save(tmp_path / "y.mp4", overwrite=True)
    assert json.loads(sidecar(again).read_text())["frames_sha256"] == video.frames_sha256
