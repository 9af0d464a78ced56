"""The manifest: a row for every video that was asked for, in SQLite in the output folder, or in PostgreSQL by URL.

A kill at any moment leaves it right. A row is `done` only once its file has its final name and its hash stands in the
row; both happen in one transaction, in which the row is locked. Several processes may work on one manifest: each claims
rows, and whatever a dead process had claimed is taken back. Death is seen by a counter that stands still, by the
observer's own monotonic clock, so a clock that is set back or forward changes nothing.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, delete, event, func, inspect, make_url, select, update
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from reelbatch.jobs.processes import born_at, host, runs
from reelbatch.jobs.schema import OPEN, Base, Finished, JobRow, ProcessRow, State, VideoRow

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
LEASE_SECONDS = 60.0
"""A process whose counter stands still for so long has lost what it had claimed."""
LOCK_SECONDS = 60
"""How long another process's transaction is waited for."""


class ManifestError(OSError):
    """The manifest cannot be read or written; says which and why."""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Manifest:
    """The rows of an output folder, and what may be done to them.

    Every method is one transaction. Raises `ManifestError` where the database cannot be used.
    """

    def __init__(self, url: str | URL, *, create: bool = True, lease_seconds: float = LEASE_SECONDS) -> None:
        self.url, self.lease_seconds = _parse(url), lease_seconds
        with self._errors_named():
            self._engine = _connect(self.url)
            if create:
                Base.metadata.create_all(self._engine)
        self._seen: dict[str, tuple[int, float]] = {}

    @classmethod
    def in_folder(cls, folder: Path, url: str | None = None, *, must_exist: bool = False, **options: Any) -> Manifest:
        """The manifest of an output folder: SQLite in it, unless a URL says where."""
        path = folder / FILE
        if url is None and must_exist and not path.exists():
            if folder.is_file():
                raise NotADirectoryError(f"{folder}: is a file; name the output folder of a job")
            raise FileNotFoundError(f"{folder}: no job has run there (no {FILE}); name the --out folder of a job")
        # `create` takes a path as it is; in a URL that is put together as text, ? and # would end it
        return cls(url or URL.create("sqlite", database=str(path.resolve())), create=not must_exist, **options)

    @classmethod
    def existing(cls, folder: Path, url: str | None = None) -> Manifest | None:
        """The manifest of an output folder if there is one; None, and nothing is created, if not."""
        place = _parse(url) if url else URL.create("sqlite", database=str(folder / FILE))
        is_path = place.get_backend_name() == "sqlite" and "uri" not in place.query
        if is_path and not Path(place.database or "").is_file():
            return None
        manifest = cls.in_folder(folder, url, must_exist=True)
        with manifest._reading() as session:
            if inspect(session.connection()).has_table(JobRow.__tablename__):
                return manifest
        manifest.close()
        return None

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with self._errors_named(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        """Locks nothing, so that a folder that cannot be written to may be looked at."""
        with (
            self._errors_named(),
            Session(self._engine.execution_options(reading=True), expire_on_commit=False) as session,
        ):
            yield session

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise ManifestError(f"the manifest {self._place} cannot be used: {reason}") from error

    @property
    def _place(self) -> str:
        if self.url.get_backend_name() == "sqlite":
            return str(self.url.database)
        return self.url.set(username=None, password=None).render_as_string()

    # -- jobs --------------------------------------------------------------------------------------

    def jobs(self) -> list[JobRow]:
        with self._reading() as session:
            return list(session.scalars(select(JobRow).order_by(JobRow.number)))

    def add_job(self, settings: Mapping[str, Any], rows: Sequence[VideoRow], adopt: Sequence[str] = ()) -> int:
        """A new job of these rows, and of existing ones that are not done (`adopt`: their ids); returns its number."""
        with self._transaction() as session:
            job = JobRow(created=now(), settings=dict(settings))
            session.add(job)
            session.flush()
            for row in rows:
                row.job = job.number
            session.add_all(rows)
            self._move_into(session, job.number, adopt)
            return job.number

    def take_over(self, job: int, ids: Sequence[str]) -> None:
        """Rows of other jobs that this one is to make."""
        with self._transaction() as session:
            self._move_into(session, job, ids)

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
            return list(session.scalars(wanted))

    def row(self, id: str) -> VideoRow | None:
        with self._reading() as session:
            return session.get(VideoRow, id)

    def counts(self, job: int | None = None) -> dict[State, int]:
        wanted = select(VideoRow.state, func.count()).group_by(VideoRow.state)
        if job is not None:
            wanted = wanted.where(VideoRow.job == job)
        with self._reading() as session:
            counted = Counter({State(state): count for state, count in session.execute(wanted)})
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
                session.execute(delete(VideoRow).where(VideoRow.file.in_(some)))

    def _move(self, states: Sequence[State], ids: Sequence[str] | None, **values: Any) -> list[str]:
        moved: list[str] = []
        with self._transaction() as session:
            for some in [None] if ids is None else _in_parts(ids):
                which = select(VideoRow.id).where(VideoRow.state.in_(states)).with_for_update()
                matching = list(session.scalars(which if some is None else which.where(VideoRow.id.in_(some))))
                for part in _in_parts(matching):
                    session.execute(update(VideoRow).where(VideoRow.id.in_(part)).values(**values))
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
            self._take_back(session, [owner])

    def claim(self, owner: str, job: int, count: int) -> list[VideoRow]:
        """Up to `count` rows that wait, in the order of work; they now run, and are this process's."""
        waiting = select(VideoRow).where(VideoRow.job == job, VideoRow.state == State.WAITING).order_by(VideoRow.turn)
        with self._transaction() as session:
            if session.get(ProcessRow, owner) is None:
                return []
            rows = list(session.scalars(waiting.limit(count).with_for_update(skip_locked=True)))
            for row in rows:
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
            self._set_done(row, finished)
            return True

    def adopt(self, id: str, finished: Finished) -> None:
        """A video whose file was there already, made before a kill, is done."""
        with self._transaction() as session:
            row = session.get_one(VideoRow, id)
            self._set_done(row, finished)

    @staticmethod
    def _set_done(row: VideoRow, finished: Finished) -> None:
        row.state, row.owner, row.step, row.error, row.ended = State.DONE, None, 0, None, now()
        for name, value in finished.columns.items():
            setattr(row, name, value)

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
        """Takes back what dead processes had claimed; returns their names.

        A process is dead that is of this host and does not run, or whose counter stood still for the lease, which
        this object has to have watched.
        """
        with self._transaction() as session:
            processes = list(session.scalars(select(ProcessRow)))
            dead = [process.id for process in processes if self._is_dead(process)]
            self._take_back(session, dead)
            return dead

    def _is_dead(self, process: ProcessRow) -> bool:
        if process.host == host():
            return not runs(process.pid, process.born)
        beat, since = self._seen.get(process.id, (None, 0.0))
        if beat != process.beat:
            self._seen[process.id] = (process.beat, time.monotonic())
            return False
        return time.monotonic() - since > self.lease_seconds

    @staticmethod
    def _take_back(session: Session, owners: Sequence[str]) -> None:
        for id in owners:
            freed = update(VideoRow).where(VideoRow.owner == id, VideoRow.state == State.RUNNING)
            session.execute(freed.values(state=State.WAITING, owner=None))
            session.execute(delete(ProcessRow).where(ProcessRow.id == id))


def _owned(id: str, owner: str) -> Any:
    return update(VideoRow).where(VideoRow.id == id, VideoRow.owner == owner, VideoRow.state == State.RUNNING)


def _in_parts(ids: Sequence[str], size: int = 500) -> list[Sequence[str]]:
    """SQL has a limit of values in a statement."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _parse(url: str | URL) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        raise ManifestError(
            "the manifest's place is no database URL; write it as postgresql+psycopg://user@host/name"
        ) from None


def _connect(url: URL) -> Engine:
    sqlite = url.get_backend_name() == "sqlite"
    try:
        engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS} if sqlite else {})
    except ModuleNotFoundError as error:
        raise ManifestError(f"the manifest's database needs {error.name}: pip install {error.name}") from None
    if sqlite:
        # A kill or a power cut loses no committed row; journals beside the file work on network folders too, where
        # write-ahead logs do not. Every transaction locks at its start, so none that has read must be turned away.
        @event.listens_for(engine, "connect")
        def _settings(connection: Any, _: Any) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA synchronous=FULL")

        @event.listens_for(engine, "begin")
        def _begin(connection: Any) -> None:
            reading = connection.get_execution_options().get("reading")
            connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine
