"""Verification: every video that is done, against its hash, decoded, and of the right size and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reelbatch.files import move_new, unused
from reelbatch.formats import digest, holds_only_pictures
from reelbatch.jobs.manifest import Manifest, State, VideoRow
from reelbatch.jobs.worker import is_damaged
from reelbatch.video import is_own_sidecar, sidecar

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
    """These wait again; files that are damaged are kept in another folder.

    Links and folders at a video's name are left alone, as other people's files are: a link may come back to life, such
    as one to a disk that is not there now.
    """
    for row in rows:
        _set_aside(folder, row.file)
    manifest.remake([row.id for row in rows])


def _set_aside(folder: Path, file: str) -> None:
    path = folder / file
    if (path.is_file() and not path.is_symlink()) or holds_only_pictures(path):
        (folder / DAMAGED).mkdir(exist_ok=True)
        move_new(path, unused(folder / DAMAGED / path.name))
    if is_own_sidecar(sidecar(path)):
        sidecar(path).unlink()


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
