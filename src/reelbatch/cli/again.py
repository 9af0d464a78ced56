"""`reelbatch generate --again`: a video from its sidecar, compared with the one that is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reelbatch.cli.common import SOME_FAILED, check_writable, console, say, warnings_as_lines
from reelbatch.cli.options import EngineOptions, RequestOptions
from reelbatch.cli.run import open_engine

if TYPE_CHECKING:
    from reelbatch.jobs.again import Comparison, Recorded
    from reelbatch.video import Video

SAID_BY_THE_SIDECAR = ("prompts", "prompt_file", "naming", "format", *(field.name for field in fields(RequestOptions)))


def make_again(
    context: typer.Context, path: Path, options: EngineOptions, out: Path, *, overwrite: bool, as_json: bool
) -> int:
    """Makes a video again, says whether its frames are those recorded and why they may not be; returns the exit code.

    Raises:
        ValueError, OSError: before anything is loaded, for what cannot be made again, saying why.
    """
    from reelbatch.jobs.again import check_model, compare, read_recorded
    from reelbatch.loading.hub import resolve
    from reelbatch.loading.inspection import inspect

    given = {name for name in context.params if _is_given(context, name)}
    if needless := [f"--{name.replace('_', '-')}" for name in SAID_BY_THE_SIDECAR if name in given]:
        raise ValueError(f"--again takes all of the video from its sidecar: leave out {', '.join(needless)}")
    recorded = read_recorded(path)
    if recorded.source == path:
        say(f"no sidecar {path.with_suffix('.json').name}: it goes by the record in the video itself")
    options = _as_recorded(options, recorded, given)
    config = options.config(max_batch_size=1)
    _check_device(options, path, "device" in given)
    info = inspect(resolve(options.model))
    check_model(recorded, info, config.loras)
    target = out / path.name if "out" in given else None
    if target is not None:
        check_writable(out)
        if os.path.lexists(target) and not overwrite:
            raise FileExistsError(f"{target} exists; give another --out, or --overwrite to replace it")
    with warnings_as_lines(), _threads(recorded.record.get("threads")):
        video = _make(recorded, config)
    comparison = compare(recorded, video)
    if target is not None:
        video.save(target, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(_record(recorded, video, comparison, target), default=str))
    for line in _lines(recorded, video, comparison):
        say(line)
    if target is not None:
        say(f"made again in {target}")
    whole = comparison.file is None or comparison.file.is_of_these_frames
    return 0 if comparison.equal and whole else SOME_FAILED


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _as_recorded(options: EngineOptions, recorded: Recorded, given: set[str]) -> EngineOptions:
    """Options that were not given are those of the record. A record names no model to be fetched."""
    from reelbatch.jobs.again import model_of, settings_of

    if "model" not in given and model_of(recorded) != options.model:
        name = model_of(recorded) or "unknown"
        raise ValueError(f"{recorded.path} was made by the model {name}: say where that is with --model")
    return replace(options, **{name: value for name, value in settings_of(recorded).items() if name not in given})


def _check_device(options: EngineOptions, path: Path, given: bool) -> None:
    from reelbatch.device import choose_device

    try:
        choose_device(options.device)
    except ValueError as error:
        if given:
            raise
        raise ValueError(
            f"{path} was made on {options.device}: {error}; --device cpu makes it here, equal to rounding"
        ) from None


def _make(recorded: Recorded, config: Any) -> Video:
    from reelbatch.engine.engine import Failure
    from reelbatch.jobs.display import display

    engine = open_engine(config)
    with display([recorded.request], console) as shown:
        engine.subscribe(shown.event)
        engine.submit(recorded.request)
        (result,) = engine.run()
    if isinstance(result, Failure):
        raise result.error
    return result


@contextmanager
def _threads(recorded: object) -> Iterator[None]:
    """PyTorch computes with as many threads as the record says: on a CPU they change the last bits."""
    import torch

    before = torch.get_num_threads()
    if type(recorded) is int and 1 <= recorded <= 1024:
        torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lines(recorded: Recorded, video: Video, comparison: Comparison) -> Iterator[str]:
    if comparison.equal:
        yield f"equal: the frames made again are those of {recorded.path}, bit for bit (sha256 {video.frames_sha256})"
    else:
        yield (
            f"different: the frames made again have sha256 {video.frames_sha256}, and those of {recorded.path} had "
            f"{recorded.frames_sha256}"
        )
        for line in comparison.differences:
            yield f"  {line}"
        if not comparison.differences:
            yield "  nothing that its record holds is different; drivers and other libraries are not recorded"
    if recorded.unrecorded:
        yield f"not checked, as its record does not hold it: {', '.join(recorded.unrecorded)}"
    file = comparison.file
    if file is None:
        yield f"{recorded.path} is not there: its record alone was compared"
    elif file.problem:
        yield f"the file itself {file.problem}"
    else:
        verdict = "those frames" if file.is_of_these_frames else "other frames"
        yield (
            f"the file itself holds {verdict}: its pictures are {file.loss:.2f} of 255 levels from them on average, "
            f"those of a file encoded now {file.new_loss:.2f}"
        )


def _record(recorded: Recorded, video: Video, comparison: Comparison, target: Path | None) -> dict[str, Any]:
    return {
        "state": "equal" if comparison.equal else "different",
        "path": str(recorded.path),
        "frames_sha256": video.frames_sha256,
        "recorded_frames_sha256": recorded.frames_sha256,
        "differences": list(comparison.differences),
        "not_recorded": recorded.unrecorded,
        "file": None if comparison.file is None else vars(comparison.file),
        "written": None if target is None else str(target),
    }
