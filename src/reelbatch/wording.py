"""Times and texts as people read them."""

from __future__ import annotations

import math
import re
import reprlib

SHOWN_LETTERS = 60
SHOWN_DIGITS = 100  # Python writes none of more than 4300

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # what moves a terminal's cursor, colours it, or sends it commands
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # what breaks a line, or turns the order of letters round
    "\ud800-\udfff]"  # halves of pairs, which no output can encode
)


def duration(seconds: float) -> str:
    """As people say it: 8 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def shown_line(text: str, letters: int = 200) -> str:
    """The beginning of what a library says, in a line."""
    text = " ".join(text.split())
    return text if len(text) <= letters else f"{text[: letters - 3]}..."


class _Short(reprlib.Repr):
    """`repr` of anything, however large, long or deeply nested."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 4 * SHOWN_LETTERS  # cut in the middle; `shown` shows the beginning

    def repr_int(self, x: int, level: int) -> str:
        digits = int(x.bit_length() * math.log10(2)) + 1
        return repr(x) if digits <= SHOWN_DIGITS else f"a whole number of about {digits} digits"


def shown(value: object) -> str:
    """A value in a message: its `repr`, or the beginning of it."""
    text = _Short().repr(value)
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    r"""A text that does nothing to a terminal but to show: control characters become `\x1b` and the like.

    Tabs and line ends stay, and so do the joiners that scripts and emoji are written with.
    """
    return _UNSAFE.sub(lambda character: character[0].encode("unicode_escape").decode(), text)


def printable_json(text: str) -> str:
    r"""JSON with the same characters as `\u001b`, so that it reads back as it was."""
    return _UNSAFE.sub(lambda character: f"\\u{ord(character[0]):04x}", text)
