"""Prompts in JSON: an object a line, or one array. Faults are named by line and column."""

from __future__ import annotations

import io
import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from reelbatch.jobs.entries import Entry, Fault, Numbered, bad_entry
from reelbatch.outside_json import is_deep

EXPECTED = 'expected a text or a JSON object, as in {"prompt": "a cat"}'
BLANK = re.compile(r"[ \t\n\r]*")


def read_lines(text: str, name: str) -> Numbered:
    """A JSON object or text a line."""
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
            yield number, bad_entry(f"{where}, column {error.pos + 1}", f"not JSON: {error.msg}")
        except RecursionError:
            yield number, bad_entry(f"{where}, column {start + 1}", "not usable JSON: it is nested too deeply")
        else:
            yield number, _of_value(value, twice, where, partial(_column, where), line, start)


def _column(line: str, index: int) -> str:
    return f"{line}, column {index + 1}"


def read_array(text: str, name: str) -> Numbered:
    """One JSON array of objects and texts."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    starts = [0, *(end.end() for end in re.finditer("\n", text))]

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
        yield line_of(index), bad_entry(f"{name}, {at(index)}", hint)
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
            yield line_of(error.pos), bad_entry(in_entry(where, error.pos), f"not JSON: {error.msg}")
            return
        except RecursionError:
            yield line_of(index), bad_entry(in_entry(where, index), "not usable JSON: it is nested too deeply")
            return
        place = partial(in_entry, where)
        yield line_of(index), _of_value(value, twice, place(index), place, text, index)
        index = _after_blank(text, after + 1) if more else after
    rest = _after_blank(text, index + 1)
    if rest < len(text):
        yield line_of(rest), bad_entry(f"{name}, {at(rest)}", "not JSON: Extra data")


def _value(text: str, start: int) -> tuple[Any, int, list[str]]:
    """The JSON value at `start`, where it ends, and names that an object in it gives twice."""
    twice: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    value, end = json.JSONDecoder(object_pairs_hook=to_dict, parse_int=_whole).raw_decode(text, start)
    if is_deep(value):
        raise RecursionError
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
        return bad_entry(at(start), EXPECTED)
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
        value = renamed | {name: own for name, own in value.items() if name not in skipped}

    known_places = cache(partial(_places, text, start))  # many fields may be wrong

    def place(name: str) -> str:
        index = known_places().get(own_names.get(name, name)) if text[start] == "{" else start
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
    blank = BLANK.match(text, index)
    return blank.end() if blank else index
