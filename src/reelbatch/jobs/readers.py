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

Blank lines are skipped. Text files are UTF-8, or UTF-16 or UTF-32 with a byte order mark, and hold no NUL.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reelbatch.request import FIELDS, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (*FIELDS, "copies")
WHOLE_COLUMNS = {"seed", "height", "width", "frames", "steps", "fps", "copies"}
REAL_COLUMNS = {"guidance", "true_cfg", "flow_shift"}
SHOWN_PROBLEMS = 20
SHOWN_LETTERS = 400
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


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

    faults: what is wrong with the line itself, so that its fields cannot be known. place: where one field stands, for
    formats that tell it more exactly than the line.
    """

    where: str
    fields: Mapping[str, Any]
    faults: tuple[Fault, ...] = ()
    place: Callable[[str], str] | None = field(default=None, compare=False, repr=False)

    def where_is(self, name: str | None) -> str:
        return self.where if name is None or self.place is None else self.place(name)


Numbered = Iterator[tuple[int, Entry]]
"""What a reader of text gives: an entry, and the line that it begins at."""


def read_entries(path: str | Path) -> list[Entry]:
    """The entries of a prompt file, in its order. Lines that cannot be read are entries too, which hold their faults:
    `make_requests` raises them together with those of all other lines.

    Raises:
        PromptError: if the file as a whole cannot be read, or holds no prompt.
    """
    path = Path(path)
    data = _bytes(path)
    suffix = path.suffix.lower()
    entries = list(_parquet(data, path) if suffix in (".parquet", ".pq") else _of_text(data, path.name, suffix))
    if not entries:
        raise PromptError([Fault(str(path), "holds no prompt")])
    return entries


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


def _bad(where: str, message: str) -> Entry:
    return Entry(where, {}, (Fault(where, message),))


# -- text ------------------------------------------------------------------------------------------


def _of_text(data: bytes, name: str, suffix: str) -> list[Entry]:
    readers: dict[str, Callable[[str, str], Numbered]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": partial(_csv, delimiter="\t"),
    }
    text, unreadable = _decode(data, name)
    found = [(line, entry) for line, entry in readers.get(suffix, _txt)(text, name) if line not in unreadable]
    return [entry for _, entry in sorted([*found, *unreadable.items()], key=lambda numbered: numbered[0])]


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
    if text.count("\0") * 4 > len(text):
        fault = "is no text, or UTF-16 without a byte order mark (it is full of NUL); save the file as UTF-8"
        raise PromptError([Fault(name, fault)])
    unreadable: dict[int, Entry] = {}
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        found = re.search("[\0\ud800-\udfff]", line)
        if found:
            what = "NUL" if found[0] == "\0" else f"byte {ord(found[0]) - 0xDC00:#04x} is not UTF-8"
            where = f"{name}, line {number}, column {found.start() + 1}"
            unreadable[number] = _bad(where, f"{what}; save the file as UTF-8 text")
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text), unreadable


def _txt(text: str, name: str) -> Numbered:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            fields = {"prompt": prompt[1:] if prompt.lstrip("\\").startswith("#") else prompt}
            yield number, Entry(f"{name}, line {number}", fields)


# -- JSON ------------------------------------------------------------------------------------------

EXPECTED = 'expected a text or a JSON object, as in {"prompt": "a cat"}'
BLANK = re.compile(r"[ \t\n\r]*")


def _jsonl(text: str, name: str) -> Numbered:
    # Not splitlines, as JSON strings may hold U+2028; they hold no CR and no LF.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        line = line.rstrip("\n")
        where = f"{name}, line {number}"
        start = _after_blank(line, 0)
        try:
            value, end, twice = _value(line, start)
            if _after_blank(line, end) < len(line):
                raise json.JSONDecodeError("Extra data", line, _after_blank(line, end))
        except json.JSONDecodeError as error:
            yield number, _bad(f"{where}, column {error.pos + 1}", f"not JSON: {error.msg}")
        except RecursionError:
            yield number, _bad(f"{where}, column {start + 1}", "not usable JSON: it is nested too deeply")
        else:
            yield number, _of_value(value, twice, where, partial(_column, where), line, start)


def _column(line: str, index: int) -> str:
    return f"{line}, column {index + 1}"


def _json(text: str, name: str) -> Numbered:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    starts = [0, *(found.end() for found in re.finditer("\n", text))]

    def line_of(index: int) -> int:
        return bisect_right(starts, index)

    def at(index: int) -> str:
        return _column(f"line {line_of(index)}", index - starts[line_of(index) - 1])

    def in_entry(where: str, index: int) -> str:
        return f"{where} ({at(index)})"

    index = _after_blank(text, 0)
    if index == len(text):
        return
    if text[index] != "[":
        hint = 'expected a JSON array, as in ["a cat", {"prompt": "a dog"}]; for an object a line, name the file .jsonl'
        yield line_of(index), _bad(f"{name}, {at(index)}", hint)
        return
    index = _after_blank(text, index + 1)
    number = 0
    more = not text.startswith("]", index)
    while more:
        number += 1
        where = f"{name}, entry {number}"
        try:
            value, end, twice = _value(text, index)
            after = _after_blank(text, end)
            more = text.startswith(",", after)
            if not more and not text.startswith("]", after):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        except json.JSONDecodeError as error:
            yield line_of(error.pos), _bad(in_entry(where, error.pos), f"not JSON: {error.msg}")
            return
        except RecursionError:
            yield line_of(index), _bad(in_entry(where, index), "not usable JSON: it is nested too deeply")
            return
        place = partial(in_entry, where)
        yield line_of(index), _of_value(value, twice, place(index), place, text, index)
        index = _after_blank(text, after + 1) if more else after
    rest = _after_blank(text, index + 1)
    if rest < len(text):
        yield line_of(rest), _bad(f"{name}, {at(rest)}", "not JSON: Extra data")


def _value(text: str, start: int) -> tuple[Any, int, list[str]]:
    """The JSON value at `start`, where it ends, and names that an object in it gives twice."""
    twice: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return found

    value, end = json.JSONDecoder(object_pairs_hook=to_dict, parse_int=_whole).raw_decode(text, start)
    return value, end, twice


def _whole(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts
        return math.copysign(math.inf, -1 if digits.startswith("-") else 1)


def _of_value(value: Any, twice: Sequence[str], where: str, at: Callable[[int], str], text: str, start: int) -> Entry:
    if isinstance(value, str):
        value = {"prompt": value}
    elif not isinstance(value, dict):
        return _bad(at(start), EXPECTED)
    if twice:
        places = _places(text, start)
        return Entry(where, {}, tuple(Fault(at(places.get(name, start)), f"{name} is given twice") for name in twice))
    own_names = {}
    if "prompt_en" in value and "prompt" not in value:
        own_names["prompt"] = "prompt_en"
        if "dimension" in value and "tags" not in value:
            own_names["tags"] = "dimension"
        skipped = {"auxiliary_info", *own_names.values()}
        renamed = {name: value[own] for name, own in own_names.items()}
        value = renamed | {name: found for name, found in value.items() if name not in skipped}

    def place(name: str) -> str:
        index = _places(text, start).get(own_names.get(name, name)) if text[start] == "{" else start
        return where if index is None else at(index)

    return Entry(where, value, place=place)


def _places(text: str, start: int) -> dict[str, int]:
    """Where the values of the JSON object at `start` begin; the last of those that are there twice."""
    read = json.JSONDecoder(parse_int=_whole).raw_decode
    places = {}
    index = _after_blank(text, start + 1)
    while text[index] == '"':
        name, index = read(text, index)
        places[name] = _after_blank(text, _after_blank(text, index) + 1)
        index = _after_blank(text, read(text, places[name])[1])
        if text[index] == ",":
            index = _after_blank(text, index + 1)
    return places


def _after_blank(text: str, index: int) -> int:
    found = BLANK.match(text, index)
    return found.end() if found else index


# -- tables ----------------------------------------------------------------------------------------


def _column_faults(names: Sequence[str]) -> list[str]:
    faults = []
    for number, name in enumerate(names, 1):
        if not name:
            faults.append(f"column {number} has no name")
        elif name not in COLUMNS:
            faults.append(f"column {name!r}: no such field; {did_you_mean(name, COLUMNS)}")
    faults += [f"column {name!r} is there twice" for name, count in Counter(names).items() if name and count > 1]
    if "prompt" not in names:
        faults.append(f"there must be a column 'prompt', and there is {', '.join(filter(None, names)) or 'none'}")
    return faults


def _csv(text: str, name: str, delimiter: str | None = None) -> Numbered:
    lines = list(io.StringIO(text, newline=""))
    above = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), len(lines))
    first = lines[above] if above < len(lines) else ""
    delimiter = delimiter or next((mark for mark in ",;\t" if mark in first), ",")
    rows = csv.reader(islice(lines, above, None), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = above + 1
    while True:
        where = f"{name}, line {line}"
        try:
            cells = next(rows)
        except StopIteration:
            if not header:
                yield from ((line, _bad(where, fault)) for fault in _column_faults([]))
            return
        except csv.Error as error:
            unread = lines[line - 1 : above + rows.line_num]
            yield line, _bad(*_not_csv(where, str(error), header, unread, delimiter))
            if not header:
                return
        else:
            if not header:
                header = [cell.strip() for cell in cells]
                faults = _column_faults(header)
                yield from ((line, _bad(where, fault)) for fault in faults)
                if faults:
                    return
            elif len(cells) == len(header):
                pairs = zip(header, cells, strict=True)
                given = {column: _cell(column, cell) for column, cell in pairs if cell.strip() or column == "prompt"}
                yield line, Entry(where, given)
            elif cells:
                counts = f"has {len(cells)} cells, and the header {len(header)}"
                yield line, _bad(where, f"{counts}; quote a cell that holds a {delimiter!r}")
        line = above + rows.line_num + 1


def _not_csv(where: str, error: str, header: list[str], unread: list[str], delimiter: str) -> tuple[str, str]:
    if error != "unexpected end of data":
        return where, f"not CSV: {error}"
    cells = next(csv.reader(unread, delimiter=delimiter), [])  # not strict: the open cell is the last
    column = f", column {header[len(cells) - 1]!r}" if 0 < len(cells) <= len(header) else ""
    return f"{where}{column}", "not CSV: a quote is opened and never closed"


def _cell(column: str, cell: str) -> Any:
    """A cell as its field's type; as it is where that fails, for `VideoRequest` to refuse by name."""
    if column == "tags":
        return _split_tags(cell)
    try:
        if column in WHOLE_COLUMNS:
            return int(cell)
        if column in REAL_COLUMNS:
            return float(cell)
    except ValueError:
        if column in WHOLE_COLUMNS:
            return _as_whole(cell)
    return cell


def _as_whole(cell: str) -> int | float | str:
    """5.0 is 5: tables write whole numbers so where another row has none."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    if not math.isfinite(number):
        return cell
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _split_tags(cell: str) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in cell.split(";") if tag.strip())


def _parquet(data: bytes, path: Path) -> Iterator[Entry]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        message = 'Parquet files need pyarrow: pip install "reelbatch[parquet]"'
        raise PromptError([Fault(str(path), message)]) from None
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema, count = file.schema_arrow, file.metadata.num_rows
    except Exception as error:  # pyarrow's own, OSError, or what it lets through from a file of nonsense
        raise PromptError([Fault(str(path), f"not a Parquet file that can be read: {error}")]) from None
    # pandas adds its index as a column of such a name.
    fields = [found for found in schema if not re.fullmatch(r"__index_level_\d+__", found.name)]
    faults = _column_faults([found.name for found in fields])
    faults += [fault for found in fields if (fault := _type_fault(found.name, found.type))]
    columns: dict[str, list[Any]] = {}
    for found in [] if faults else fields:
        try:
            columns[found.name] = _values(file.read([found.name], use_threads=False).column(0))
            if len(columns[found.name]) != count:
                raise ValueError(f"it has {len(columns[found.name])} values for {count} rows")
        except Exception as error:  # as above
            faults.append(f"column {found.name!r}: cannot be read: {error}")
    if faults:
        yield from (_bad(path.name, fault) for fault in faults)
        return
    for row, cells in enumerate(zip(*columns.values(), strict=True), 1):
        pairs = zip(columns, cells, strict=True)
        given = {column: _parquet_cell(column, cell) for column, cell in pairs if cell is not None}
        unread = [
            Fault(f"{path.name}, row {row}", f"column {column!r}: is not UTF-8")
            for column, cell in given.items()
            if isinstance(cell, UnicodeError)
        ]
        yield Entry(f"{path.name}, row {row}", given, tuple(unread))


def _type_fault(column: str, type: pa.DataType) -> str | None:
    from pyarrow import types

    if column not in COLUMNS:
        return None
    if types.is_dictionary(type):
        type = type.value_type
    if column in WHOLE_COLUMNS or column in REAL_COLUMNS:
        good = types.is_integer(type) or types.is_floating(type)
        wanted = "whole numbers" if column in WHOLE_COLUMNS else "numbers"
    elif column == "tags":
        lists = types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type)
        good, wanted = _is_text(type.value_type if lists else type), "lists of texts"
    else:
        good, wanted = _is_text(type), "texts"
    if good or types.is_null(type):
        return None
    return f"column {column!r}: holds {type}, and must hold {wanted}"


def _is_text(type: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    return types.is_string(type) or types.is_large_string(type) or types.is_string_view(type)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Its values as Python's; in place of a text that is no UTF-8, the error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value_or_error(scalar) for scalar in column]


def _value_or_error(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _parquet_cell(column: str, cell: Any) -> Any:
    if isinstance(cell, UnicodeError):
        return cell
    if column == "tags" and isinstance(cell, str):
        return _split_tags(cell)
    if column in WHOLE_COLUMNS and isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return int(cell)  # pandas holds whole numbers so where a row has none
    return cell


def _printable(text: str) -> str:
    """For a terminal and a log: whatever a file holds, a line."""
    shown = text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
