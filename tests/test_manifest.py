"""The manifest: what is claimed is claimed once, what is done is done for good, and the dead hold nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from reelbatch.jobs import manifest as room
from reelbatch.jobs.manifest import Finished, Manifest, ManifestError, ProcessRow, State, VideoRow

FINISHED = Finished("aa", 12, "bb", {"denoise": 1.0}, 4, "exact", "weights", {"torch": "2"})
URL = os.environ.get("REELBATCH_TEST_DATABASE")
"""A PostgreSQL database to run these tests on as well; its tables are dropped."""


def rows(count: int) -> list[VideoRow]:
    return [
        VideoRow(
            id=f"v{i}",
            number=i,
            turn=count - i,
            request={"prompt": f"prompt {i}", "seed": i, "id": f"v{i}"},
            fingerprint=f"f{i}",
            prompt=f"prompt {i}",
            seed=str(2**64 - 1 - i),
            tags=["a", "ü"],
            file=f"{i}.mp4",
        )
        for i in range(count)
    ]


@pytest.fixture(params=["sqlite", *(["postgresql"] if URL else [])])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manifest]:
    opened = Manifest.in_folder(tmp_path, URL if request.param == "postgresql" else None, lease_seconds=0.3)
    yield opened
    if request.param == "postgresql":
        room.Base.metadata.drop_all(opened._engine)
    opened.close()


def another(manifest: Manifest) -> Manifest:
    """As another process has it."""
    return Manifest(manifest.url, lease_seconds=0.3)


def nothing() -> None:
    pass


def test_rows_come_back_as_they_were(manifest: Manifest) -> None:
    job = manifest.add_job({"model": "m"}, rows(3))
    found = another(manifest).rows(job)
    assert [row.to_request().prompt for row in found] == ["prompt 0", "prompt 1", "prompt 2"]
    assert [int(row.seed) for row in found] == [2**64 - 1, 2**64 - 2, 2**64 - 3]
    assert found[0].tags == ["a", "ü"]
    assert found[0].record()["state"] == "waiting"
    (last,) = manifest.jobs()
    assert last.settings == {"model": "m"}
    assert manifest.counts(job) == {**dict.fromkeys(State, 0), State.WAITING: 3}


def test_claims_follow_the_order_of_work_and_never_meet(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(5))
    other = another(manifest)
    first, second = manifest.enlist(), other.enlist()
    assert [row.id for row in manifest.claim(first, job, 2)] == ["v4", "v3"]
    assert [row.id for row in other.claim(second, job, 9)] == ["v2", "v1", "v0"]
    assert manifest.claim(first, job, 1) == []
    assert manifest.mine(first) == {"v4", "v3"}
    assert manifest.row("v4").attempts == 1


def test_many_processes_claim_each_row_once(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(60))
    claimed: list[str] = []

    def work() -> None:
        mine = another(manifest)
        owner = mine.enlist()
        while found := mine.claim(owner, job, 3):
            claimed.extend(row.id for row in found)
            for row in found:
                assert mine.finish(owner, row.id, FINISHED, nothing)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(row.id for row in rows(60))
    assert manifest.counts(job)[State.DONE] == 60


def test_done_is_written_with_the_file_in_place_and_not_without(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(2))
    owner = manifest.enlist()
    manifest.claim(owner, job, 2)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        manifest.finish(owner, "v0", FINISHED, full)
    assert manifest.row("v0").state == State.RUNNING
    placed: list[bool] = []
    assert manifest.finish(owner, "v0", FINISHED, lambda: placed.append(True))
    row = manifest.row("v0")
    assert (row.state, row.owner, row.sha256, row.batch, row.seconds) == ("done", None, "aa", 4, {"denoise": 1.0})
    assert not manifest.finish(owner, "v0", FINISHED, lambda: placed.append(True))
    assert len(placed) == 1


def test_a_cancelled_or_lost_row_takes_no_file(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(3))
    owner = manifest.enlist()
    manifest.claim(owner, job, 2)  # v2 and v1
    assert sorted(manifest.cancel(["v2", "v0"])) == ["v0", "v2"]
    assert manifest.mine(owner) == {"v1"}
    assert not manifest.finish(owner, "v2", FINISHED, lambda: pytest.fail("a cancelled video was put in its place"))
    assert not manifest.fail(owner, "v2", "late")
    assert manifest.row("v2").state == State.CANCELLED
    assert manifest.fail(owner, "v1", "no")
    assert manifest.retry([State.FAILED]) == ["v1"]
    assert manifest.retry([State.CANCELLED], []) == []
    assert manifest.row("v1").error is None
    assert manifest.cancel(["v1"]) == ["v1"]
    assert manifest.cancel(["v1"]) == []


def test_saved_steps_are_kept_and_let_go(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(2))
    owner = manifest.enlist()
    manifest.claim(owner, job, 2)
    manifest.saved(owner, {"v0": 3})
    assert (manifest.row("v0").state, manifest.row("v0").step) == (State.RUNNING, 3)
    manifest.saved(owner, {"v0": 4, "v1": 2}, let_go=True)
    assert manifest.counts(job)[State.WAITING] == 2
    assert manifest.claim(owner, job, 2)[1].step == 4


def test_a_killed_process_on_this_machine_is_seen_at_once(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(2))
    url = manifest.url.render_as_string(hide_password=False)
    code = (
        "import os, sys, signal; from reelbatch.jobs.manifest import Manifest\n"
        f"m = Manifest({url!r}); o = m.enlist(); m.claim(o, {job}, 2); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert manifest.counts(job)[State.RUNNING] == 2
    assert len(manifest.reap()) == 1
    assert manifest.counts(job)[State.WAITING] == 2


def test_a_process_elsewhere_is_dead_when_its_counter_stands_still(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = manifest.add_job({}, rows(1))
    owner = manifest.enlist()
    manifest.claim(owner, job, 1)
    with manifest._transaction() as session:
        session.execute(update(ProcessRow).values(host="elsewhere"))
    watcher = another(manifest)
    now = [1000.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    for _ in range(5):  # it lives
        now[0] += 0.2
        assert manifest.beat(owner)
        assert watcher.reap() == []
    now[0] += 0.2
    assert watcher.reap() == []
    now[0] += 0.2
    assert watcher.reap() == [owner]
    assert watcher.counts(job)[State.WAITING] == 1
    assert not manifest.beat(owner)
    assert manifest.claim(owner, job, 1) == []
    assert not manifest.finish(owner, "v0", FINISHED, lambda: pytest.fail("the dead put a video in its place"))


def test_a_clock_that_is_set_kills_nobody(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    job = manifest.add_job({}, rows(1))
    owner = manifest.enlist()
    manifest.claim(owner, job, 1)
    for shift in (-1e6, 1e6):
        shifted = time.time() + shift
        monkeypatch.setattr(room.time, "time", lambda shifted=shifted: shifted)
        assert another(manifest).reap() == []
    assert manifest.finish(owner, "v0", FINISHED, nothing)


def test_who_leaves_holds_nothing(manifest: Manifest) -> None:
    job = manifest.add_job({}, rows(2))
    owner = manifest.enlist()
    manifest.claim(owner, job, 2)
    manifest.finish(owner, "v0", FINISHED, nothing)
    manifest.leave(owner)
    assert manifest.counts(job) == {**dict.fromkeys(State, 0), State.WAITING: 1, State.DONE: 1}


def test_a_manifest_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no job has run there"):
        Manifest.in_folder(tmp_path, must_exist=True)
    (tmp_path / room.FILE).write_bytes(b"no database at all, but a text of some length " * 40)
    with pytest.raises(ManifestError, match=r"manifest\.sqlite cannot be used"):
        Manifest.in_folder(tmp_path)
    with pytest.raises(ManifestError) as told:
        Manifest("postgresql+psycopg://me:secret@localhost:1/none")
    assert "secret" not in str(told.value)


def test_a_folder_that_cannot_be_written_may_be_looked_at(manifest: Manifest, tmp_path: Path) -> None:
    if manifest.url.get_backend_name() != "sqlite":
        return
    manifest.add_job({}, rows(2))
    manifest.close()
    read_only = Manifest(f"sqlite:///file:{tmp_path / room.FILE}?mode=ro&uri=true", create=False)
    assert read_only.counts()[State.WAITING] == 2
    with pytest.raises(ManifestError, match="readonly"):
        read_only.enlist()


@pytest.mark.parametrize("name", ["qa?1", "qa%41", "50%", "a#b", "a b&c=d", "ü:@;x", "qa?uri=true"])
def test_a_manifest_is_in_its_folder_whatever_the_folder_is_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    Manifest.in_folder(folder).add_job({}, rows(1))
    assert [path.name for path in folder.iterdir()] == [room.FILE]
    assert list(tmp_path.iterdir()) == [folder]
    assert len(another(Manifest.in_folder(folder, must_exist=True)).rows()) == 1


def test_looking_for_a_manifest_creates_nothing(tmp_path: Path) -> None:
    assert Manifest.existing(tmp_path / "none") is None
    assert Manifest.existing(tmp_path, f"sqlite:///{tmp_path / 'other.sqlite'}") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / room.FILE).touch()  # as a kill leaves it that comes before its tables
    assert Manifest.existing(tmp_path) is None
    Manifest.in_folder(tmp_path)
    opened = Manifest.existing(tmp_path)
    assert opened is not None
    assert opened.jobs() == []


def test_what_is_no_database_url_is_named_without_its_password() -> None:
    with pytest.raises(ManifestError, match="is no database URL") as refused:
        Manifest("me:secret@localhost")
    assert "secret" not in str(refused.value)
