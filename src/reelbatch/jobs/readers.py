"""Prompt files: one entry a line, a row or an array's element, with the place of all that is wrong.

- `.txt`, and any other ending: a prompt a line. Lines that begin with `#` are skipped; `\\#` begins a prompt with
  a `#`, and `\\\\#` one with `\\#`.
- `.jsonl`, `.ndjson`: a JSON object a line, of any fields of `VideoRequest` and `copies`; a JSON string alone is a
  prompt. Lines that begin with `#` are skipped.
- `.json`: one JSON array of such objects and strings. VBench's own are read as well (`VBench_full_info.json`): the
  prompt is `prompt_en`, the tags are the `dimension`s, and `auxiliary_info` is skipped.
- `.csv`, `.tsv`: a header that names fields, then a row a video; an empty cell is not given. Tags are split at `;`.
  Lines that begin with `#` are skipped before the header; after it, they are rows.
- `.parquet`, `.pq`: columns that are named after fields; null is not given. Tags are lists of texts, or split at `;`.

An `image` is the path of a file, relative to the prompt file's folder. Blank lines are skipped. Text files are UTF-8,
or UTF-16 or UTF-32 with a byte order mark, and hold no NUL.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from reelbatch.jobs.entries import Entry, Fault, Numbered, PromptError, bad_entry
from reelbatch.jobs.read_json import read_array, read_lines
from reelbatch.jobs.read_tables import read_csv, read_parquet

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BINARY = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP, AVI or WAV file"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive (as spreadsheets and documents of an office program are)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"PAR1", "a Parquet file (name it .parquet)"),
)
"""First bytes of files that are no text. A file is only refused by them if it holds what is no text besides."""
MANY_UNREADABLE = 20


def read_entries(path: str | Path) -> list[Entry]:
    """The entries of a prompt file, in its order. Lines that cannot be read are entries too, which hold their faults:
    `make_requests` raises them together with those of all other lines.

    Raises:
        PromptError: if the file as a whole cannot be read, or holds no prompt.
    """
    path = Path(path)
    data = _bytes(path)
    suffix = path.suffix.lower()
    entries = list(read_parquet(data, path) if suffix in (".parquet", ".pq") else _of_text(data, path.name, suffix))
    if not entries:
        raise PromptError([Fault(str(path), "holds no prompt")])
    return [_with_path(entry, path.parent) for entry in entries]


def _with_path(entry: Entry, folder: Path) -> Entry:
    """An entry's image is looked for beside the prompt file."""
    image = entry.fields.get("image")
    if not isinstance(image, str) or not image.strip():
        return entry
    path = Path(image.strip())
    beside = path if image.strip().startswith("~") else folder / path
    return replace(entry, fields={**entry.fields, "image": str(beside)})


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        message = "no such file"
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    except ValueError as error:  # no path, such as one with a NUL
        message = f"cannot be read: {error}"
    raise PromptError([Fault(str(path), message)])


def _of_text(data: bytes, name: str, suffix: str) -> list[Entry]:
    readers: dict[str, Callable[[str, str], Numbered]] = {
        ".jsonl": read_lines,
        ".ndjson": read_lines,
        ".json": read_array,
        ".csv": read_csv,
        ".tsv": partial(read_csv, delimiter="\t"),
    }
    text, unreadable = _decode(data, name)
    readable = [(line, entry) for line, entry in readers.get(suffix, _txt)(text, name) if line not in unreadable]
    return [entry for _, entry in sorted([*readable, *unreadable.items()], key=lambda numbered: numbered[0])]


def _decode(data: bytes, name: str) -> tuple[str, dict[int, Entry]]:
    """The text, and the lines that hold what is no text."""
    codec = next((codec for mark, codec in MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(codec)
        whole = "\0" not in text
    except UnicodeDecodeError as error:
        if codec != "utf-8-sig":
            number = data[: error.start].decode(codec, "ignore").count("\n") + 1
            fault = f"not {codec.upper()}, as its first bytes say: {error.reason}; save the file as UTF-8"
            raise PromptError([Fault(f"{name}, line {number}", fault)]) from None
        text = data.decode(codec, "surrogateescape")
        whole = False
    if whole:
        return text, {}
    if kind := _binary_kind(data):
        raise _not_text(name, f"is {kind}, no text")
    if text.count("\0") * 4 > len(text):
        fault = "is no text, or UTF-16 without a byte order mark (it is full of NUL); save the file as UTF-8"
        raise PromptError([Fault(name, fault)])
    unreadable: dict[int, Entry] = {}
    number = 0
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if wrong := re.search("[\0\ud800-\udfff]", line):
            what = "NUL" if wrong[0] == "\0" else f"byte {ord(wrong[0]) - 0xDC00:#04x} is not UTF-8"
            where = f"{name}, line {number}, column {wrong.start() + 1}"
            unreadable[number] = bad_entry(where, f"{what}; save the file as UTF-8 text")
    if len(unreadable) >= MANY_UNREADABLE and 2 * len(unreadable) > number:
        raise _not_text(name, f"{len(unreadable)} of its {number} lines hold what is no UTF-8 text")
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text), unreadable


def _binary_kind(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return "an MP4 or MOV video"
    return next((kind for start, kind in BINARY if data.startswith(start)), None)


def _not_text(name: str, what: str) -> PromptError:
    """One fault for a file that is no text at all, where each of its lines would be one."""
    fault = f"{what}; give a file of prompts (.txt, .jsonl, .json, .csv, .tsv, .parquet), saved as UTF-8"
    return PromptError([Fault(name, fault)])


def _txt(text: str, name: str) -> Numbered:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            fields = {"prompt": prompt[1:] if prompt.lstrip("\\").startswith("#") else prompt}
            yield number, Entry(f"{name}, line {number}", fields)
