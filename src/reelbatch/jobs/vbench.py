"""What VBench's scorer wants besides file names: how many videos of each prompt, and in which formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reelbatch.formats import Format
from reelbatch.jobs.entries import Entry

FLICKERING = "temporal_flickering"
DIMENSIONS = frozenset(
    f"{FLICKERING} subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality "
    "imaging_quality object_class multiple_objects human_action color spatial_relationship scene temporal_style "
    "appearance_style overall_consistency".split()
)
COPIES, FLICKERING_COPIES = 5, 25
"""Videos of a prompt, and of one of the dimension that is scored on still videos alone: a filter drops the others."""
READABLE: tuple[Format, ...] = ("mp4", "gif")


def check_readable(format: Format) -> None:
    """Raises ValueError for a format that the scorer does not read as a video."""
    if format not in READABLE:
        raise ValueError(f"--format {format} with --naming vbench: VBench's scorer reads {' and '.join(READABLE)} only")


def with_copies(entries: Sequence[Entry], given: int | None) -> tuple[list[Entry], str | None]:
    """The entries with the copies that the scorer wants, and a line that says so.

    Args:
        given: copies that the person asked for: nothing is changed, and the line says where they are too few. An
            entry's own `copies` stand as well.
    """
    flickering = [entry for entry in entries if FLICKERING in _dimensions(entry) and "copies" not in entry.fields]
    if given is not None:
        if not flickering or given >= FLICKERING_COPIES:
            return list(entries), None
        return list(entries), (
            f"VBench's scorer wants {FLICKERING_COPIES} videos of each of the {len(flickering)} prompts of "
            f"{FLICKERING}, and --copies asks for {given}; without --copies they get {FLICKERING_COPIES}, the others "
            f"{COPIES}"
        )
    if not any(map(_dimensions, entries)):
        return list(entries), (
            "these prompts do not say their VBench dimensions, as VBench_full_info.json does, so one video of each is "
            f"made; the scorer wants {COPIES} ({FLICKERING_COPIES} for {FLICKERING}): give --copies"
        )
    copied, count, rest = [], 0, 0
    for entry in entries:
        if "copies" not in entry.fields and not entry.faults:
            wanted = FLICKERING_COPIES if FLICKERING in _dimensions(entry) else COPIES
            entry = replace(entry, fields={**entry.fields, "copies": wanted})
            count, rest = count + (wanted != COPIES), rest + (wanted == COPIES)
        copied.append(entry)
    return copied, (
        f"VBench: {FLICKERING_COPIES} videos of each of {count} prompts of {FLICKERING}, {COPIES} of each of {rest} "
        "others"
    )


def _dimensions(entry: Entry) -> frozenset[str]:
    tags = entry.fields.get("tags")
    return DIMENSIONS & set(map(str, tags)) if isinstance(tags, list | tuple) else frozenset()
