"""The seed of a run's first video: as it was given, or drawn once and kept with the job."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from reelbatch.cli.common import say

if TYPE_CHECKING:
    from reelbatch.jobs.job import Mode

RANDOM = "random"


class Seed(NamedTuple):
    value: int
    drawn: bool


def choose_seed(given: str, out: Path, url: str | None = None, mode: Mode = "add") -> Seed:
    """The seed that `--seed` means: a number, or for "random" the one that the job to go on with has drawn, else a
    new one.

    Raises:
        ValueError: for anything else.
    """
    if given.strip().lower() != RANDOM:
        try:
            return Seed(int(given), drawn=False)
        except ValueError:
            raise ValueError(f"--seed {given!r}: give a whole number, or {RANDOM}") from None
    kept = stored_seed(out, url, mode)
    value = secrets.randbits(32) if kept is None else kept
    why = "drawn at random" if kept is None else "drawn when this job began"
    say(f"seed {value}, {why} (--seed {value} makes the same videos)")
    return Seed(value, drawn=True)


def stored_seed(out: Path, url: str | None, mode: Mode) -> int | None:
    """The seed that was drawn for the job that a run goes on with; None if it begins another.

    A run that resumes goes on with the latest job that has one, and one that adds with a job of the same command that
    is not finished.
    """
    from reelbatch.jobs.manifest import OPEN, Manifest

    manifest = None if mode == "new" else Manifest.existing(out, url)
    for job in reversed(manifest.jobs() if manifest else []):
        seed = job.settings.get("random_seed")
        if not isinstance(seed, int):
            continue
        if mode == "resume":
            return seed
        if job.settings.get("command") == sys.argv[1:] and manifest and manifest.rows(job.number, *OPEN):
            return seed
    return None
