"""Prompt files: many requests from one file, and every fault in it said at once.

- `.txt`: a prompt a line. Blank lines and lines that begin with `#` are skipped; `\\#` begins a prompt with a `#`.
- `.jsonl`: a JSON object a line, of any fields of `VideoRequest` and `copies`; a JSON string alone is a prompt.
- `.csv`, `.tsv`: a header that names fields, then a row a video; an empty cell is not given. Tags are split at `;`.

Files are UTF-8 (or UTF-16 with a byte order mark). What a line does not say is taken from the defaults.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from reelbatch.request import FIELDS, SEED_LIMIT, ModelLimits, RequestError, VideoRequest, did_you_mean

COLUMNS = (*FIELDS, "copies")
WHOLE_COLUMNS = {"seed", "height", "width", "frames", "steps", "fps", "copies"}
REAL_COLUMNS = {"guidance", "true_cfg", "flow_shift"}
SHOWN_PROBLEMS = 20


class Fault(NamedTuple):
    """One thing that is wrong: `where` it is ("prompts.csv, line 3") and what, in words for a person."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class PromptError(ValueError):
    """Prompts that cannot be made. `faults` holds all of them; the text shows the first 20."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [str(fault) for fault in self.faults[:SHOWN_PROBLEMS]]
        if len(self.faults) > SHOWN_PROBLEMS:
            lines.append(f"… and {len(self.faults) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Entry:
    """What one line asks for, not yet checked."""

    where: str
    fields: Mapping[str, Any]


# Each reader yields a line's number with its fields, or with what is wrong with it.
Found = Iterator[tuple[int, dict[str, Any] | str]]


def read_prompts(path: str | Path, **defaults: Any) -> list[VideoRequest]:
    """The requests of a prompt file, in its order. `defaults`: fields for the lines that do not say them.

    Raises `PromptError` with all faults of the file.
    """
    return make_requests(read_entries(path), defaults)


def make_requests(
    entries: Iterable[Entry],
    defaults: Mapping[str, Any] | None = None,
    *,
    first_seed: int | None = None,
    limits: ModelLimits | None = None,
) -> list[VideoRequest]:
    """Entries, checked and with their copies.

    first_seed: the seed of a request that names none; further requests that are otherwise equal get the seeds after
        it, so that a prompt asked for twice gives two videos, and the same entries always give the same seeds.
        None: drawn at random.
    limits: of the model, if known already: fills open fields and refuses what it cannot make.
    """
    requests: list[VideoRequest] = []
    faults: list[Fault] = []
    seeds_taken: Counter[VideoRequest] = Counter()
    homes: dict[str, str] = {}
    for entry in entries:
        fields = dict(defaults or {}) | dict(entry.fields)
        copies = fields.pop("copies", 1)
        try:
            counted = first_seed is not None and "seed" not in fields
            if counted:
                fields["seed"] = first_seed
            request = VideoRequest(**fields)
            if limits is not None:
                request = request.for_model(limits)
            if counted:
                twin = request.model_copy(update={"id": "", "tags": ()})
                request = request.model_copy(update={"seed": (request.seed + seeds_taken[twin]) % SEED_LIMIT})
                made = _copies(request, copies)
                seeds_taken[twin] += len(made)
            else:
                made = _copies(request, copies)
        except RequestError as error:
            faults.extend(Fault(entry.where, problem.message) for problem in error.problems)
            continue
        for one in made:
            if one.id in homes:
                faults.append(Fault(entry.where, f"id={one.id!r} is taken by {homes[one.id]}; ids must differ"))
            homes[one.id] = entry.where
        requests.extend(made)
    if faults:
        raise PromptError(faults)
    return requests


def _copies(request: VideoRequest, count: Any) -> list[VideoRequest]:
    """A single copy keeps the request's id."""
    return [request] if type(count) is int and count == 1 else request.copies(count)


def read_entries(path: str | Path) -> list[Entry]:
    """The entries of a prompt file, in its order. Raises `PromptError` with all its faults."""
    path = Path(path)
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[str], Found]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": _csv,
        ".tsv": partial(_csv, delimiter="\t"),
    }
    if suffix == ".json":
        raise PromptError([Fault(str(path), "write one JSON object a line, and name the file .jsonl")])
    entries: list[Entry] = []
    faults: list[Fault] = []
    for line, found in readers.get(suffix, _txt)(_text(path)):
        where = f"{path.name}, line {line}"
        if isinstance(found, str):
            faults.append(Fault(where, found))
        else:
            entries.append(Entry(where, found))
    if faults:
        raise PromptError(faults)
    if not entries:
        raise PromptError([Fault(str(path), "holds no prompt")])
    return entries


def _txt(text: str) -> Found:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt[1:] if prompt.startswith("\\#") else prompt}


def _jsonl(text: str) -> Found:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_no_field_twice)
        except json.JSONDecodeError as error:
            yield number, f"column {error.colno}: not JSON: {error.msg}"
        except (ValueError, RecursionError) as error:
            yield number, f"not usable JSON: {error}"
        else:
            if isinstance(value, str):
                value = {"prompt": value}
            yield number, value if isinstance(value, dict) else 'expected a JSON object, as in {"prompt": "a cat"}'


def _no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    return dict(pairs)


def _csv(text: str, delimiter: str | None = None) -> Found:
    delimiter = delimiter or next((mark for mark in ",;\t" if mark in text.partition("\n")[0]), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(rows, [])]
        bad = [
            f"column {name!r}: no such field; {did_you_mean(name, COLUMNS)}" for name in header if name not in COLUMNS
        ]
        bad += [f"column {name!r} is there twice" for name, count in Counter(header).items() if count > 1]
        if "prompt" not in header:
            bad.append(f"the header must name a column 'prompt', and names {', '.join(header) or 'nothing'}")
        yield from ((line, fault) for fault in bad)
        if bad:
            return
        line = rows.line_num + 1
        for cells in rows:
            if len(cells) == len(header):
                pairs = zip(header, cells, strict=True)
                yield line, {name: _cell(name, cell) for name, cell in pairs if cell.strip() or name == "prompt"}
            elif cells:
                counts = f"has {len(cells)} cells, and the header {len(header)}"
                yield line, f"{counts}; quote a cell that holds a {delimiter!r}"
            line = rows.line_num + 1
    except csv.Error as error:
        yield line, f"not CSV: {error}"


def _cell(column: str, cell: str) -> Any:
    """A cell as its field's type; as it is where that fails, for `VideoRequest` to refuse by name."""
    if column == "tags":
        return tuple(tag.strip() for tag in cell.split(";") if tag.strip())
    kinds = (int, float) if column in WHOLE_COLUMNS else (float,) if column in REAL_COLUMNS else ()
    for kind in kinds:
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise PromptError([Fault(str(path), "no such file")]) from None
    except OSError as error:
        raise PromptError([Fault(str(path), f"cannot be read: {error.strerror}")]) from None
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = f"byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        raise PromptError([Fault(f"{path.name}, line {line}", fault)]) from None
