"""What `generate` and `job run` share: from options to requests, and from a job to videos, told as it goes on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reelbatch.cli.common import INTERRUPTED, SOME_FAILED, console, interruptible, quiet_libraries, say

if TYPE_CHECKING:
    from reelbatch.engine.engine import Engine
    from reelbatch.jobs.job import Job, Mode
    from reelbatch.jobs.manifest import Manifest
    from reelbatch.jobs.naming import Naming
    from reelbatch.jobs.worker import Outcome
    from reelbatch.loading.inspection import ModelInfo
    from reelbatch.request import VideoRequest
    from reelbatch.tune.profiles import Advice, Identity, Profile

WORDS_SHOWN = 20
DEFAULT_BATCH_SIZE = 8
SHEET_ROWS = 200
"""Videos up to which a run draws a contact sheet; more are for the report."""
REQUEST_FIELDS = (
    *("copies", "prompt_2", "negative_prompt", "height", "width", "frames", "steps", "guidance", "true_cfg"),
    *("flow_shift", "fps", "attention_rule"),
)


def request_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say of every request, as the fields of `VideoRequest`."""
    fields = {name: options[name] for name in REQUEST_FIELDS} | {"tags": options["tag"] or None}
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """What is to be made, with which model and how; nothing is loaded yet."""

    requests: list[VideoRequest]
    info: ModelInfo
    options: Mapping[str, Any]

    @property
    def batch_size(self) -> int:
        """As given, else as `tune` found it for these shapes, with a line that says so, else the default."""
        return self._advice.batch_size

    @cached_property
    def _advice(self) -> Advice:
        """Batch size and offload."""
        from reelbatch.tune import profiles

        given, offload = self.options["batch_size"], self.options.get("offload")
        if given is not None:
            return profiles.Advice(int(given), None, offload or "none")
        found = profiles.advice(self._identities(), self.options["isolation"], DEFAULT_BATCH_SIZE, offload)
        if len(self.requests) == 1 and found.offload == (offload or "none"):
            return profiles.Advice(DEFAULT_BATCH_SIZE, None, found.offload)  # no batch to speak of
        if found.line:
            say(found.line)
        return found

    def profile(self) -> Profile | None:
        """What `tune` found for these shapes."""
        from reelbatch.tune import profiles

        found = (profiles.find(wanted).profile for wanted in self._identities())
        return next(filter(None, found), None)

    def _identities(self) -> list[Identity]:
        """Of a run of all these requests, and of each of their shapes."""
        from reelbatch.tune import profiles
        from reelbatch.tune.workload import shape_class, shape_of

        o = self.options
        about = profiles.identity(
            self.info.folder, self.info.name, "", device=o["device"], dtype=o["dtype"], attention=o["attention"]
        )
        kinds = [shape_class(self.requests), *sorted({shape_of(request) for request in self.requests})]
        return [about.model_copy(update={"shapes": kind}) for kind in kinds]

    def open_engine(self) -> Engine:
        from reelbatch.device import parse_bytes

        o = self.options
        engine = open_engine(
            o["model"],
            device=o["device"],
            dtype=o["dtype"],
            isolation=o["isolation"],
            max_batch_size=self.batch_size,
            max_batch_tokens=o["batch_tokens"],
            attention=o["attention"],
            max_memory=None if o["max_memory"] is None else parse_bytes(o["max_memory"]),
            offload=self._advice.offload,
            lora=self.loras,
        )
        if engine.calibration is not None:
            say(f"--max-memory: estimates of steps and decodes are {engine.calibration.line}")
        return engine

    @property
    def loras(self) -> list[tuple[Path, float]]:
        """LoRA files and their scales."""
        from reelbatch.loading.lora import parse_lora

        return [parse_lora(text) for text in self.options.get("lora") or []]


def open_engine(model: str, **options: Any) -> Engine:
    """The engine of a run; its libraries' own progress bars are silenced, ours are shown instead."""
    from reelbatch.engine.engine import Engine

    quiet_libraries()
    return Engine.from_pretrained(model, **options)


def check_requests(requests: Sequence[VideoRequest], info: ModelInfo) -> None:
    """Tells what will not be as its owner may think."""
    _warn_of_unknown_words(requests, info)
    _warn_of_idle_guidance(requests)


def make(
    plan: Plan,
    manifest: Manifest,
    out: Path,
    *,
    mode: Mode,
    naming: Naming = "default",
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    as_json: bool = False,
) -> int:
    """Makes what is missing, says how each request ended, draws report and contact sheet; returns the exit code.

    Raises:
        JobChanged: if another job is in the folder, before anything is loaded.
    """
    from reelbatch.jobs.display import display
    from reelbatch.jobs.job import open_job
    from reelbatch.jobs.report import write_report
    from reelbatch.jobs.worker import Run

    settings = job_settings(plan, naming)
    notes = {"command": sys.argv[1:]}
    job = open_job(manifest, out, plan.requests, settings, mode=mode, overwrite=overwrite, notes=notes)
    _tell_of_earlier(job)
    failed = 0
    interrupted: list[int] = []
    if job.open:
        engine = plan.open_engine()
        with interruptible() as interrupted, display([row.to_request() for row in job.open], console) as shown:
            engine.on_progress = shown.progress
            run = Run(
                engine,
                manifest,
                job.number,
                out,
                weights=settings.weights,
                overwrite=overwrite,
                sidecars=naming != "vbench",
                checkpoint_every=checkpoint_every,
                stopping=lambda: bool(interrupted),
            )
            for outcome in run.outcomes():
                shown.outcome(outcome)
                failed += outcome.error is not None
                if as_json:
                    typer.echo(json.dumps(_outcome_record(outcome), default=str))
    if as_json:
        for row in job.kept:
            typer.echo(json.dumps(_kept_record(out / row.file), default=str))
    report = write_report(out, manifest.jobs(), manifest.rows())
    if interrupted:
        say(f"stopped; the same command goes on where it stopped; report: {report}")
        return INTERRUPTED
    _tell_what_is_there(job, out, report)
    return SOME_FAILED if failed or any(row.state == "failed" for row in manifest.rows(job.number)) else 0


def job_settings(plan: Plan, naming: Naming) -> Any:
    from reelbatch.device import choose_device
    from reelbatch.jobs.job import Settings
    from reelbatch.loading.hashing import weights_hash
    from reelbatch.loading.lora import lora_label
    from reelbatch.loading.precision import Precision

    device = choose_device(plan.options["device"])
    return Settings(
        model=plan.info.name,
        weights=weights_hash(plan.info.folder),
        device=device.type,
        dtype=str(Precision.parse(plan.options["dtype"], device)),
        attention=plan.options["attention"],
        isolation=plan.options["isolation"],
        naming=naming,
        lora=tuple(lora_label(path, scale) for path, scale in plan.loras),
    )


def _tell_of_earlier(job: Job) -> None:
    count = len(job.rows)
    if job.remade:
        say(f"{job.remade} videos are made again: their files are gone or have changed")
    if job.kept:
        say(f"{len(job.kept)} of {count} videos are there already and are kept")
    failed = sum(row.state == "failed" for row in job.rows)
    if failed:
        say(f"{failed} failed earlier and are not tried again: `reelbatch job retry --failed` puts them back in line")
    saved = sum(row.step > 0 for row in job.open)
    if saved:
        say(f"{saved} videos go on from a saved step")


def _tell_what_is_there(job: Job, out: Path, report: Path) -> None:
    from reelbatch.video import contact_sheet, sheet_path

    there = [out / row.file for row in job.rows if (out / row.file).exists()]
    told = f"{len(there)} of {len(job.rows)} videos in {out}; report: {report}"
    if 0 < len(there) <= SHEET_ROWS:
        told += f"; contact sheet: {contact_sheet(there, sheet_path(there, out))}"
    say(told)


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    if outcome.error is None:
        return {"state": "done", "path": str(outcome.path), **(outcome.record or {})}
    error = {"type": type(outcome.error).__name__, "message": str(outcome.error)}
    state = "cancelled" if outcome.cancelled else "failed"
    return {"state": state, "error": error, "request": outcome.request.model_dump(mode="json")}


def _kept_record(path: Path) -> dict[str, Any]:
    from reelbatch.video import read_record

    return {"state": "kept", "path": str(path), **(read_record(path) or {})}


def _warn_of_unknown_words(requests: Sequence[VideoRequest], info: ModelInfo) -> None:
    known = set(info.profile.vocabulary)
    if not known:
        return
    asked = (word for request in requests for word in re.findall(r"\w+", request.prompt.lower()))
    unknown = list(dict.fromkeys(word for word in asked if word not in known))
    if unknown:
        words = ", ".join(unknown[:WORDS_SHOWN])
        say(
            f"warning: this little model does not know: {words}. It is {info.profile.about}. "
            "Name a real model with --model (a HunyuanVideo folder in the Diffusers layout, or a hub id).",
            style="yellow",
        )


def _warn_of_idle_guidance(requests: Sequence[VideoRequest]) -> None:
    """Classifier-free guidance needs both a scale and a negative prompt; one alone changes nothing."""
    if any(request.true_cfg > 1 and request.negative_prompt is None for request in requests):
        say('warning: true_cfg does nothing without a negative prompt ("" will do)', style="yellow")
    if any(request.true_cfg == 1 and request.negative_prompt is not None for request in requests):
        say("warning: a negative prompt does nothing while true_cfg is 1", style="yellow")
