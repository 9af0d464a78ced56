"""What `generate` and `job run` share: from options to an engine's configuration, and from a job to videos."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import typer

from reelbatch.cli.common import (
    INTERRUPTED,
    SOME_FAILED,
    check_writable,
    console,
    interruptible,
    quiet_libraries,
    say,
)
from reelbatch.wording import shorten

if TYPE_CHECKING:
    from reelbatch.cli.options import EngineOptions
    from reelbatch.engine.config import EngineConfig
    from reelbatch.engine.engine import Engine
    from reelbatch.formats import Format
    from reelbatch.jobs.job import Job, Mode, Settings
    from reelbatch.jobs.manifest import Manifest, VideoRow
    from reelbatch.jobs.naming import Naming
    from reelbatch.jobs.outlook import Measured, Outlook
    from reelbatch.jobs.worker import Outcome
    from reelbatch.loading.inspection import ModelInfo
    from reelbatch.memory.identity import Identity
    from reelbatch.request import VideoRequest

WORDS_SHOWN, WORD_LETTERS = 5, 20
SHEET_ROWS = 200
"""Videos in a folder up to which a run draws a contact sheet; more are for the report."""


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

    about = identity(
        info.folder,
        info.name,
        "",
        device=config.device,
        dtype=config.dtype,
        attention=config.attention,
        loras=config.loras,
    )
    kinds = [shape_class(requests), *sorted({shape_of(request) for request in requests})]
    return [about.model_copy(update={"shapes": kind}) for kind in kinds]


def open_engine(config: EngineConfig) -> Engine:
    """The engine of a run; its libraries' own progress bars are silenced, ours are shown instead."""
    from reelbatch.engine.engine import Engine

    quiet_libraries()
    return Engine.open(config)


@dataclass(frozen=True)
class JobSpec:
    """What is to be made where.

    Attributes:
        url: of the manifest, if it is not in the folder.
        random_seed: the first seed, where it was drawn; kept with the job, so that a later run has the same.
    """

    plan: Plan
    out: Path
    url: str | None = None
    mode: Mode = "add"
    naming: Naming = "default"
    format: Format = "mp4"
    overwrite: bool = False
    random_seed: int | None = None

    @cached_property
    def settings(self) -> Settings:
        from reelbatch.jobs.job import settings_of

        return settings_of(self.plan.config, self.plan.info, self.naming, self.format)


def foresee(spec: JobSpec) -> Job:
    """The job as it will be opened. Refuses all that can be refused without a model; writes nothing.

    Raises:
        JobChanged: if another job is in the folder.
        OSError: if the folder cannot be written to, or the manifest cannot be used.
        ValueError: for what the engine cannot be opened with.
    """
    from reelbatch.jobs.job import forecast
    from reelbatch.jobs.manifest import Manifest
    from reelbatch.loading.load import check

    check_writable(spec.out)
    plan, there = spec.plan, Manifest.existing(spec.out, spec.url)
    how: dict[str, Any] = {"mode": spec.mode, "overwrite": spec.overwrite}
    job = forecast(there, spec.out, plan.requests, spec.settings, **how)
    if job.open:
        config = plan.config
        quiet_libraries()
        check(plan.info.folder, config.device, config.dtype, config.offload, config.loras)
    return job


def outlook(spec: JobSpec) -> Outlook:
    """What a run will say and take, refusals included; nothing is loaded but what is checked."""
    from reelbatch.jobs.manifest import Manifest
    from reelbatch.jobs.outlook import look_ahead

    job = foresee(spec)
    for line in earlier(job):
        say(line)
    if job.open and spec.plan.advice:
        say(spec.plan.advice)
    there = Manifest.existing(spec.out, spec.url)
    rows = there.rows() if there else []
    free = disk_usage(next(folder for folder in (spec.out, *spec.out.resolve().parents) if folder.exists())).free
    return look_ahead(job, rows, spec.plan.config.max_batch_size, measured(spec.plan), free, spec.format)


def ready(spec: JobSpec) -> Engine | None:
    """The engine that makes what is missing; None where nothing is. Writes nothing.

    Raises:
        Exception: as `foresee`, and whatever keeps the model from being loaded.
    """
    if not foresee(spec).open:
        return None
    if spec.plan.advice:
        say(spec.plan.advice)
    say(f"loading {spec.plan.info.name}")
    return open_engine(spec.plan.config)


def make(spec: JobSpec, engine: Engine | None, *, as_json: bool = False) -> int:
    """Makes what is missing, says how each request ended, draws report and contact sheet; returns the exit code.

    Args:
        engine: as `ready` gave it. This is the first that writes anything.
    """
    notes: dict[str, Any] = {"command": sys.argv[1:]}
    if spec.random_seed is not None:
        notes["random_seed"] = spec.random_seed
    failed = 0
    with interruptible() as interrupted:
        from reelbatch.jobs.job import open_job
        from reelbatch.jobs.manifest import Manifest
        from reelbatch.jobs.report import write_report

        out = spec.out
        out.mkdir(parents=True, exist_ok=True)
        manifest = Manifest.in_folder(out, spec.url)
        job = open_job(
            manifest,
            out,
            spec.plan.requests,
            spec.settings,
            mode=spec.mode,
            overwrite=spec.overwrite,
            notes=notes,
        )
        for line in earlier(job):
            say(line)
        if job.open:
            engine = engine or open_engine(spec.plan.config)  # None where a file went away meanwhile
            for outcome in _outcomes(spec, engine, manifest, job, lambda: bool(interrupted)):
                failed += outcome.error is not None
                if as_json:
                    typer.echo(json.dumps(_outcome_record(outcome), default=str))
    if as_json:
        for row in job.kept:
            typer.echo(json.dumps(_kept_record(out / row.file), default=str))
    rows = manifest.rows()
    report = drawn("report", lambda: write_report(out, manifest.jobs(), rows))
    if interrupted:
        say(f"stopped; the same command goes on where it stopped{report}")
        return INTERRUPTED
    say(_summary(job, out) + report + draw_sheet(out, rows))
    return SOME_FAILED if failed or any(row.state == "failed" for row in manifest.rows(job.number)) else 0


def _outcomes(
    spec: JobSpec, engine: Engine, manifest: Manifest, job: Job, stopping: Callable[[], bool]
) -> Iterator[Outcome]:
    """How each request ended, shown as it ends."""
    from reelbatch.jobs.display import display
    from reelbatch.jobs.worker import Worker

    if engine.calibration is not None:
        say(f"--max-memory: estimates of steps and decodes are {engine.calibration.line}")
    worker = Worker(
        engine,
        manifest,
        job.number,
        spec.out,
        weights=spec.settings.weights,
        overwrite=spec.overwrite,
        sidecars=spec.naming != "vbench",
        checkpoint_every=spec.plan.checkpoint_every,
        stopping=stopping,
    )
    with display([row.to_request() for row in job.open], console) as shown:
        engine.subscribe(shown.event)
        for outcome in worker.outcomes():
            shown.outcome(outcome)
            yield outcome


def earlier(job: Job) -> Iterator[str]:
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


def drawn(what: str, draw: Callable[[], Path]) -> str:
    """Draws something for people to look at; returns the end of a line that names it. The videos are made by now: a
    full disk is no reason for a run to fail."""
    from reelbatch.jobs.manifest import ManifestError

    try:
        return f"; {what}: {draw()}"
    except ManifestError:
        raise
    except OSError as error:
        return f"; no {what}, since it could not be written: {error.strerror or error}"


def _summary(job: Job, out: Path) -> str:
    there = sum((out / row.file).exists() for row in job.rows)
    return f"{there} of {len(job.rows)} videos in {out}"


def draw_sheet(out: Path, rows: Sequence[VideoRow]) -> str:
    """Draws the folder's contact sheet, of all its videos in the manifest's order, and says where it is; nothing for
    none, and for too many."""
    from reelbatch.video import contact_sheet, sheet_path

    there = [path for row in rows if row.state == "done" and (path := out / row.file).exists()]
    if not 0 < len(there) <= SHEET_ROWS:
        return ""
    return drawn("contact sheet", lambda: contact_sheet(there, sheet_path(there, out)))


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


def warn(requests: Sequence[VideoRequest], info: ModelInfo, model: str) -> None:
    """Says what will not be as a person may think. `model` is what --model says."""
    for line in (*_unknown_words(requests, info, model), *_idle_guidance(requests)):
        say(f"warning: {line}", style="yellow")


def _unknown_words(requests: Sequence[VideoRequest], info: ModelInfo, model: str) -> Iterator[str]:
    known = set(info.profile.vocabulary)
    words = (word for request in requests for word in re.findall(r"\w+", request.prompt.lower()))
    unknown = list(dict.fromkeys(word for word in words if word not in known))
    if known and unknown:
        shown = ", ".join(shorten(word, WORD_LETTERS) for word in unknown[:WORDS_SHOWN])
        more = f" and {len(unknown) - WORDS_SHOWN} more words" if len(unknown) > WORDS_SHOWN else ""
        yield (
            f"this little model does not know {shown}{more}: `reelbatch model-info {shlex.quote(model)}` says what it "
            "draws, and --model takes another"
        )


def _idle_guidance(requests: Sequence[VideoRequest]) -> Iterator[str]:
    """Classifier-free guidance needs both a scale and a negative prompt; one alone changes nothing."""
    if any(request.true_cfg > 1 and request.negative_prompt is None for request in requests):
        yield 'true_cfg does nothing without a negative prompt ("" will do)'
    if any(request.true_cfg == 1 and request.negative_prompt is not None for request in requests):
        yield "a negative prompt does nothing while true_cfg is 1"
