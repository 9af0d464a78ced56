"""What README.md and docs/*.md tell a reader to type: shell commands and Python snippets, and the options they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
SHELL, PYTHON = ("sh", "bash", "shell", "console"), ("python", "py")
PROGRAMS = ("reelbatch", "python", "python3", "make", "pip", "git", "accelerate", "torchrun", "export")
SUBCOMMANDS = ("generate", "job", "model-info", "plan", "train", "tune", "doctor", "convert-lora")


@dataclass(frozen=True)
class Document:
    """A page of the documentation.

    Attributes:
        name: relative to the checkout, as `docs/jobs.md`.
        blocks: (language, text) of each fenced block; the language may be empty.
        spans: code in running text, each on one line.
    """

    name: str
    blocks: tuple[tuple[str, str], ...]
    spans: tuple[str, ...]

    def commands(self) -> Iterator[str]:
        """Shell commands of blocks and of running text: without comments, each on one line, single spaces."""
        for language, text in self.blocks:
            if language in SHELL:
                for line in text.replace("\\\n", " ").splitlines():
                    if command := one_line(re.sub(r"(^|\s)#.*", "", line)):
                        yield command
        for span in self.spans:
            words = span.split()
            if words[0] in PROGRAMS:
                yield span
            elif words[0] in SUBCOMMANDS and len(words) > 1:
                yield f"reelbatch {span}"

    def snippets(self) -> Iterator[str]:
        return (text for language, text in self.blocks if language in PYTHON)

    def options(self) -> Iterator[str]:
        """Options in running text, as `--keep-pixels`."""
        for span in self.spans:
            yield from re.findall(r"(?<!\S)--[a-z][\w-]*", span)


def one_line(text: str) -> str:
    return " ".join(text.split())


@cache
def documents() -> tuple[Document, ...]:
    paths = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md")), *(CHECKOUT / "examples").rglob("*.md")]
    pages = []
    for path in paths:
        text = path.read_text()
        blocks = tuple((found.group(1), found.group(2)) for found in FENCE.finditer(text))
        spans = tuple(one_line(span) for span in SPAN.findall(FENCE.sub("", text)))
        pages.append(Document(str(path.relative_to(CHECKOUT)), blocks, spans))
    return tuple(pages)
