"""The tables of a manifest: jobs, the processes that work on them, and a row for every video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import JSON, ForeignKey, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from reelbatch.image import ImageSource
from reelbatch.request import VideoRequest

SCHEMA = 2
"""2 added the tables `job_key` and `death`, which are made where they are missing; no table of 1 was changed."""


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN = (State.WAITING, State.RUNNING)


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[str]: JSON, str: Text}


class JobRow(Base):
    """A call that asked for videos.

    Attributes:
        settings: what decides about their frames and names.
        created: UTC, ISO.
        schema: of the manifest, when the job was added.
    """

    __tablename__ = "job"

    number: Mapped[int] = mapped_column(primary_key=True)
    created: Mapped[str]
    settings: Mapped[dict[str, Any]]
    schema: Mapped[int] = mapped_column(default=SCHEMA)


class JobKeyRow(Base):
    """The latest job of certain settings and requests. The unique key keeps two processes from adding a job twice."""

    __tablename__ = "job_key"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[int] = mapped_column(ForeignKey("job.number"))


class DeathRow(Base):
    """A video whose process died. `count`: processes that did in a row, while its saved step remained `step`."""

    __tablename__ = "death"

    video: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int]
    count: Mapped[int]


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

    Attributes:
        id: the request's. number: its place in the prompts, from 0. turn: its place in the order of work.
        request: all fields, the model's defaults filled in.
        fingerprint: of the request and all that decides about its frames.
        file: its name in the output folder.
        owner: the process that runs it.
        step: of its saved state, 0 for none. attempts: times that it was begun.
        sha256, size: of the file (bytes). frames_sha256: of the frames before compression.
        seconds: by phase. batch: the largest that it shared a step with.
        started, ended: UTC, ISO.
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

    deaths = 0  # not a column: `DeathRow.count`, for a row that was claimed

    def to_request(self) -> VideoRequest:
        """Its image is looked at when it is used: of a video that is done, it may be gone.

        Raises:
            ValueError: if the row holds no request.
        """
        try:
            image = self.request.get("image")
            return VideoRequest(**self.request | ({"image": ImageSource.recorded(image)} if image else {}))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"row {self.id} of the manifest ({self.file}) holds no valid request: {error}") from error

    def record(self) -> dict[str, Any]:
        """All columns, as JSON values."""
        return {column.name: getattr(self, column.name) for column in self.__table__.columns}


@dataclass(frozen=True)
class Finished:
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
