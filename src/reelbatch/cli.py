"""The command line. Thin: it reads options, calls the rooms, and speaks to people."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

import reelbatch

if TYPE_CHECKING:
    from reelbatch.engine.engine import Engine
    from reelbatch.jobs.run import Outcome
    from reelbatch.models.checkpoint import ModelInfo
    from reelbatch.request import VideoRequest
    from reelbatch.video import Place

SOME_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
WORDS_SHOWN = 20

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Many HunyuanVideo videos in one run, each the video you would have got alone.",
)
console = Console(stderr=True)


def main() -> None:
    """Runs the command line; every error is a line for the person, or a traceback with REELBATCH_DEBUG=1."""
    try:
        app()
    except Exception as error:
        if os.environ.get("REELBATCH_DEBUG"):
            raise
        told = str(error).strip() or type(error).__name__
        expected = isinstance(error, ValueError | OSError)
        kind = "" if expected else f" ({type(error).__name__}; REELBATCH_DEBUG=1 shows where)"
        console.print(f"error: {told}{kind}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT if expected else SOME_FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reelbatch {reelbatch.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


REQUEST = "What each video is (a prompt file's line may say otherwise)"
ENGINE = "How it runs"
OUTPUT = "What comes out"


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A file of prompts: .txt (one a line), .jsonl or .csv (any request field per line, and `copies`).",
        ),
    ] = None,
    copies: Annotated[
        int | None, typer.Option(help="Videos of each prompt, with seeds one after another.", rich_help_panel=REQUEST)
    ] = None,
    prompt_2: Annotated[
        str | None, typer.Option("--prompt-2", help="A separate prompt for CLIP.", rich_help_panel=REQUEST)
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to keep away from; needs --true-cfg above 1.", rich_help_panel=REQUEST)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the first video of a prompt; further ones count on.", rich_help_panel=REQUEST)
    ] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=REQUEST)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=REQUEST)] = None,
    frames: Annotated[int | None, typer.Option(help="4k + 1: 1, 5, 9, …", rich_help_panel=REQUEST)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=REQUEST)] = None,
    guidance: Annotated[float | None, typer.Option(help="Embedded guidance scale.", rich_help_panel=REQUEST)] = None,
    true_cfg: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.", rich_help_panel=REQUEST)
    ] = None,
    flow_shift: Annotated[
        float | None, typer.Option(help="Timestep shift; the model's own if not given.", rich_help_panel=REQUEST)
    ] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of the file.", rich_help_panel=REQUEST)] = None,
    attention_rule: Annotated[
        str | None,
        typer.Option(
            help="Which tokens a head attends to: own-frame, sliding-tile, spatial-temporal; all if not given.",
            rich_help_panel=REQUEST,
        ),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Kept in the sidecar; may be repeated.", rich_help_panel=REQUEST)
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="demo, a folder in the Diffusers layout, or a hub id.", rich_help_panel=ENGINE),
    ] = "demo",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.", rich_help_panel=ENGINE)] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16, float16, int8 (8-bit weights), or transformer=…,vae=…,text=….",
            rich_help_panel=ENGINE,
        ),
    ] = "auto",
    isolation: Annotated[
        Literal["exact", "packed"],
        typer.Option(
            help="exact: bit for bit the video alone. packed: equal to rounding, faster for small videos.",
            rich_help_panel=ENGINE,
        ),
    ] = "exact",
    attention: Annotated[
        str, typer.Option(help="Attention kernel: auto, or a name that `doctor` shows.", rich_help_panel=ENGINE)
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that share a step.", rich_help_panel=ENGINE)] = 8,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Transformer rows that share a step, at most.", rich_help_panel=ENGINE)
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Memory that the run may hold, as 20GiB; videos wait for it.", rich_help_panel=ENGINE),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the videos.", rich_help_panel=OUTPUT)] = Path("out"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make again, and replace, what is there.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a video, and nothing else.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make videos of prompts.

    Examples:

    - `reelbatch generate "a large red circle moving left on a black background"`

    - `reelbatch generate "a small blue cross" --copies 5 --width 96 --out crosses`

    - `reelbatch generate --prompts suite.csv --model /models/HunyuanVideo --device cuda --batch-size 4`

    Every video is an mp4 with a sidecar JSON beside it; the run draws one contact sheet. Videos that are there already,
    of the same request and model, are kept: the same command again makes what is missing.
    """
    from reelbatch.engine.memory import parse_bytes
    from reelbatch.jobs.prompts import make_requests
    from reelbatch.models.checkpoint import inspect, resolve

    entries = _entries(prompts or [], prompt_file)
    defaults = {
        "copies": copies,
        "prompt_2": prompt_2,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "flow_shift": flow_shift,
        "fps": fps,
        "attention_rule": attention_rule,
        "tags": tag,
    }
    info = inspect(resolve(model))
    given = {name: value for name, value in defaults.items() if value is not None}
    requests = make_requests(entries, given, first_seed=seed, limits=info.limits)
    _warn_of_unknown_words(requests, info)
    _warn_of_idle_guidance(requests)
    _check_writable(out)

    with _warnings_as_lines():
        engine = open_engine(
            model,
            device=device,
            dtype=dtype,
            isolation=isolation,
            max_batch_size=batch_size,
            max_batch_tokens=batch_tokens,
            attention=attention,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
        )
        code = _make(engine, requests, out, overwrite, as_json)
    raise typer.Exit(code)


@app.command()
def model_info(
    folder: Annotated[str, typer.Argument(help="A model folder, demo, or a hub id.")],
    device: Annotated[str, typer.Option(help="Where it should run: auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a model folder holds, what is wrong with it, and whether it can run here."""
    from reelbatch.models.checkpoint import inspect, resolve

    info = inspect(resolve(folder))
    if as_json:
        typer.echo(json.dumps(_info_record(info, device, dtype)))
    else:
        _show_info(info, device, dtype)
    raise typer.Exit(SOME_FAILED if info.problems or not info.fits(device, dtype) else 0)


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what this machine has: versions, device, memory, and the attention kernel that is chosen, and why."""
    from reelbatch.doctor import examine

    found = examine(device, dtype)
    if as_json:
        typer.echo(json.dumps(found))
        return
    _show_machine(found)


# -- generate, in parts ----------------------------------------------------------------------------


def open_engine(model: str, **options: Any) -> Engine:
    """The engine of a run; its libraries' own progress bars are silenced, ours are shown instead."""
    import diffusers
    import transformers

    from reelbatch.engine.engine import Engine

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    return Engine.from_pretrained(model, **options)


def _entries(prompts: Sequence[str], prompt_file: Path | None) -> list[Any]:
    from reelbatch.jobs.prompts import Entry, read_entries

    entries = [Entry(f"prompt {number}", {"prompt": prompt}) for number, prompt in enumerate(prompts, 1)]
    if prompt_file is not None:
        entries += read_entries(prompt_file)
    if not entries:
        raise ValueError("no prompt given: give prompts in quotes, or a file with --prompts (see --help)")
    return entries


def _make(engine: Engine, requests: Sequence[VideoRequest], out: Path, overwrite: bool, as_json: bool) -> int:
    """Makes what is missing, says how each request ended, draws the contact sheet; returns the exit code."""
    from reelbatch.jobs.progress import display
    from reelbatch.jobs.run import run
    from reelbatch.video import contact_sheet, places, sheet_path

    every = places(requests, out, engine.info, overwrite=overwrite)
    missing = [place for place in every if not place.made]
    if len(missing) < len(every):
        kept = len(every) - len(missing)
        _say(f"{kept} of {len(every)} videos are there already and are kept (--overwrite makes them anew)")
    failed = 0
    with _interruptible() as interrupted, display([place.request for place in missing], console) as shown:
        engine.on_progress = shown.progress
        for outcome in run(engine, missing, overwrite=overwrite, stopping=lambda: bool(interrupted)):
            shown.outcome(outcome)
            failed += outcome.error is not None
            if as_json:
                typer.echo(json.dumps(_outcome_record(outcome), default=str))
    if as_json:
        for place in every:
            if place.made:
                typer.echo(json.dumps(_kept_record(place), default=str))
    there = [place.path for place in every if place.path.exists()]
    if there:
        sheet = contact_sheet(there, sheet_path(there, out))
        _say(f"{len(there)} of {len(every)} videos in {out}; contact sheet: {sheet}")
    if interrupted:
        _say("stopped; the same command makes what is missing")
        return INTERRUPTED
    return SOME_FAILED if failed else 0


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    if outcome.error is None:
        return {"state": "done", "path": str(outcome.place.path), **(outcome.record or {})}
    error = {"type": type(outcome.error).__name__, "message": str(outcome.error)}
    return {"state": "failed", "error": error, "request": outcome.place.request.model_dump(mode="json")}


def _kept_record(place: Place) -> dict[str, Any]:
    from reelbatch.video import read_record

    return {"state": "kept", "path": str(place.path), **(read_record(place.path) or {})}


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Gives a list that is no longer empty after the first Ctrl-C; a second one stops at once."""
    interrupted: list[int] = []

    def stop(signum: int, frame: object) -> None:
        if interrupted:
            raise SystemExit(INTERRUPTED)
        interrupted.append(signum)
        _say("stopping after this step (Ctrl-C again stops at once)")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings meant for people come as a line, without the place in the code; those of libraries are dropped."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("reelbatch"):
            _say(f"warning: {message}", style="yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _warn_of_unknown_words(requests: Sequence[VideoRequest], info: ModelInfo) -> None:
    known = set(info.profile.vocabulary)
    if not known:
        return
    asked = (word for request in requests for word in re.findall(r"\w+", request.prompt.lower()))
    unknown = list(dict.fromkeys(word for word in asked if word not in known))
    if unknown:
        words = ", ".join(unknown[:WORDS_SHOWN])
        _say(
            f"warning: this little model does not know: {words}. It is {info.profile.about}. "
            "Name a real model with --model (a HunyuanVideo folder in the Diffusers layout, or a hub id).",
            style="yellow",
        )


def _warn_of_idle_guidance(requests: Sequence[VideoRequest]) -> None:
    """Classifier-free guidance needs both a scale and a negative prompt; one alone changes nothing."""
    if any(request.true_cfg > 1 and request.negative_prompt is None for request in requests):
        _say('warning: true_cfg does nothing without a negative prompt ("" will do)', style="yellow")
    if any(request.true_cfg == 1 and request.negative_prompt is not None for request in requests):
        _say("warning: a negative prompt does nothing while true_cfg is 1", style="yellow")


def _check_writable(out: Path) -> None:
    """Raises OSError now rather than after the first video has been computed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"--out {out}: no videos can be written there: {error.strerror}") from error


def _say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


# -- doctor, in parts ------------------------------------------------------------------------------


def _show_machine(found: dict[str, Any]) -> None:
    from rich.table import Table

    answer = Console()
    for name, value in found["machine"].items():
        answer.print(f"{name:<14} {value}", highlight=False, markup=False, soft_wrap=True)
    chosen = Table("attention with", "kernel", "why", title=f"chosen on {found['device']} in {found['dtype']}")
    for kind, choice in found["chosen"].items():
        chosen.add_row(kind, choice["backend"], choice["why"])
    answer.print(chosen)
    backends = Table("--attention", "what it is", "cannot here")
    for backend in found["backends"]:
        refused = "; ".join(f"{kind}: {why}" for kind, why in backend["refuses"].items())
        backends.add_row(backend["name"], backend["what"], backend["never"] or refused or "")
    answer.print(backends)
    answer.print(f"attention rules: {', '.join(found['rules'])}", highlight=False)


# -- model-info, in parts --------------------------------------------------------------------------


def _info_record(info: ModelInfo, device: str, dtype: str) -> dict[str, Any]:
    return {
        "name": info.name,
        "folder": str(info.folder),
        "about": info.profile.about,
        "components": [
            {
                "name": component.name,
                "class": component.class_name,
                "parameters": component.parameters,
                "stored_bytes": dict(component.stored_bytes),
            }
            for component in info.components
        ],
        "defaults": vars(info.limits.defaults),
        "spatial_stride": info.limits.spatial_stride,
        "temporal_stride": info.limits.temporal_stride,
        "flow_shift": info.flow_shift,
        "weight_bytes": info.weight_bytes(dtype, device),
        "fits": info.fits(device, dtype),
        "verdict": info.verdict(device, dtype),
        "problems": list(info.problems),
    }


def _show_info(info: ModelInfo, device: str, dtype: str) -> None:
    from rich.table import Table

    table = Table("component", "class", "parameters", "stored as", title=f"{info.name} ({info.folder})")
    for component in info.components:
        stored = ", ".join(f"{size / 2**20:.1f} MiB {kind}" for kind, size in component.stored_bytes)
        count = f"{component.parameters:,}" if component.parameters else ""
        table.add_row(component.name, component.class_name, count, stored)
    answer = Console()
    answer.print(table)
    if info.profile.about:
        answer.print(info.profile.about, markup=False)
    d = info.limits.defaults
    answer.print(
        f"by default {d.width}×{d.height}, {d.frames} frames, {d.steps} steps, guidance {d.guidance}, "
        f"flow shift {info.flow_shift}; sizes are multiples of {info.limits.spatial_stride}",
        highlight=False,
    )
    for problem in info.problems:
        answer.print(f"problem: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    answer.print(info.verdict(device, dtype), highlight=False, soft_wrap=True)
