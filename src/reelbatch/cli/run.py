"""What `generate` and `job run` share: from options to an engine's configuration, and from a job to videos."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reelbatch.cli.common import INTERRUPTED, SOME_FAILED, console, interruptible, quiet_libraries, say

if TYPE_CHECKING:
    from reelbatch.cli.options import EngineOptions
    from reelbatch.engine.config import EngineConfig
    from reelbatch.engine.engine import Engine
    from reelbatch.formats import Format
    from reelbatch.jobs.job import Job, Mode
    from reelbatch.jobs.manifest import Manifest
    from reelbatch.jobs.naming import Naming
    from reelbatch.jobs.outlook import Measured
    from reelbatch.jobs.worker import Outcome
    from reelbatch.loading.inspection import ModelInfo
    from reelbatch.memory.identity import Identity
    from reelbatch.request import VideoRequest

WORDS_SHOWN = 20
SHEET_ROWS = 200
"""Videos up to which a run draws a contact sheet; more are for the report."""


@dataclass(frozen=True)
class Plan:
    """What is to be made, with which model and how; nothing is loaded yet.

    Attributes:
        requests: with the model's defaults filled in.
        config: of the engine.
        advice: a line that says why the batch size is what it is; None where it was given, or is the default.
        checkpoint_every: steps after which the state of the running videos is saved; None: only at the end.
    """

    requests: list[VideoRequest]
    info: ModelInfo
    config: EngineConfig
    advice: str | None = None
    checkpoint_every: int | None = None


def plan_of(options: EngineOptions, requests: list[VideoRequest], info: ModelInfo) -> Plan:
    """Batch size and offload are as given, else as `tune` measured them for these shapes, else the default.

    Raises:
        ValueError: for an option that cannot be, saying what can.
    """
    from reelbatch.tune import profiles

    config, line = options.config(), None
    if options.batch_size is None:
        identities = _identities(config, info, requests)
        advice = profiles.advice(identities, config.isolation, config.max_batch_size, options.offload)
        if len(requests) > 1 or advice.offload != config.offload:  # else there is no batch to speak of
            config = options.config(max_batch_size=advice.batch_size, offload=advice.offload)
            line = advice.line
    return Plan(requests, info, config, line, options.checkpoint_every)


def measured(plan: Plan) -> Measured | None:
    """What `tune` measured for these shapes, if it did."""
    from reelbatch.jobs.outlook import Measured
    from reelbatch.tune import profiles

    stored = (profiles.find(wanted).profile for wanted in _identities(plan.config, plan.info, plan.requests))
    profile = next(filter(None, stored), None)
    return None if profile is None else Measured(profile.videos_per_hour, profile.measured)


def _identities(config: EngineConfig, info: ModelInfo, requests: Sequence[VideoRequest]) -> list[Identity]:
    """What a profile must be of: all of these requests, or each of their shapes."""
    from reelbatch.loading.identity import identity
    from reelbatch.tune.workload import shape_class, shape_of

    about = identity(info.folder, info.name, "", device=config.device, dtype=config.dtype, attention=config.attention)
    kinds = [shape_class(requests), *sorted({shape_of(request) for request in requests})]
    return [about.model_copy(update={"shapes": kind}) for kind in kinds]


def open_engine(config: EngineConfig) -> Engine:
    """The engine of a run; its libraries' own progress bars are silenced, ours are shown instead."""
    from reelbatch.engine.engine import Engine

    quiet_libraries()
    return Engine.open(config)


def make(
    plan: Plan,
    manifest: Manifest,
    out: Path,
    *,
    mode: Mode,
    naming: Naming = "default",
    format: Format = "mp4",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """Makes what is missing, says how each request ended, draws report and contact sheet; returns the exit code.

    Raises:
        JobChanged: if another job is in the folder, before anything is loaded.
    """
    from reelbatch.jobs.display import display
    from reelbatch.jobs.job import open_job, settings_of
    from reelbatch.jobs.report import write_report
    from reelbatch.jobs.worker import Worker

    settings = settings_of(plan.config, plan.info, naming, format)
    notes = {"command": sys.argv[1:]}
    job = open_job(manifest, out, plan.requests, settings, mode=mode, overwrite=overwrite, notes=notes)
    for line in _earlier(job):
        say(line)
    failed = 0
    interrupted: list[int] = []
    if job.open:
        if plan.advice:
            say(plan.advice)
        engine = open_engine(plan.config)
        if engine.calibration is not None:
            say(f"--max-memory: estimates of steps and decodes are {engine.calibration.line}")
        with interruptible() as interrupted, display([row.to_request() for row in job.open], console) as shown:
            engine.subscribe(shown.event)
            worker = Worker(
                engine,
                manifest,
                job.number,
                out,
                weights=settings.weights,
                overwrite=overwrite,
                sidecars=naming != "vbench",
                checkpoint_every=plan.checkpoint_every,
                stopping=lambda: bool(interrupted),
            )
            for outcome in worker.outcomes():
                shown.outcome(outcome)
                failed += outcome.error is not None
                if as_json:
                    typer.echo(json.dumps(_outcome_record(outcome), default=str))
    if as_json:
        for row in job.kept:
            typer.echo(json.dumps(_kept_record(out / row.file), default=str))
    report = _drawn("report", lambda: write_report(out, manifest.jobs(), manifest.rows()))
    if interrupted:
        say(f"stopped; the same command goes on where it stopped{report}")
        return INTERRUPTED
    say(_summary(job, out) + report + _sheet(job, out))
    return SOME_FAILED if failed or any(row.state == "failed" for row in manifest.rows(job.number)) else 0


def _earlier(job: Job) -> Iterator[str]:
    """Lines on what earlier runs left."""
    count = len(job.rows)
    if job.remade:
        yield f"{job.remade} videos are made again: their files are gone or have changed"
    if job.kept:
        yield f"{len(job.kept)} of {count} videos are there already and are kept"
    failed = sum(row.state == "failed" for row in job.rows)
    if failed:
        yield f"{failed} failed earlier and are not tried again: `reelbatch job retry --failed` puts them back in line"
    saved = sum(row.step > 0 for row in job.open)
    if saved:
        yield f"{saved} videos go on from a saved step"


def _drawn(what: str, draw: Callable[[], Path]) -> str:
    """Draws something for people to look at; returns the end of a line that names it. The videos are made by now: a
    full disk is no reason for a run to fail."""
    from reelbatch.jobs.manifest import ManifestError

    try:
        return f"; {what}: {draw()}"
    except ManifestError:
        raise
    except OSError as error:
        return f"; no {what}, since it could not be written: {error.strerror or error}"


def _there(job: Job, out: Path) -> list[Path]:
    return [out / row.file for row in job.rows if (out / row.file).exists()]


def _summary(job: Job, out: Path) -> str:
    return f"{len(_there(job, out))} of {len(job.rows)} videos in {out}"


def _sheet(job: Job, out: Path) -> str:
    """Draws the contact sheet; returns the end of a line that names it."""
    from reelbatch.video import contact_sheet, sheet_path

    there = _there(job, out)
    if not 0 < len(there) <= SHEET_ROWS:
        return ""
    return _drawn("contact sheet", lambda: contact_sheet(there, sheet_path(there, out)))


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    if outcome.error is None:
        return {"state": "done", "path": str(outcome.path), **(outcome.record or {})}
    error = {"type": type(outcome.error).__name__, "message": str(outcome.error)}
    state = "cancelled" if outcome.cancelled else "failed"
    return {"state": state, "error": error, "request": outcome.request.model_dump(mode="json")}


def _kept_record(path: Path) -> dict[str, Any]:
    from reelbatch.video import read_record

    return {"state": "kept", "path": str(path), **(read_record(path) or {})}


# -- warnings --------------------------------------------------------------------------------------


def warn(requests: Sequence[VideoRequest], info: ModelInfo) -> None:
    """Says what will not be as a person may think."""
    for line in (*_unknown_words(requests, info), *_idle_guidance(requests)):
        say(f"warning: {line}", style="yellow")


def _unknown_words(requests: Sequence[VideoRequest], info: ModelInfo) -> Iterator[str]:
    known = set(info.profile.vocabulary)
    words = (word for request in requests for word in re.findall(r"\w+", request.prompt.lower()))
    unknown = list(dict.fromkeys(word for word in words if word not in known))
    if known and unknown:
        yield (
            f"this little model does not know: {', '.join(unknown[:WORDS_SHOWN])}. It is {info.profile.about}. "
            "Name a real model with --model (a HunyuanVideo folder in the Diffusers layout, or a hub id)."
        )


def _idle_guidance(requests: Sequence[VideoRequest]) -> Iterator[str]:
    """Classifier-free guidance needs both a scale and a negative prompt; one alone changes nothing."""
    if any(request.true_cfg > 1 and request.negative_prompt is None for request in requests):
        yield 'true_cfg does nothing without a negative prompt ("" will do)'
    if any(request.true_cfg == 1 and request.negative_prompt is not None for request in requests):
        yield "a negative prompt does nothing while true_cfg is 1"
