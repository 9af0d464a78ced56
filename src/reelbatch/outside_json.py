"""JSON from outside: bounded in size, in nesting and in the digits of its numbers, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_LEVELS = 64
"""Of lists and objects within each other. No file that is read here needs a dozen."""
MOST_BYTES = 64 * 2**20
"""Of a JSON file. The largest, an index of the weights of a large model, has about 100 KiB."""
REMEDY = "get the file again"


def parse(text: str | bytes) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: if it is no JSON, or is nested deeper than `MOST_LEVELS`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if is_deep(value):
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
    return value


def read_object(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the remedy but not the file, for all else that keeps it from being read.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, and {MOST_BYTES} are read at most")
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"is no JSON object; {remedy}")
    return value


def is_deep(value: object, most: int = MOST_LEVELS) -> bool:
    """Whether lists and objects are nested deeper than `most`."""
    layer = [value]
    for _ in range(most):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return False
    return True
