"""Times and prompts as people read them."""

from __future__ import annotations


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


def printable(text: str) -> str:
    """For a terminal and a log: no control characters, no escape sequences, no halves of characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
