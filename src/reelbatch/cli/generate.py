"""`reelbatch generate`: videos of prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reelbatch.cli.common import (
    ENGINE,
    INTERRUPTED,
    OUTPUT,
    REQUEST,
    SOME_FAILED,
    app,
    check_writable,
    console,
    interruptible,
    quiet_libraries,
    say,
    warnings_as_lines,
)

if TYPE_CHECKING:
    from reelbatch.engine.engine import Engine
    from reelbatch.engine.planner import Isolation
    from reelbatch.jobs.run import Outcome
    from reelbatch.models.checkpoint import ModelInfo
    from reelbatch.request import VideoRequest
    from reelbatch.video import Place

WORDS_SHOWN = 20
DEFAULT_BATCH_SIZE = 8


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
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Videos that share a step; as `tune` found it, else 8, if not given.", rich_help_panel=ENGINE
        ),
    ] = None,
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
    check_writable(out)
    if batch_size is None:
        batch_size = _tuned_batch_size(requests, info, device, dtype, attention, isolation)

    with warnings_as_lines():
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


def open_engine(model: str, **options: Any) -> Engine:
    """The engine of a run; its libraries' own progress bars are silenced, ours are shown instead."""
    from reelbatch.engine.engine import Engine

    quiet_libraries()
    return Engine.from_pretrained(model, **options)


def _tuned_batch_size(
    requests: Sequence[VideoRequest], info: ModelInfo, device: str, dtype: str, attention: str, isolation: Isolation
) -> int:
    """The batch size that `tune` found for these shapes, and a line that says so; the default where it found none."""
    from reelbatch.tune import profiles
    from reelbatch.tune.workload import shape_class, shape_of

    if len(requests) == 1:
        return DEFAULT_BATCH_SIZE
    kinds = [shape_class(requests), *sorted({shape_of(request) for request in requests})]
    about = profiles.identity(info.folder, info.name, "", device=device, dtype=dtype, attention=attention)
    wanted = [about.model_copy(update={"shapes": kind}) for kind in kinds]
    size, line = profiles.advice(wanted, isolation, DEFAULT_BATCH_SIZE)
    if line:
        say(line)
    return size


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
        say(f"{kept} of {len(every)} videos are there already and are kept (--overwrite makes them anew)")
    failed = 0
    with interruptible() as interrupted, display([place.request for place in missing], console) as shown:
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
        say(f"{len(there)} of {len(every)} videos in {out}; contact sheet: {sheet}")
    if interrupted:
        say("stopped; the same command makes what is missing")
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
