"""What a line of a prompt file asks for, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reelbatch.request import FIELDS
from reelbatch.wording import printable

COLUMNS = (*FIELDS, "copies")
WHOLE_COLUMNS = {"seed", "height", "width", "frames", "steps", "fps", "copies", "vae_tiling"}
REAL_COLUMNS = {"guidance", "true_cfg", "flow_shift"}
SHOWN_PROBLEMS = 20
SHOWN_LETTERS = 400


class Fault(NamedTuple):
    """One thing that is wrong: `where` it is ("prompts.csv, line 3") and what, in words for a person."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class PromptError(ValueError):
    """Prompts that cannot be made. `faults` holds all of them; the text shows the first 20."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(Fault(_printable(fault.where), _printable(fault.message)) for fault in faults)
        lines = [str(fault) for fault in self.faults[:SHOWN_PROBLEMS]]
        if len(self.faults) > SHOWN_PROBLEMS:
            lines.append(f"… and {len(self.faults) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Entry:
    """What one line asks for, not yet checked.

    Attributes:
        where: the line, in words.
        faults: what is wrong with the line itself, so that its fields cannot be known.
        place: where one field stands, for formats that say it more exactly than the line.
    """

    where: str
    fields: Mapping[str, Any]
    faults: tuple[Fault, ...] = ()
    place: Callable[[str], str] | None = field(default=None, compare=False, repr=False)

    def where_is(self, name: str | None) -> str:
        """Where a field stands; None: where the entry does."""
        return self.where if name is None or self.place is None else self.place(name)


Numbered = Iterator[tuple[int, Entry]]
"""What a reader of text gives: the line that an entry begins at, and the entry."""


def bad_entry(where: str, message: str) -> Entry:
    """An entry that cannot be read."""
    return Entry(where, {}, (Fault(where, message),))


def _printable(text: str) -> str:
    """For a terminal and a log: whatever a file holds, a line."""
    shown = text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 1]}…"
    return printable(shown).replace("\n", r"\n").replace("\t", r"\t")
