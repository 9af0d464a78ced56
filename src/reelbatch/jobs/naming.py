"""The file names of a job's videos: safe on every file system, or those that VBench's scorer looks for.

Names are compared by their stems: the sidecar `name.json` is that of `name.mp4` as well as of `name.gif`.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Literal, get_args

import regex

from reelbatch.formats import ENDINGS
from reelbatch.request import SEED_LIMIT, VideoRequest

Naming = Literal["default", "ascii", "vbench"]

MAX_STEM_BYTES = 250
"""File systems take 255 bytes, of which the longest endings, `.webm` and the sidecar's `.json`, need 5. Unfinished
files have names of their own."""
MAX_WORDS_LETTERS = 64
MAX_WORDS_BYTES = MAX_STEM_BYTES - len(f"-seed{SEED_LIMIT}-1000000")
IMPOSSIBLE = regex.compile("/")
"""What no file name can hold, on any system."""
NOT_ON_WINDOWS = regex.compile(r'[<>:"\\|?*\x01-\x1f]')
WINDOWS_DEVICE = regex.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³]) *\.", regex.IGNORECASE)
WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{Mn}\p{Mc}]*")
"""Letters, digits and the marks on them."""
UNSEEN = regex.compile(r"(?!\u200c)[\p{Default_Ignorable_Code_Point}\p{Cf}]")
"""Characters that are not seen, which file systems may pass over. The one left out separates letters, like a space."""


def name_all(
    requests: Sequence[VideoRequest],
    naming: Naming,
    taken: Collection[str] = (),
    *,
    ending: str = ".mp4",
    ignore_case: bool | None = None,
) -> list[str]:
    """A file name for each request: no two stems are the same, none is that of a `taken` name.

    The same arguments give the same names.

    Args:
        naming: of the request's name, or of its prompt if it has none. "default": its letters, in any script, and the
            seed, as `a-cat-seed0.mp4`, `a-cat-seed0-2.mp4`. "ascii": the same with letters of ASCII alone. "vbench":
            `{prompt}-{index}.mp4`, the index counting its videos from 0. It stands as it is, but for what no file
            name can hold (see `vbench_problems`).
        taken: names that are there, with any ending that a video or a sidecar can have.
        ending: of the names that are given out; "" for folders.
        ignore_case: whether names that differ only in case, or in how a letter is composed, count as the same, as
            they do on macOS and Windows. By default: always, but for "vbench" only on those systems, since its suite
            has two prompts that differ only in case, and its scorer looks for both.

    Raises:
        ValueError: for another naming.
    """
    if naming not in get_args(Naming):
        raise ValueError(f"naming={naming!r} must be 'default', 'ascii' or 'vbench'")
    vbench = naming == "vbench"
    if ignore_case is None:
        ignore_case = not vbench or sys.platform in ("darwin", "win32")
    stem = {"default": file_stem, "ascii": ascii_stem, "vbench": _vbench_stem}[naming]
    numbered = _indexed if vbench else _numbered
    same: Callable[[str], str] = _caseless if ignore_case else str
    used = {same(without_ending(name)) for name in taken}
    # The next number for each stem: trying all from 0 would take the square of the number of copies.
    numbers: defaultdict[str, count[int]] = defaultdict(count)
    names = [""] * len(requests)
    # A prompt that is altered must not take the name of one that reads so.
    order = sorted(range(len(requests)), key=lambda i: vbench and _altered(requests[i]))
    for i in order:
        words = stem(requests[i])
        free = (name for number in numbers[same(words)] if same(name := numbered(words, number)) not in used)
        name = next(free)
        used.add(same(name))
        names[i] = f"{name}{ending}"
    return names


def file_stem(request: VideoRequest) -> str:
    """A file name without its ending: the name's letters and digits in any script, composed (NFC), and the seed.

    Every file system with Unicode names takes it: no character that one reserves, at most `MAX_STEM_BYTES` with a
    number behind it, and cut between what a reader sees as letters.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", UNSEEN.sub("", _words(request))).lower())
    words = _cut_words("-".join(WORD.findall(text)))
    return f"{words or 'video'}-seed{request.seed}"


def ascii_stem(request: VideoRequest) -> str:
    """As `file_stem`, of ASCII letters and digits alone; accents are taken off, other letters are left out."""
    ascii_prompt = unicodedata.normalize("NFKD", _words(request)).encode("ascii", "ignore").decode().lower()
    words = regex.sub(r"[^a-z0-9]+", "-", ascii_prompt).strip("-")
    if len(words) > MAX_WORDS_LETTERS:
        words = words[: MAX_WORDS_LETTERS + 1].rpartition("-")[0] or words[:MAX_WORDS_LETTERS]
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


def without_ending(name: str) -> str:
    """The stem of a file's name, if its ending is that of a video or a sidecar; else the whole name."""
    stem, dot, ending = name.rpartition(".")
    return stem if f"{dot}{ending.lower()}" in (*ENDINGS.values(), ".json") and stem else name


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
    return _beginning(text, MAX_STEM_BYTES - len(f"-{index}"))


def _beginning(text: str, size: int, letters: int = MAX_STEM_BYTES) -> str:
    """At most so many bytes and code points, cut between what a reader sees as letters; within the first, if that is
    larger alone."""
    fits = text[:letters].encode()[:size].decode(errors="ignore")
    if fits == text:
        return text
    end = 0
    for letter in regex.finditer(r"\X", text):
        if letter.end() > len(fits):
            break
        end = letter.end()
    return text[:end] or fits


def _cut_words(words: str) -> str:
    """Short enough for a name; between words, where that costs no more than half."""
    cut = _beginning(words, MAX_WORDS_BYTES, MAX_WORDS_LETTERS)
    if cut == words or words[len(cut)] == "-":
        return cut.strip("-")
    whole = cut.rpartition("-")[0]
    return whole if len(whole) * 2 > len(cut) else cut.strip("-")


def _altered(request: VideoRequest) -> bool:
    return _vbench_stem(request) != _words(request)


def _caseless(name: str) -> str:
    """The same for names that a file system may hold to be one: Unicode's canonical caseless matching, and letters of
    which only the capitals are the same, such as the dotless i."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).upper().casefold())


def _listed(pattern: regex.Pattern[str], prompt: str) -> str:
    return " or ".join(repr(character) for character in dict.fromkeys(pattern.findall(prompt)))
