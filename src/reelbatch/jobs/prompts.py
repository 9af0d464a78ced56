"""From prompts to requests: checked, with their copies and seeds, chosen and put in order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reelbatch.jobs.entries import COLUMNS, REAL_COLUMNS, WHOLE_COLUMNS, Entry, Fault, PromptError
from reelbatch.jobs.readers import read_entries
from reelbatch.request import (
    FIELDS,
    NAMES_ONLY,
    SEED_LIMIT,
    ModelLimits,
    Problem,
    RequestError,
    VideoRequest,
    did_you_mean,
    shown,
    unknown_fields,
)

__all__ = [
    "Entry",
    "Fault",
    "PromptError",
    "make_requests",
    "named_after",
    "only_those",
    "read_entries",
    "read_prompts",
    "shuffled",
]

MAX_COPIES = 100_000
"""More copies of one line are a slip, and would fill the memory."""
SELECTORS = ("tag", *(name for name in FIELDS if name != "tags"))


def read_prompts(path: str | Path, **defaults: Any) -> list[VideoRequest]:
    """The requests of a prompt file, in its order. `defaults`: fields for the lines that do not say them.

    Raises:
        PromptError: with all faults of the file.
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

    Args:
        defaults: fields, and `copies`, for the entries that do not say them.
        first_seed: the seed of a request that names none; further requests that are otherwise equal get the seeds after
            it, so that a prompt asked for twice gives two videos, and the same entries always give the same seeds.
            None: drawn at random.
        limits: of the model, if known already: fills open fields and refuses what it cannot make.

    Raises:
        PromptError: with all that is wrong in all entries.
    """
    requests: list[VideoRequest] = []
    faults: list[Fault] = []
    seeds_taken: Counter[str] = Counter()
    homes: dict[str, str] = {}
    for entry in entries:
        fields = dict(defaults or {}) | dict(entry.fields)
        copies = fields.pop("copies", 1)
        counted = first_seed is not None and "seed" not in fields
        if counted:
            fields["seed"] = first_seed
        request, problems = _check(fields, copies, limits)
        if entry.faults or problems:
            faults += entry.faults or (Fault(entry.where_is(problem.field), problem.message) for problem in problems)
            continue
        if counted:
            twin = request.model_dump_json(exclude=set(NAMES_ONLY))
            request = request.model_copy(update={"seed": (request.seed + seeds_taken[twin]) % SEED_LIMIT})
            seeds_taken[twin] += copies
        copied = [request] if copies == 1 else request.copies(copies)  # a single one keeps the request's id
        for one in copied:
            if one.id in homes:
                faults.append(Fault(entry.where, f"id={one.id!r} is taken by {homes[one.id]}; ids must differ"))
            homes[one.id] = entry.where
        requests.extend(copied)
    if faults:
        raise PromptError(faults)
    return requests


def named_after(entries: Sequence[Entry], path: str | Path) -> list[Entry]:
    """The entries of a suite of rewritten prompts, each with the prompt of the same place in `path` as its `name`.

    Raises:
        PromptError: if the file has a fault or holds not as many prompts, or if an entry has a name already.
    """
    names = read_entries(path)
    if len(names) != len(entries):
        counts = f"holds {len(names)} prompts to name videos after, and there are {len(entries)} entries to be named"
        raise PromptError([Fault(str(path), counts)])
    faults = [fault for named in names for fault in named.faults]
    faults += [
        Fault(named.where, "has no prompt to name a video after")
        for named in names
        if not named.faults and "prompt" not in named.fields
    ]
    faults += [Fault(entry.where_is("name"), "has a name already") for entry in entries if "name" in entry.fields]
    if faults:
        raise PromptError(faults)
    return [
        replace(entry, fields={**entry.fields, "name": named.fields["prompt"]})
        for entry, named in zip(entries, names, strict=True)
    ]


def only_those(requests: Sequence[VideoRequest], selectors: Sequence[str]) -> list[VideoRequest]:
    """The requests for which all selectors hold, in their order.

    Args:
        selectors: as `tag=animal` (one of the request's tags), `seed=3` or `prompt=a cat`; the value is taken whole.

    Raises:
        ValueError: for a selector that is no `field=value`, names no field, or gives a number field no number.
    """
    tests = [_selector(selector) for selector in selectors]
    return [request for request in requests if all(test(request) for test in tests)]


def shuffled(requests: Sequence[VideoRequest], seed: int) -> list[VideoRequest]:
    """In a random order, which is the same for the same seed and number of requests, in every version of Python."""
    draw = random.Random(seed).random  # Python keeps its numbers the same, but not what `shuffle` does with them
    return [request for _, _, request in sorted((draw(), i, request) for i, request in enumerate(requests))]


def _selector(selector: str) -> Callable[[VideoRequest], bool]:
    name, equals, value = selector.partition("=")
    name = name.strip()
    if not equals:
        raise ValueError(f"{selector!r} must be field=value, as in tag=animal; fields: {', '.join(SELECTORS)}")
    if name not in SELECTORS:
        raise ValueError(f"{selector!r}: nothing is called {name!r}; {did_you_mean(name, SELECTORS)}")
    if name == "tag":
        return lambda request: value in request.tags
    kind = int if name in WHOLE_COLUMNS else float if name in REAL_COLUMNS else str
    try:
        wanted = kind(value)
    except ValueError:
        a_number = "a whole number" if kind is int else "a number"
        raise ValueError(f"{selector!r}: {name} is {a_number}, and {value!r} is none") from None
    return lambda request: bool(getattr(request, name) == wanted)


def _check(fields: Mapping[str, Any], copies: Any, limits: ModelLimits | None) -> tuple[VideoRequest, list[Problem]]:
    """The request, and all that is wrong with it; if anything is, the request is of what is right."""
    problems = unknown_fields(fields, COLUMNS)
    good = {name: value for name, value in fields.items() if name in COLUMNS}
    try:
        request = VideoRequest(**good)
    except RequestError as error:
        problems += error.problems
        bad = {problem.field for problem in error.problems}
        bad |= set(good) if None in bad else set()  # nested so deeply that no field is named
        request = VideoRequest(**{"prompt": "-", **{name: value for name, value in good.items() if name not in bad}})
    if limits is not None:
        try:
            request = request.for_model(limits)
        except RequestError as error:
            problems += error.problems
    if type(copies) is not int or not 1 <= copies <= MAX_COPIES:
        given = shown(copies) if isinstance(copies, int | float | str) else type(copies).__name__
        problems.append(Problem("copies", f"copies={given} must be a whole number from 1 to {MAX_COPIES}"))
    return request, problems
