"""The file names of a job's videos: safe on every file system, or those that VBench's scorer looks for."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Literal

from reelbatch.request import VideoRequest

Naming = Literal["default", "vbench"]

MAX_STEM_BYTES = 250
"""File systems take 255 bytes, of which `.mp4` needs 4 and the sidecar's `.json` 5."""
IMPOSSIBLE = re.compile("/")
"""What no file name can hold, on any system."""
NOT_ON_WINDOWS = re.compile(r'[<>:"\\|?*\x01-\x1f]')
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³]) *\.", re.IGNORECASE)


def name_all(
    requests: Sequence[VideoRequest], naming: Naming, taken: Collection[str] = (), *, ignore_case: bool | None = None
) -> list[str]:
    """A file name for each request, with `.mp4`: no two are the same, none is `taken`, and none names a folder.

    The same arguments give the same names.

    Args:
        naming: of the request's name, or of its prompt if it has none. "default": its letters in ASCII and the seed,
            as `a-cat-seed0.mp4`, `a-cat-seed0-2.mp4`. "vbench": `{prompt}-{index}.mp4`, the index counting its videos
            from 0. It stands as it is, but for what no file name can hold (see `vbench_problems`).
        ignore_case: whether names that differ only in case, or in how a letter is composed, count as the same, as
            they do on macOS and Windows. By default: always, but for "vbench" only on those systems, since its suite
            has two prompts that differ only in case, and its scorer looks for both.

    Raises:
        ValueError: for another naming.
    """
    if naming not in ("default", "vbench"):
        raise ValueError(f"naming={naming!r} must be 'default' or 'vbench'")
    if ignore_case is None:
        ignore_case = naming == "default" or sys.platform in ("darwin", "win32")
    stem, numbered = (file_stem, _numbered) if naming == "default" else (_vbench_stem, _indexed)
    same: Callable[[str], str] = _caseless if ignore_case else str
    used = {same(name) for name in taken}
    # The next number for each stem: trying all from 0 would take the square of the number of copies.
    numbers: defaultdict[str, count[int]] = defaultdict(count)
    names = [""] * len(requests)
    # A prompt that is altered must not take the name of one that reads so.
    order = (
        range(len(requests))
        if naming == "default"
        else sorted(range(len(requests)), key=lambda i: _altered(requests[i]))
    )
    for i in order:
        words = stem(requests[i])
        free = (name for number in numbers[same(words)] if same(name := f"{numbered(words, number)}.mp4") not in used)
        names[i] = next(free)
        used.add(same(names[i]))
    return names


def file_stem(request: VideoRequest) -> str:
    """A file name without its ending that every file system takes: the name's letters, in ASCII, and the seed."""
    ascii_prompt = unicodedata.normalize("NFKD", _words(request)).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_prompt).strip("-")
    if len(words) > 64:
        words = words[:65].rpartition("-")[0] or words[:64]
    return f"{words or 'video'}-seed{request.seed}"


def vbench_problems(requests: Sequence[VideoRequest]) -> list[str]:
    """What does not go well with the naming "vbench", a line each: prompts that no file name can hold as they are, so
    that the scorer does not find their videos, and prompts that file names of Windows or macOS cannot hold."""
    problems = []
    spelled: dict[str, str] = {}
    for prompt in dict.fromkeys(map(_words, requests)):
        shown = repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
        if IMPOSSIBLE.search(prompt):
            problems.append(f"{shown}: no file name can hold {_listed(IMPOSSIBLE, prompt)}; it becomes _, {NOT_FOUND}")
        if _cut(prompt, 0) != prompt:
            size = len(prompt.encode())
            problems.append(f"{shown}: is too long for a file name ({size} bytes); its end is cut off, {NOT_FOUND}")
        if NOT_ON_WINDOWS.search(prompt):
            problems.append(f"{shown}: no file name on Windows can hold {_listed(NOT_ON_WINDOWS, prompt)}")
        if WINDOWS_DEVICE.match(prompt):
            problems.append(f"{shown}: no file name on Windows can begin like this, with the name of a device")
        first = spelled.setdefault(_caseless(prompt), prompt)
        if first != prompt:
            problems.append(
                f"{shown}: differs from an earlier prompt only in case or in how a letter is composed; macOS and "
                "Windows hold both under one file name, so there this one is numbered on from the other's last video"
            )
    return problems


NOT_FOUND = "and VBench's scorer will not find it"


def _words(request: VideoRequest) -> str:
    return request.name or request.prompt


def _numbered(stem: str, number: int) -> str:
    return f"{stem}-{number + 1}" if number else stem


def _vbench_stem(request: VideoRequest) -> str:
    return _cut(IMPOSSIBLE.sub("_", _words(request)), 0)


def _indexed(stem: str, index: int) -> str:
    return f"{_cut(stem, index)}-{index}"


def _cut(text: str, index: int) -> str:
    """As much of the text's beginning as fits before "-{index}"."""
    return text.encode()[: MAX_STEM_BYTES - len(f"-{index}")].decode(errors="ignore")


def _altered(request: VideoRequest) -> bool:
    return _vbench_stem(request) != _words(request)


def _caseless(name: str) -> str:
    """The same for names that a file system may hold to be one: Unicode's canonical caseless matching."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _listed(pattern: re.Pattern[str], prompt: str) -> str:
    return " or ".join(repr(character) for character in dict.fromkeys(pattern.findall(prompt)))
