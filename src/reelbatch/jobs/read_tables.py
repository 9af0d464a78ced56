"""Prompts in tables: CSV and Parquet, whose columns are fields of a request."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelbatch.jobs.entries import COLUMNS, REAL_COLUMNS, WHOLE_COLUMNS, Entry, Fault, Numbered, PromptError, bad_entry
from reelbatch.request import did_you_mean
from reelbatch.wording import shown_line

if TYPE_CHECKING:
    import pyarrow as pa

MOST_COLUMNS = 200
"""A header of more is that of another kind of file, and no fault is looked for in each."""
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
"""Pandas adds its index as a column of such a name."""


def _column_faults(names: Sequence[str]) -> list[str]:
    """What is wrong with a header."""
    if len(names) > MOST_COLUMNS:
        return [f"the header has {len(names)} columns, and there are {len(COLUMNS)} fields: {', '.join(COLUMNS)}"]
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


def read_csv(text: str, name: str, delimiter: str | None = None) -> Numbered:
    """A header that names fields, then a row an entry. delimiter: by the header if not given."""
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
                yield from ((line, bad_entry(where, fault)) for fault in _column_faults([]))
            return
        except csv.Error as error:
            unread = lines[line - 1 : above + rows.line_num]
            yield line, bad_entry(*_not_csv(where, str(error), header, unread, delimiter))
            if not header:
                return
        else:
            if not header:
                header = [cell.strip() for cell in cells]
                faults = _column_faults(header)
                yield from ((line, bad_entry(where, fault)) for fault in faults)
                if faults:
                    return
            elif len(cells) == len(header):
                pairs = zip(header, cells, strict=True)
                given = {column: _cell(column, cell) for column, cell in pairs if cell.strip() or column == "prompt"}
                yield line, Entry(where, given)
            elif cells:
                counts = f"has {len(cells)} cells, and the header {len(header)}"
                yield line, bad_entry(where, f"{counts}; quote a cell that holds a {delimiter!r}")
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


def read_parquet(data: bytes, path: Path) -> Iterator[Entry]:
    """A row an entry; null is not given.

    Raises:
        PromptError: if this is no Parquet file, or pyarrow is missing.
    """
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
        reason = shown_line(str(error))
        raise PromptError([Fault(str(path), f"not a Parquet file that can be read: {reason}")]) from None
    fields = [field for field in schema if not PANDAS_INDEX.fullmatch(field.name)]
    faults = _column_faults([field.name for field in fields])
    faults += [fault for field in fields if (fault := _type_fault(field.name, field.type))]
    columns: dict[str, list[Any]] = {}
    for name in [] if faults else [field.name for field in fields]:
        try:
            columns[name] = _values(file.read([name], use_threads=False).column(0))
            if len(columns[name]) != count:
                raise ValueError(f"it has {len(columns[name])} values for {count} rows")
        except Exception as error:  # as above
            faults.append(f"column {name!r}: cannot be read: {shown_line(str(error))}")
    if faults:
        yield from (bad_entry(path.name, fault) for fault in faults)
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
