"""What the tests say of a command or a Python snippet of the documentation: how it is run, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class _Documented:
    """What a reader runs.

    Attributes:
        text: as it is documented (of a snippet: a part that no other has).
        changes: what the tests put in the place of what, so that it is small and needs no GPU or 13B checkpoint.
        exit_code: one code, or those that are right.
        leaves: glob pattern -> count (or SOME, or ANY) of new files that it leaves; `~/` is the home folder.
        removes: files that it takes away.
        says: parts of what it prints.
    """

    text: str
    changes: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | Sequence[int] = 0
    leaves: Mapping[str, int] = field(default_factory=dict)
    removes: Sequence[str] = ()
    says: Sequence[str] = ()

    def changed(self, text: str) -> str:
        for old, new in self.changes.items():
            assert old in text, f"{old!r} is not in {text!r}"
            text = text.replace(old, new)
        return text


@dataclass(frozen=True)
class Command(_Documented):
    """A shell command.

    Attributes:
        more: options that the tests add.
        stop_at: it is run on a terminal, and gets Ctrl-C once it has shown this regular expression.
    """

    more: str = ""
    stop_at: str = ""

    @property
    def as_run(self) -> str:
        return f"{self.changed(self.text)} {self.more}".strip()


@dataclass(frozen=True)
class Snippet(_Documented):
    """A block of Python.

    Attributes:
        before: code in front of it: the names that the page takes for granted.
        after: code behind it, to check what it did.
    """

    before: str = ""
    after: str = ""


SOME, ANY = -1, -2
"""As a count of files: one or more; none or more."""

Step = Command | Snippet | Callable[[Path], object]


@dataclass(frozen=True)
class Story:
    """Steps that are run one after the other in one empty folder; a function is called with the folder.

    A story that is `fast` belongs to every run of the tests, the others to `make docs-commands`.
    """

    name: str
    steps: Sequence[Step]
    fast: bool = False


def videos(count: int, folder: str = "out") -> dict[str, int]:
    """What `generate` and `job run` leave in a new folder: videos, sidecars, report, contact sheet, manifest."""
    besides = ("report.html", "contact-sheet.png", "manifest.sqlite")
    return {f"{folder}/*.mp4": count, f"{folder}/*.json": count, **{f"{folder}/{name}": 1 for name in besides}}


def write(name: str, text: str) -> Callable[[Path], object]:
    """A step that writes a file."""

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return prepare
