"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

PART = ".part"
"""Ending of files that are not whole yet."""


@contextmanager
def aside(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A file to write to, put in `path`'s place when all went well and removed when not.

    folder: where it is, on the same file system; `path`'s own by default.
    """
    part = (folder or path.parent) / f".{secrets.token_hex(8)}{PART}"
    try:
        yield part
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def move_new(source: Path, path: Path) -> None:
    """Renames a file to a name that nothing has; raises `FileExistsError` if something has it, also a broken link."""
    try:
        os.link(source, path)  # unlike a rename, this fails if another process was faster
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        source.rename(path)
    else:
        source.unlink()


def link_or_copy(source: Path, path: Path) -> None:
    """The content of a file under another name as well; whatever was there is replaced."""
    path.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), path)
    except OSError:  # another file system, or one without links
        with aside(path) as part:
            shutil.copyfile(source, part)


def unused(path: Path) -> Path:
    """The path, or else the first of `name-2`, `name-3`, … that nothing has."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(candidate for candidate in chain([path], others) if not os.path.lexists(candidate))


def sync(path: Path) -> None:
    """Until the disk has it: a file, or the names in a folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do it
            raise
    finally:
        os.close(handle)
