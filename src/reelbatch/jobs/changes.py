"""What sets a job apart from the one that its folder holds, in as few lines as say it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from reelbatch.request import FIELDS, VideoRequest
from reelbatch.wording import counted, shorten

LINES = 10
"""Differences that an error shows."""
EXAMPLES = 3
COMPARED = tuple(name for name in FIELDS if name not in ("id", "tags"))
ALIKE = (("prompt", "name", "seed"), ("prompt", "seed"), ("prompt", "name"), ("prompt",))
"""Fields by which a request is taken for another one that was changed, the surest first."""


class JobChanged(ValueError):
    """The folder holds a job of other settings or requests. `differences`: what differs, a line each."""

    def __init__(self, folder: Path, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        shown = [f"  {line}" for line in differences[:LINES]]
        if len(differences) > LINES:
            shown.append(f"  … and {len(differences) - LINES} more")
        super().__init__(
            f"{folder} holds a job that differs from this one:\n" + "\n".join(shown) + "\n"
            "Use another --out folder, or --add to keep what is there of these and make the rest beside it, or "
            "--as-new to make all of these beside it."
        )


class Pair(NamedTuple):
    """A request of the job that is there, and the one that it seems to have become."""

    before: VideoRequest
    now: VideoRequest


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs, as `dtype: float32 → bfloat16`."""
    return [
        f"{name}: {_shown(before.get(name))} → {_shown(value)}{_remedy(name, before.get(name))}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def request_changes(
    before: Sequence[VideoRequest],
    now: Sequence[VideoRequest],
    gone: Sequence[VideoRequest],
    new: Sequence[VideoRequest],
) -> list[str]:
    """Lines on requests that differ: fields that were changed first, as `steps: 2 → 3`, then the videos that are left.

    Args:
        before, now: all requests of the job that is there, and of this one.
        gone, new: those of them that the other has not.
    """
    pairs = _pairs(gone, new)
    lines = []
    for name in COMPARED:
        values = [(getattr(pair.before, name), getattr(pair.now, name)) for pair in pairs]
        if changes := Counter((then, here) for then, here in values if then != here):
            lines.append(_field_change(name, changes, len(before)))
    paired = {id(request) for pair in pairs for request in pair}
    gone, new = ([one for one in some if id(one) not in paired] for some in (gone, new))
    if (gone or new) and (copies := _copies(before, now)):
        return [*lines, copies]
    return [*lines, *_videos("new", new), *_videos("no longer asked for", gone)]


def _pairs(gone: Sequence[VideoRequest], new: Sequence[VideoRequest]) -> list[Pair]:
    pairs: list[Pair] = []
    for fields in ALIKE:
        key = attrgetter(*fields)
        alike: dict[Any, deque[VideoRequest]] = defaultdict(deque)
        for request in gone:
            alike[key(request)].append(request)
        rest = []
        for request in new:
            if before := alike[key(request)]:
                pairs.append(Pair(before.popleft(), request))
            else:
                rest.append(request)
        gone, new = [request for some in alike.values() for request in some], rest
    return pairs


def _field_change(name: str, changes: Counter[tuple[Any, Any]], total: int) -> str:
    shown = ", ".join(f"{_shown(a)} → {_shown(b)}" for a, b in list(changes)[:EXAMPLES])
    more = ", …" if len(changes) > EXAMPLES else ""
    count = changes.total()
    return f"{name}: {shown}{more}" + (f" ({count} of {total} videos)" if count < total else "")


def _copies(before: Sequence[VideoRequest], now: Sequence[VideoRequest]) -> str | None:
    """A line where the same prompts have another number of videos each, and all of them the same."""
    then, here = (Counter((request.prompt, request.name) for request in some) for some in (before, now))
    counts = set(then.values()), set(here.values())
    if then.keys() != here.keys() or any(len(some) != 1 for some in counts) or counts[0] == counts[1]:
        return None
    return f"copies: {counts[0].pop()} → {counts[1].pop()}"


def _videos(what: str, requests: Sequence[VideoRequest]) -> list[str]:
    if len(requests) <= EXAMPLES:
        return [f"{what}: {_described(request)}" for request in requests]
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    shown = ", ".join(repr(shorten(prompt, 60)) for prompt in prompts[:EXAMPLES])
    more = ", …" if len(prompts) > EXAMPLES else ""
    return [f"{what}: {counted(len(requests), 'video')} of {counted(len(prompts), 'prompt')}: {shown}{more}"]


def _described(request: VideoRequest) -> str:
    lengths = f"{counted(request.frames or 0, 'frame')}, {counted(request.steps or 0, 'step')}"
    size = f"{request.width}×{request.height}, {lengths}"
    return f"{shorten(request.prompt, 60)!r}, seed {request.seed}, {size}"


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else shorten(str(value), 60)


def _remedy(name: str, value: Any) -> str:
    """How to have a setting as it was, where that is no option of the command."""
    return f" (OMP_NUM_THREADS={value} makes it what it was)" if name == "threads" else ""
