"""Claims and leases: a video that ends its processes fails alone, and a process that stood still overwrites nothing."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import Folder, asked
from manifests import FINISHED, another, nothing, rows
from sqlalchemy import update

from reelbatch.engine.engine import Engine
from reelbatch.jobs import database, heartbeat, leases
from reelbatch.jobs import worker as worker_room
from reelbatch.jobs.manifest import ALONE_AFTER, FILE, MAX_DEATHS, Manifest, ManifestError, ProcessRow, State


@pytest.fixture(scope="session")
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def die(manifest: Manifest, owner: str, dead: int) -> None:
    with manifest._transaction() as session:
        session.execute(update(ProcessRow).where(ProcessRow.id == owner).values(pid=dead))
    assert owner in manifest.reap()


# -- videos whose processes die --------------------------------------------------------------------


def test_a_video_whose_processes_die_has_failed_after_three_and_the_others_wait(manifest: Manifest, dead: int) -> None:
    job = manifest.add_job({}, rows(3))
    for deaths in range(ALONE_AFTER):
        owner = manifest.enlist()
        claimed = manifest.claim(owner, job, 2)  # with another that has done nothing
        assert [(row.id, row.deaths) for row in claimed] == [("v2", deaths), ("v1", deaths)]
        die(manifest, owner, dead)
    owner = manifest.enlist()
    assert [row.id for row in manifest.claim(owner, job, 9)] == ["v0"]  # the two only alone
    assert manifest.claim(owner, job, 9) == []
    assert [row.id for row in manifest.claim(owner, job, 9, idle=True)] == ["v2"]
    assert manifest.finish(owner, "v0", FINISHED, nothing)
    die(manifest, owner, dead)
    failed = manifest.row("v2")
    assert failed is not None and failed.state == State.FAILED and failed.attempts == MAX_DEATHS
    assert f"died {MAX_DEATHS} times, each time before a step was saved" in str(failed.error)
    owner = manifest.enlist()
    assert [row.id for row in manifest.claim(owner, job, 9, idle=True)] == ["v1"]
    assert manifest.finish(owner, "v1", FINISHED, nothing)
    assert manifest.retry([State.FAILED]) == ["v2"]
    assert [(row.id, row.deaths) for row in manifest.claim(owner, job, 9)] == [("v2", 0)]


def test_a_step_that_is_gained_starts_the_count_anew(manifest: Manifest, dead: int) -> None:
    job = manifest.add_job({}, rows(1))
    for step in range(1, 3 * MAX_DEATHS):
        owner = manifest.enlist()
        (row,) = manifest.claim(owner, job, 1)
        assert row.deaths == (step > 1)
        manifest.saved(owner, {"v0": step})
        die(manifest, owner, dead)
        assert manifest.counts(job)[State.WAITING] == 1


def test_who_stops_in_order_counts_as_no_death(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(1))
    for _ in range(2 * MAX_DEATHS):
        owner = manifest.enlist()
        (row,) = manifest.claim(owner, job, 1)
        assert row.deaths == 0
        manifest.leave(owner)


def in_a_process_of_its_own(work: Callable[[], object]) -> int:
    """Returns the exit code; 0 if the work was done."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_request_that_kills_its_process_takes_no_other_video_down(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path / "o", Engine.from_pretrained(str(tiny_folder), max_batch_size=3))
    requests = asked(folder.engine, 5)
    expected = {r.prompt: folder.engine.generate([r])[0].frames_sha256 for r in requests if r.seed != 3}
    decode = folder.engine.model.family.decoder.decode
    killers = {folder.engine.generate([requests[3]])[0].frames_sha256}

    def killing(latents: object, tiles: object) -> object:
        frames = decode(latents, tiles)
        if hashlib.sha256(frames.numpy().tobytes()).hexdigest() in killers:
            os._exit(9)
        return frames

    monkeypatch.setattr(folder.engine.model.family.decoder, "decode", killing)
    folder.open(requests)
    codes = []
    while folder.states()["a cat 3"] != "failed":
        codes.append(in_a_process_of_its_own(lambda: Folder(folder.path, folder.engine).make(requests)))
        folder.manifest.reap()
        assert len(codes) <= MAX_DEATHS + 1
    assert codes[:MAX_DEATHS] == [9] * MAX_DEATHS
    folder.make(requests)
    assert folder.states() == {f"a cat {i}": "failed" if i == 3 else "done" for i in range(5)}
    assert {prompt: frames for prompt, frames in folder.frames().items() if frames} == expected


# -- processes that stand still --------------------------------------------------------------------


def test_a_process_here_that_is_stopped_loses_its_rows(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    job = manifest.add_job({}, rows(1))
    owner = manifest.enlist()
    manifest.claim(owner, job, 1)
    watcher, now = another(manifest), [1000.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    assert watcher.reap() == []
    for _ in range(2):
        now[0] += 0.2
        lost = watcher.reap()
    assert lost == [owner]
    assert not manifest.beat(owner)
    assert not manifest.finish(owner, "v0", FINISHED, lambda: pytest.fail("a file was put in place"))
    (row,) = watcher.claim(watcher.enlist(), job, 1)
    assert row.deaths == 0  # it was stopped, and died of nothing


def test_an_observer_that_was_stopped_itself_takes_nobody_for_dead(
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest.enlist()
    watcher, now = another(manifest), [1000.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    assert watcher.reap() == []
    now[0] += 1e6
    assert watcher.reap() == []


@pytest.fixture
def two(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Folder, Folder]:
    """Two processes' views of one folder, which look for lost rows at every step."""
    monkeypatch.setattr(worker_room, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    first = Folder(tmp_path / "o", Engine.from_pretrained(str(tiny_folder), max_batch_size=2))
    return first, Folder(first.path, Engine(first.engine.model, max_batch_size=2))


def lose(folder: Folder) -> None:
    """All processes of the folder lose their rows, as by a lease that ran out."""
    with folder.manifest._transaction() as session:
        for process in session.query(ProcessRow):
            folder.manifest._take_back(session, process.id, died=False)


@pytest.mark.parametrize("others", ["make them", "leave them"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_process_that_goes_on_after_its_lease_doubles_and_loses_nothing(
    two: tuple[Folder, Folder], at: int, others: str
) -> None:
    """It is stopped before a step, at the last of which its videos are with the writer."""
    first, second = two
    requests = asked(first.engine, 3)
    job, step, steps = first.open(requests), first.engine.step, [0]
    placed: list[str] = []

    def stopped() -> object:
        if steps[0] == at:
            lose(first)
            if others == "make them":
                placed.extend(outcome.path.name for outcome in second.make(requests) if outcome.record)
        steps[0] += 1
        return step()

    first.engine.step = stopped  # type: ignore[method-assign, assignment]
    outcomes = list(first.run(job))
    if others == "leave them":
        first.make(requests)
    assert all(outcome.error is None for outcome in outcomes)
    names = [outcome.path.name for outcome in outcomes] + placed
    assert len(set(names)) == len(names)
    assert set(first.states().values()) == {"done"}
    assert first.frames() == {r.prompt: second.engine.generate([r])[0].frames_sha256 for r in requests}


def test_a_row_that_comes_back_while_it_is_still_in_the_engine_goes_on(two: tuple[Folder, Folder]) -> None:
    first, _ = two
    requests = asked(first.engine, 2)
    job, step, taken = first.open(requests), first.engine.step, [0]
    worker = worker_room.Worker(first.engine, first.manifest, job.number, first.path, weights="w")

    def stopped() -> object:
        taken[0] += 1
        if taken[0] == 2:
            lose(first)
            worker._heartbeat.owner = first.manifest.enlist()  # as the heartbeat does, and before any row is looked at
        return step()

    first.engine.step = stopped  # type: ignore[method-assign, assignment]
    outcomes = list(worker.outcomes())
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert {row.attempts for row in first.manifest.rows()} == {2}


# -- locks -----------------------------------------------------------------------------------------


def test_a_lock_is_waited_for_with_a_word_and_named_when_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database, "WORD_SECONDS", 0.05)
    manifest = Manifest.in_folder(tmp_path)
    other = sqlite3.connect(tmp_path / FILE, check_same_thread=False, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.5, other.execute, ["COMMIT"])
    release.start()
    with caplog.at_level(logging.WARNING, "reelbatch"):
        manifest.add_job({}, rows(1))
    release.join()
    assert f"{tmp_path / FILE} has been locked by another process for" in caplog.messages[0]
    assert caplog.messages[0].endswith("; waiting")

    monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
    other.execute("BEGIN EXCLUSIVE")  # readers wait as well
    for work in (manifest.enlist, manifest.counts):
        started = time.monotonic()
        with pytest.raises(ManifestError, match=r"has been locked by another process for .* end that one"):
            work()
        assert time.monotonic() - started < 30
    other.execute("ROLLBACK")
    other.execute("BEGIN")
    other.execute("SELECT * FROM job").fetchone()  # a reader that was stopped: the commit has to wait
    with pytest.raises(ManifestError, match="has been locked"):
        manifest.enlist()
    other.execute("ROLLBACK")
    assert manifest.enlist() in manifest.processes()


def test_who_has_the_manifest_open_is_named(tmp_path: Path) -> None:
    from reelbatch.jobs.processes import that_opened

    Manifest.in_folder(tmp_path).close()
    assert that_opened(tmp_path / FILE) == ""
    with (tmp_path / FILE).open("rb") as stream:
        process = subprocess.Popen(["sleep", "60"], stdin=stream)
        try:
            assert f"process {process.pid} (" in that_opened(tmp_path / FILE)
        finally:
            process.kill()
            process.wait()
