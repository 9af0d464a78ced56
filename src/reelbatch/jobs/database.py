"""The manifest's database: its transactions, how long the locks of other processes are waited for, and its errors."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, func, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from reelbatch.device import log
from reelbatch.jobs.processes import that_opened
from reelbatch.jobs.schema import SCHEMA, Base, JobRow, State, VideoRow

LOCK_SECONDS = 600.0
"""How long another process's transaction is waited for. A process that was stopped within one holds it for ever."""
WORD_SECONDS = 10.0
"""How long a lock is waited for before that is said, and between two such messages."""
IDLE_SECONDS = 300
"""PostgreSQL ends a transaction whose process does nothing for so long."""
ADDING = 0x7265656C
"""Number of the PostgreSQL lock under which tables are made."""

T = TypeVar("T")


class ManifestError(OSError):
    """The manifest cannot be read or written; says which and why."""


@dataclass(frozen=True)
class BrokenJson:
    """Stands in a row for a text that is not JSON."""

    reason: str


class Database:
    """Transactions on the tables of a manifest. Raises `ManifestError` where the database cannot be used."""

    def __init__(self, url: str | URL, *, create: bool = True) -> None:
        self.url = parse_url(url)
        self._shared = threading.local()
        with self._errors_named():
            self._engine = _connect(self.url, self.place)
            self._refuse_newer()
            if create:
                self._create_tables()

    def close(self) -> None:
        self._engine.dispose()

    @property
    def place(self) -> str:
        """The database as a message names it, without a password."""
        path = _path(self.url)
        return str(path or self.url.set(username=None, password=None).render_as_string())

    @contextmanager
    def one_transaction(self) -> Iterator[None]:
        """All calls within are one transaction, and no other process adds a job meanwhile."""
        with self._transaction() as session:
            if session.get_bind().dialect.name == "postgresql":
                session.execute(text("LOCK TABLE job IN SHARE ROW EXCLUSIVE MODE"))
            self._shared.session = session
            try:
                yield
            finally:
                self._shared.session = None

    @contextmanager
    def _transaction(self, **options: Any) -> Iterator[Session]:
        shared = getattr(self._shared, "session", None)
        if shared is not None:
            yield shared
            return
        engine = self._engine.execution_options(**options)
        with self._errors_named(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def _reading(self) -> Any:
        """A transaction that locks nothing, so that a folder that cannot be written to may be looked at."""
        return self._transaction(reading=True)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise ManifestError(self._described(error)) from error

    def _described(self, error: Exception) -> str:
        path = _path(self.url)
        if path is not None and not path.exists():
            if not path.parent.exists():
                return (
                    f"the manifest {path} cannot be used: the folder {path.parent} is not there (any more); if it was "
                    "moved or its disk is gone, put that right, and the same command goes on"
                )
            if "unable to open" not in str(error):
                return f"the manifest {path} is gone: it was moved or removed while it was in use; put it back"
        reason = error.orig if isinstance(error, DBAPIError) else error
        return f"the manifest {self.place} cannot be used: {reason}"

    def _refuse_newer(self) -> None:
        with self._engine.execution_options(reading=True).connect() as connection:
            if not inspect(connection).has_table(JobRow.__tablename__):
                return
            newest = connection.scalar(select(func.max(JobRow.schema)))
        if newest is not None and newest > SCHEMA:
            raise ManifestError(
                f"the manifest {self.place} was written by a newer version of reelbatch: its schema is {newest}, and "
                f"this version knows {SCHEMA} at most; use that version, or another --out folder"
            )

    def _create_tables(self) -> None:
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({ADDING})"))
            Base.metadata.create_all(connection)

    # -- rows that something else has written to ---------------------------------------------------

    def _checked(self, rows: list[VideoRow]) -> list[VideoRow]:
        """The rows; raises `ManifestError`, naming the row, where one holds what no row can."""
        for row in rows:
            self._check(f"row {row.id} of table video ({row.file})", row, request=dict, tags=list)
            if row.state not in _STATES:
                raise self._damaged(f"row {row.id} of table video ({row.file})", f"its state is {row.state!r}")
        return rows

    def _checked_jobs(self, jobs: list[JobRow]) -> list[JobRow]:
        for job in jobs:
            self._check(f"row {job.number} of table job", job, settings=dict)
        return jobs

    def _check(self, where: str, row: VideoRow | JobRow, **kinds: type) -> None:
        for column in row.__table__.columns:
            value = getattr(row, column.name)
            if isinstance(value, BrokenJson):
                raise self._damaged(where, f"its {column.name} is not JSON ({value.reason})")
        for name, kind in kinds.items():
            if not isinstance(getattr(row, name), kind):
                expected = "a JSON object" if kind is dict else "a JSON list"
                raise self._damaged(where, f"its {name} is {getattr(row, name)!r:.60}, which is not {expected}")

    def _damaged(self, where: str, problem: str) -> ManifestError:
        return ManifestError(
            f"the manifest {self.place} is damaged: {where}: {problem}; take the manifest from a backup, or correct or "
            "delete that row"
        )


_STATES = frozenset(State)


class _Connection(sqlite3.Connection):
    """Waits for locks, and says so. `place`: the database as a message names it."""

    place = ""

    def set_up(self, place: str) -> None:
        self.place, self.isolation_level = place, None
        self._patiently(lambda: self.execute("PRAGMA synchronous=FULL"))  # reads the schema, for which it locks

    def begin(self, reading: bool) -> None:
        """Takes the lock that the transaction needs, so that no statement in it has to wait for one."""
        if not reading:
            self._patiently(lambda: self.execute("BEGIN IMMEDIATE"))
            return
        self.execute("BEGIN")
        self._patiently(lambda: self.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall())

    def commit(self) -> None:
        self._patiently(super().commit)

    def _patiently(self, work: Callable[[], T]) -> T:
        started = said = time.monotonic()
        while True:
            try:
                return work()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise
                waited = time.monotonic() - started
                if waited <= LOCK_SECONDS and time.monotonic() - said < WORD_SECONDS:
                    continue
                said = time.monotonic()
                lock = f"the manifest {self.place} has been locked by another process for {waited:.0f} s"
                lock += that_opened(Path(self.place))
                if waited > LOCK_SECONDS:
                    raise ManifestError(f"{lock}; continue or end that one, and the same command goes on") from error
                log.warning("%s; waiting", lock)


def parse_url(url: str | URL) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        raise ManifestError(
            "the manifest's place is no database URL; write it as postgresql+psycopg://user@host/name"
        ) from None


def _connect(url: URL, place: str) -> Engine:
    arguments: dict[str, Any] = {}
    backend = url.get_backend_name()
    if backend == "sqlite":
        arguments = {"timeout": min(WORD_SECONDS, LOCK_SECONDS), "factory": _Connection}
    elif backend == "postgresql":
        settings = {"lock_timeout": LOCK_SECONDS, "idle_in_transaction_session_timeout": IDLE_SECONDS}
        arguments = {"options": " ".join(f"-c {name}={value:.0f}s" for name, value in settings.items())}
    try:
        engine = create_engine(url, connect_args=arguments, json_deserializer=_read_json)
    except ModuleNotFoundError as error:
        raise ManifestError(f"the manifest's database needs {error.name}: pip install {error.name}") from None
    if backend == "sqlite":
        # A kill or a power cut loses no committed row; journals beside the file work on network folders too, where
        # write-ahead logs do not. Every transaction locks at its start, so none that has read must be turned away.
        @event.listens_for(engine, "connect")
        def _settings(connection: Any, _: Any) -> None:
            connection.set_up(place)

        @event.listens_for(engine, "begin")
        def _begin(connection: Any) -> None:
            connection.connection.dbapi_connection.begin(connection.get_execution_options().get("reading", False))

    return engine


def _path(url: URL) -> Path | None:
    """The file of an SQLite database; None for one in memory, by URI, or of another kind."""
    database = url.database
    if url.get_backend_name() != "sqlite" or not database or database.startswith((":", "file:")):
        return None
    return Path(database)


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BrokenJson(str(error))
