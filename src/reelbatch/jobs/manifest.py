"""The manifest: a row for every video that was asked for, in SQLite in the output folder, or in PostgreSQL by URL.

A kill at any moment leaves it right. A row is `done` only once its file has its final name and its hash stands in the
row; both happen in one transaction, in which the row is locked. Several processes may work on one manifest: each claims
rows, and whatever a dead process had claimed is taken back (see `leases`). A video whose processes died `MAX_DEATHS`
times in a row, without a step that was saved in between, has failed: it would take down every worker in turn.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, and_, delete, func, inspect, select, update
from sqlalchemy.orm import Session

from reelbatch.jobs import leases
from reelbatch.jobs.database import Database, ManifestError, parse_url
from reelbatch.jobs.leases import Leases
from reelbatch.jobs.processes import born_at, host
from reelbatch.jobs.schema import OPEN, Base, DeathRow, Finished, JobKeyRow, JobRow, ProcessRow, State, VideoRow

__all__ = [
    "FILE",
    "OPEN",
    "Base",
    "Finished",
    "JobRow",
    "Manifest",
    "ManifestError",
    "ProcessRow",
    "State",
    "VideoRow",
    "now",
]

FILE = "manifest.sqlite"
MAX_DEATHS = 3
"""Processes that may die while they make a video, without a step gained, before it has failed."""
ALONE_AFTER = 2
"""Such deaths after which a video runs alone, so that it is seen whether it or another one is the cause."""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Manifest(Database):
    """The rows of an output folder, and what may be done to them.

    Every method is one transaction; `one_transaction` joins several. Raises `ManifestError` where the database cannot
    be used.
    """

    def __init__(self, url: str | URL, *, create: bool = True, lease_seconds: float | None = None) -> None:
        super().__init__(url, create=create)
        self._leases = Leases(leases.LEASE_SECONDS if lease_seconds is None else lease_seconds)

    @classmethod
    def in_folder(cls, folder: Path, url: str | None = None, *, must_exist: bool = False, **options: Any) -> Manifest:
        """The manifest of an output folder: SQLite in it, unless a URL says where."""
        path = folder / FILE
        if url is None and must_exist and not path.exists():
            if folder.is_file():
                raise NotADirectoryError(f"{folder}: is a file; name the output folder of a job")
            raise FileNotFoundError(f"{folder}: no job has run there (no {FILE}); name the --out folder of a job")
        own = URL.create("sqlite", database=str(path.resolve()))  # as a text, it would end at a "?" in the path
        return cls(url or own, create=not must_exist, **options)

    @classmethod
    def existing(cls, folder: Path, url: str | None = None) -> Manifest | None:
        """The manifest of an output folder if there is one; None, and nothing is created, if not."""
        place = parse_url(url) if url else URL.create("sqlite", database=str(folder / FILE))
        is_path = place.get_backend_name() == "sqlite" and "uri" not in place.query
        if is_path and not Path(place.database or "").is_file():
            return None
        manifest = cls.in_folder(folder, url, must_exist=True)
        with manifest._reading() as session:
            if inspect(session.connection()).has_table(JobRow.__tablename__):
                return manifest
        manifest.close()
        return None

    # -- jobs --------------------------------------------------------------------------------------

    def jobs(self) -> list[JobRow]:
        with self._reading() as session:
            return self._checked_jobs(list(session.scalars(select(JobRow).order_by(JobRow.number))))

    def add_job(
        self, settings: Mapping[str, Any], rows: Sequence[VideoRow], adopt: Sequence[str] = (), key: str | None = None
    ) -> int:
        """A new job of these rows, and of existing ones that are not done (`adopt`: their ids); returns its number.

        key: a fingerprint of settings and requests, of which this is the latest job; None: it may be there as well.
        """
        with self._transaction() as session:
            job = JobRow(created=now(), settings=dict(settings))
            session.add(job)
            session.flush()
            if key is not None:
                session.execute(delete(JobKeyRow).where(JobKeyRow.fingerprint == key))
                session.add(JobKeyRow(fingerprint=key, job=job.number))
            for row in rows:
                row.job = job.number
            session.add_all(rows)
            self._move_into(session, job.number, adopt)
            return job.number

    def job_of(self, key: str) -> int | None:
        """Number of the latest job that was added under this key."""
        with self._reading() as session:
            return session.scalar(select(JobKeyRow.job).where(JobKeyRow.fingerprint == key))

    def take_over(self, job: int, ids: Sequence[str]) -> None:
        """Rows of other jobs that this one is to make."""
        with self._transaction() as session:
            self._move_into(session, job, ids)

    def replace_requests(self, requests: Mapping[str, Mapping[str, Any]]) -> None:
        """What rows ask for, by their ids, where it is the same and only lies elsewhere, as an image may."""
        with self._transaction() as session:
            for id, request in requests.items():
                session.execute(update(VideoRow).where(VideoRow.id == id).values(request=dict(request)))

    @staticmethod
    def _move_into(session: Session, job: int, ids: Sequence[str]) -> None:
        for some in _in_parts(ids):
            session.execute(update(VideoRow).where(VideoRow.id.in_(some)).values(job=job))

    # -- rows --------------------------------------------------------------------------------------

    def rows(self, job: int | None = None, *states: State) -> list[VideoRow]:
        """Rows of a job or of all, in the order of the prompts."""
        wanted = select(VideoRow).order_by(VideoRow.job, VideoRow.number)
        if job is not None:
            wanted = wanted.where(VideoRow.job == job)
        if states:
            wanted = wanted.where(VideoRow.state.in_(states))
        with self._reading() as session:
            return self._checked(list(session.scalars(wanted.execution_options(populate_existing=True))))

    def row(self, id: str) -> VideoRow | None:
        with self._reading() as session:
            return next(iter(self._checked(list(session.scalars(select(VideoRow).where(VideoRow.id == id))))), None)

    def counts(self, job: int | None = None) -> dict[State, int]:
        wanted = select(VideoRow.state, func.count()).group_by(VideoRow.state)
        if job is not None:
            wanted = wanted.where(VideoRow.job == job)
        with self._reading() as session:
            counted = Counter({state: count for state, count in session.execute(wanted)})  # noqa: C416
            if unknown := counted.keys() - set(State):
                self._checked(list(session.scalars(select(VideoRow).where(VideoRow.state.in_(unknown)).limit(1))))
        return {state: counted[state] for state in State}

    def retry(self, states: Sequence[State], ids: Sequence[str] | None = None) -> list[str]:
        """Puts rows of these states back in line, all of them or those named; returns their ids."""
        return self._move(states, ids, state=State.WAITING, owner=None, error=None)

    def cancel(self, ids: Sequence[str]) -> list[str]:
        """Cancels what is not made yet; a process that runs it drops it before its next step."""
        return self._move(OPEN, ids, state=State.CANCELLED, owner=None, ended=now())

    def remake(self, ids: Sequence[str]) -> None:
        """Videos whose file is gone or wrong wait again."""
        gone = {"sha256": None, "size": None, "frames_sha256": None}
        self._move((State.DONE,), ids, state=State.WAITING, owner=None, **gone)

    def forget_files(self, files: Sequence[str]) -> None:
        """Rows whose files other videos take."""
        with self._transaction() as session:
            for some in _in_parts(files):
                gone = select(VideoRow.id).where(VideoRow.file.in_(some))
                session.execute(delete(DeathRow).where(DeathRow.video.in_(gone)))
                session.execute(delete(VideoRow).where(VideoRow.file.in_(some)))

    def _move(self, states: Sequence[State], ids: Sequence[str] | None, **values: Any) -> list[str]:
        moved: list[str] = []
        with self._transaction() as session:
            for some in [None] if ids is None else _in_parts(ids):
                which = select(VideoRow.id).where(VideoRow.state.in_(states)).with_for_update()
                matching = list(session.scalars(which if some is None else which.where(VideoRow.id.in_(some))))
                for part in _in_parts(matching):
                    session.execute(update(VideoRow).where(VideoRow.id.in_(part)).values(**values))
                    session.execute(delete(DeathRow).where(DeathRow.video.in_(part)))
                moved += matching
        return moved

    # -- working -----------------------------------------------------------------------------------

    def enlist(self) -> str:
        """Makes this process known; returns the name under which it claims."""
        process = ProcessRow(id=secrets.token_hex(8), host=host(), pid=os.getpid(), born=born_at(os.getpid()))
        with self._transaction() as session:
            session.add(process)
        return process.id

    def beat(self, owner: str) -> bool:
        """Shows that the process lives. False: others took it for dead, and what it had claimed is not its own."""
        with self._transaction() as session:
            mine = update(ProcessRow).where(ProcessRow.id == owner).values(beat=ProcessRow.beat + 1)
            return session.execute(mine).rowcount == 1  # type: ignore[attr-defined]

    def leave(self, owner: str) -> None:
        """The process ends; what it still has claimed waits again."""
        with self._transaction() as session:
            self._take_back(session, owner, died=False)

    def claim(self, owner: str, job: int, count: int, *, idle: bool = False) -> list[VideoRow]:
        """Up to `count` rows that wait, in the order of work; they now run, and are this process's.

        Rows whose processes died `ALONE_AFTER` times are left out. `idle`: this process runs nothing; where no other
        row waits, it gets one of those, which it is to run alone.
        """
        deaths = func.coalesce(DeathRow.count, 0)
        waiting = (
            select(VideoRow, deaths)
            .outerjoin(DeathRow, and_(DeathRow.video == VideoRow.id, DeathRow.step == VideoRow.step))
            .where(VideoRow.job == job, VideoRow.state == State.WAITING)
            .order_by(VideoRow.turn)
            .with_for_update(of=VideoRow, skip_locked=True)
        )
        with self._transaction() as session:
            if session.get(ProcessRow, owner) is None:
                return []
            claimed = session.execute(waiting.where(deaths < ALONE_AFTER).limit(count)).all()
            if idle and not claimed:
                claimed = session.execute(waiting.where(deaths >= ALONE_AFTER).limit(1)).all()
            rows = self._checked([row for row, _ in claimed])
            for row, died in claimed:
                row.deaths = died
                row.state, row.owner, row.started, row.error = State.RUNNING, owner, now(), None
                row.attempts += 1
            return rows

    def saved(self, owner: str, steps: Mapping[str, int], *, let_go: bool = False) -> None:
        """Records at which step the state of running videos was saved; `let_go`: they wait again."""
        let = {"state": State.WAITING, "owner": None} if let_go else {}
        with self._transaction() as session:
            for id, step in steps.items():
                session.execute(_owned(id, owner).values(step=step, **let))

    def finish(self, owner: str, id: str, finished: Finished, put_in_place: Callable[[], None]) -> bool:
        """A video is done: `put_in_place` gives its file the final name while the row is locked.

        False, and nothing is called: the row is no longer this process's.
        """
        with self._transaction() as session:
            mine = select(VideoRow).where(VideoRow.id == id, VideoRow.owner == owner, VideoRow.state == State.RUNNING)
            row = session.scalars(mine.with_for_update()).first()
            if row is None:
                return False
            put_in_place()
            row.state, row.owner, row.step, row.error, row.ended = State.DONE, None, 0, None, now()
            for name, value in finished.columns.items():
                setattr(row, name, value)
            session.execute(delete(DeathRow).where(DeathRow.video == id))
            return True

    def fail(self, owner: str, id: str, error: str) -> bool:
        values = {"state": State.FAILED, "owner": None, "step": 0, "error": error, "ended": now()}
        with self._transaction() as session:
            return session.execute(_owned(id, owner).values(**values)).rowcount == 1  # type: ignore[attr-defined]

    def mine(self, owner: str) -> set[str]:
        """Ids of what this process runs, less what was cancelled or taken from it."""
        with self._reading() as session:
            return set(session.scalars(select(VideoRow.id).where(VideoRow.owner == owner)))

    def processes(self) -> set[str]:
        """Names of those that are known as living."""
        with self._reading() as session:
            return set(session.scalars(select(ProcessRow.id)))

    def reap(self) -> list[str]:
        """Takes back what processes had claimed that died or stand still; returns their names."""
        with self._transaction() as session:
            processes = [(process, self._leases.end(process)) for process in session.scalars(select(ProcessRow))]
            ended = {process.id: end for process, end in processes if end is not None}
            for owner, end in ended.items():
                self._take_back(session, owner, died=end == "died")
            return list(ended)

    @staticmethod
    def _take_back(session: Session, owner: str, *, died: bool) -> None:
        mine = select(VideoRow).where(VideoRow.owner == owner, VideoRow.state == State.RUNNING)
        for row in session.scalars(mine.with_for_update()):
            row.state, row.owner = State.WAITING, None
            if died and _died_again(session, row) >= MAX_DEATHS:
                row.state, row.ended, row.error = State.FAILED, now(), _death_reason(row)
                row.step = 0
        session.execute(delete(ProcessRow).where(ProcessRow.id == owner))


def _died_again(session: Session, row: VideoRow) -> int:
    """Counts a death of the process that made a video; returns how many there were since its saved step changed."""
    death = session.get(DeathRow, row.id)
    if death is None:
        death = DeathRow(video=row.id, step=row.step, count=0)
        session.add(death)
    elif death.step != row.step:
        death.step, death.count = row.step, 0
    death.count += 1
    return death.count


def _death_reason(row: VideoRow) -> str:
    at = f"after step {row.step}" if row.step else "before a step was saved"
    return (
        f"the process that made it died {MAX_DEATHS} times, each time {at}, the last time while it ran alone: see what "
        "ended the process (memory?); `reelbatch job retry` puts the video back in line"
    )


def _owned(id: str, owner: str) -> Any:
    return update(VideoRow).where(VideoRow.id == id, VideoRow.owner == owner, VideoRow.state == State.RUNNING)


def _in_parts(ids: Sequence[str], size: int = 500) -> list[Sequence[str]]:
    """SQL has a limit of values in a statement."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]
