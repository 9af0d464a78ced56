"""Verification: every video that is done, against its hash, decoded, and of the right size and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reelbatch.formats import digest
from reelbatch.jobs.manifest import Manifest, State, VideoRow
from reelbatch.jobs.worker import is_damaged
from reelbatch.video import sidecar

DAMAGED = "damaged"
"""Folder, in the output folder, of files that were not what was written."""


@dataclass(frozen=True)
class Checked:
    """A video that is done, and what is wrong with its file; None if nothing is."""

    row: VideoRow
    problem: str | None


def verify(manifest: Manifest, folder: Path, job: int | None = None) -> Iterator[Checked]:
    for row in manifest.rows(job, State.DONE):
        yield Checked(row, _problem(folder / row.file, row))


def make_again(manifest: Manifest, folder: Path, rows: Sequence[VideoRow]) -> None:
    """These wait again; files that are damaged are kept under another name."""
    for row in rows:
        _set_aside(folder, row.file)
    manifest.remake([row.id for row in rows])


def _set_aside(folder: Path, file: str) -> None:
    path = folder / file
    if path.exists():
        (folder / DAMAGED).mkdir(exist_ok=True)
        path.replace(folder / DAMAGED / path.name)
    sidecar(path).unlink(missing_ok=True)


def _problem(path: Path, row: VideoRow) -> str | None:
    try:
        sha256, _ = digest(path)
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if sha256 != row.sha256:
        return "is not the file that was written: its hash differs"
    return is_damaged(path, row.to_request())
