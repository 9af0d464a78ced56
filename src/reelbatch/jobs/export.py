"""Export: the rows of a manifest as CSV for a spreadsheet, or as JSON lines for a script."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reelbatch.files import aside
from reelbatch.jobs.schema import VideoRow
from reelbatch.wording import printable_json

FORMULA = tuple("=+-@＝＋－＠")
"""What a spreadsheet takes for the beginning of a formula, as OWASP lists it ("CSV injection")."""


def write_rows(rows: Sequence[VideoRow], to: Path | None) -> None:
    """Writes rows to `to` (.csv, else JSON lines), or prints them; an earlier file is replaced at once.

    Raises:
        OSError: if it cannot be written; says why.
    """
    records = [row.record() for row in rows]
    if to is None:
        sys.stdout.write(printable_json(_json_lines(records)))
        return
    text = _csv(records) if to.suffix == ".csv" else _json_lines(records)
    if not to.parent.is_dir():
        raise FileNotFoundError(f"{to}: there is no folder {to.parent}; make it first, or name another file")
    if to.is_dir():
        raise IsADirectoryError(f"{to}: is a folder; name a file")
    try:
        with aside(to) as part:
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OSError(f"{to}: cannot be written: {error.strerror or error}") from error


def _json_lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _csv(records: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(records[0] if records else [])
    writer.writerows([_cell(value) for value in record.values()] for record in records)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    """What a spreadsheet shows and does not compute: a text that begins as a formula does gets an apostrophe."""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and (value.lstrip().startswith(FORMULA) or value[:1] in ("\t", "\r", "\n")):
        return f"'{value}"
    return value
