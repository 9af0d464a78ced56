"""The manifest: a row for every video that was asked for, in SQLite in the output folder, or in PostgreSQL by URL.

A kill at any moment leaves it right. A row is `done` only once its file has its final name and its hash stands in the
row; both happen in one transaction, in which the row is locked. Several processes may work on one manifest: each claims
rows, and whatever a dead process had claimed is taken back. Death is seen by a counter that stands still, by the
observer's own monotonic clock, so a clock that is set back or forward changes nothing.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import psutil
from sqlalchemy import JSON, Engine, ForeignKey, Text, create_engine, delete, event, func, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from reelbatch.request import VideoRequest

FILE = "manifest.sqlite"
SCHEMA = 1
LEASE_SECONDS = 60.0
"""A process whose counter stands still for so long has lost what it had claimed."""
BEAT_SECONDS = 5.0
LOCK_SECONDS = 60
"""How long another process's transaction is waited for."""


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN = (State.WAITING, State.RUNNING)


class ManifestError(OSError):
    """The manifest cannot be read or written; says which and why."""


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[str]: JSON, str: Text}


class JobRow(Base):
    """A call that asked for videos. `settings`: what decides about their frames and names. `created`: UTC, ISO."""

    __tablename__ = "job"

    number: Mapped[int] = mapped_column(primary_key=True)
    created: Mapped[str]
    settings: Mapped[dict[str, Any]]
    schema: Mapped[int] = mapped_column(default=SCHEMA)


class ProcessRow(Base):
    """A process that works on the manifest. `beat` counts up while it lives."""

    __tablename__ = "process"

    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    born: Mapped[float]
    beat: Mapped[int] = mapped_column(default=0)


class VideoRow(Base):
    """A video that was asked for.

    id: the request's. number: its place in the prompts, from 0. turn: its place in the order of work.
    request: all fields, the model's defaults filled in. fingerprint: of the request and all that decides about its
    frames. file: its name in the output folder. owner: the process that runs it. step: of its saved state, 0 for none.
    attempts: times that it was begun. sha256, size: of the file (bytes). frames_sha256: of the frames before
    compression. seconds: by phase. batch: the largest that it shared a step with. started, ended: UTC, ISO.
    """

    __tablename__ = "video"

    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[int] = mapped_column(ForeignKey("job.number"), index=True)
    number: Mapped[int]
    turn: Mapped[int] = mapped_column(index=True)
    request: Mapped[dict[str, Any]]
    fingerprint: Mapped[str] = mapped_column(index=True)
    prompt: Mapped[str]
    seed: Mapped[str]  # 64 bits without a sign, which no SQL integer holds
    tags: Mapped[list[str]]
    file: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(default=State.WAITING, index=True)
    owner: Mapped[str | None] = mapped_column(index=True)
    step: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None]
    sha256: Mapped[str | None]
    size: Mapped[int | None]
    frames_sha256: Mapped[str | None]
    seconds: Mapped[dict[str, Any] | None]
    batch: Mapped[int | None]
    isolation: Mapped[str | None]
    model_hash: Mapped[str | None]
    versions: Mapped[dict[str, Any] | None]
    started: Mapped[str | None]
    ended: Mapped[str | None]

    def to_request(self) -> VideoRequest:
        return VideoRequest(**self.request)

    def record(self) -> dict[str, Any]:
        """All columns, as JSON values."""
        return {column.name: getattr(self, column.name) for column in self.__table__.columns}


@dataclass(frozen=True)
class Made:
    """What is recorded of a finished video; as the columns of `VideoRow`."""

    sha256: str
    size: int
    frames_sha256: str
    seconds: Mapping[str, float]
    batch: int
    isolation: str
    model_hash: str
    versions: Mapping[str, str]

    @property
    def columns(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Manifest:
    """The rows of an output folder, and what may be done to them.

    Every method is one transaction. Raises `ManifestError` where the database cannot be used.
    """

    def __init__(self, url: str, *, create: bool = True, lease_seconds: float = LEASE_SECONDS) -> None:
        self.url, self.lease_seconds = url, lease_seconds
        with self._told():
            self._engine = _connect(url)
            if create:
                Base.metadata.create_all(self._engine)
        self._seen: dict[str, tuple[int, float]] = {}

    @classmethod
    def in_folder(cls, folder: Path, url: str | None = None, *, must_exist: bool = False, **options: Any) -> Manifest:
        """Of an output folder: SQLite in it, unless a URL says where."""
        path = folder / FILE
        if url is None and must_exist and not path.exists():
            raise FileNotFoundError(f"{folder}: no job has run there (no {FILE}); name the --out folder of a job")
        return cls(url or f"sqlite:///{path.resolve()}", create=not must_exist, **options)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with self._told(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        """Locks nothing, so that a folder that cannot be written to may be looked at."""
        with self._told(), Session(self._engine.execution_options(reading=True), expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise ManifestError(f"the manifest {self._place} cannot be used: {reason}") from error

    @property
    def _place(self) -> str:
        return self.url.rpartition("@")[2].removeprefix("sqlite:///")  # no password in a message

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
        """Of a job or of all, in the order of the prompts."""
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
            found = Counter({State(state): count for state, count in session.execute(wanted)})
        return {state: found[state] for state in State}

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
                found = list(session.scalars(which if some is None else which.where(VideoRow.id.in_(some))))
                for part in _in_parts(found):
                    session.execute(update(VideoRow).where(VideoRow.id.in_(part)).values(**values))
                moved += found
        return moved

    # -- working -----------------------------------------------------------------------------------

    def enlist(self) -> str:
        """Makes this process known; returns the name under which it claims."""
        process = ProcessRow(id=secrets.token_hex(8), host=_host(), pid=os.getpid(), born=_born(os.getpid()))
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

    def finish(self, owner: str, id: str, made: Made, put_in_place: Callable[[], None]) -> bool:
        """A video is done: `put_in_place` gives its file the final name while the row is locked.

        False, and nothing is called: the row is no longer this process's.
        """
        with self._transaction() as session:
            mine = select(VideoRow).where(VideoRow.id == id, VideoRow.owner == owner, VideoRow.state == State.RUNNING)
            row = session.scalars(mine.with_for_update()).first()
            if row is None:
                return False
            put_in_place()
            self._done(row, made)
            return True

    def adopt(self, id: str, made: Made) -> None:
        """A video whose file was there already, made before a kill, is done."""
        with self._transaction() as session:
            row = session.get_one(VideoRow, id)
            self._done(row, made)

    @staticmethod
    def _done(row: VideoRow, made: Made) -> None:
        row.state, row.owner, row.step, row.error, row.ended = State.DONE, None, 0, None, now()
        for name, value in made.columns.items():
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

    def bury(self) -> list[str]:
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
        if process.host == _host():
            return not _runs(process.pid, process.born)
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


def _connect(url: str) -> Engine:
    try:
        engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS} if url.startswith("sqlite") else {})
    except ModuleNotFoundError as error:
        raise ManifestError(f"the manifest's database needs {error.name}: pip install {error.name}") from None
    if engine.dialect.name == "sqlite":
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


def _host() -> str:
    """Of this machine and, in a container, of its own numbering of processes."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _process_namespace):
        try:
            parts.append(read())
        except OSError:
            continue
    return "/".join(parts)


def _process_namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _runs(pid: int, born: float) -> bool:
    try:
        return abs(_born(pid) - born) < 1 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _born(pid: int) -> float:
    """Tells a process from a later one of the same number: clock ticks since the machine started, which setting the
    clock does not change; where they cannot be read, its time of creation."""
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return float(psutil.Process(pid).create_time())
