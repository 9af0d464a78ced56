"""The command line. Thin: it reads options, calls the rooms, and speaks to people."""

from __future__ import annotations

import json
import logging
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
    from reelbatch.engine.planner import Isolation
    from reelbatch.jobs.run import Outcome
    from reelbatch.models.checkpoint import ModelInfo
    from reelbatch.request import VideoRequest
    from reelbatch.tune.plan import Answer
    from reelbatch.tune.workload import Workload
    from reelbatch.video import Place

SOME_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
WORDS_SHOWN = 20
DEFAULT_BATCH_SIZE = 8

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Many HunyuanVideo videos in one run, each the video you would have got alone.",
)
console = Console(stderr=True)

# What libraries say while they are imported (of GPU kernels, of deprecations) is not for the people who run commands.
for _library in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
    os.environ.setdefault(_library, "error")
for _logger in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_logger).addFilter(lambda record: record.levelno >= logging.ERROR)


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
MEASURED = "What is measured"
BOUNDS = "What it keeps to"


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
    _check_writable(out)
    if batch_size is None:
        batch_size = _tuned_batch_size(requests, info, device, dtype, attention, isolation)

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


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="demo, a folder in the Diffusers layout, or hunyuanvideo-13b (no folder needed).")
    ] = "demo",
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="4k + 1: 1, 5, 9, …")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that share a step.")] = 1,
    true_cfg: Annotated[float, typer.Option(min=1, help="Classifier-free guidance scale; 1 is off.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="As of `generate`: auto, float32, bfloat16, int8, part by part.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N; with --max-memory also one not here.")] = "auto",
    isolation: Annotated[Literal["exact", "packed"], typer.Option(help="As of `generate`.")] = "exact",
    offload: Annotated[
        Literal["none", "component", "block"],
        typer.Option(help="Weights on the device: all; of the component at work; of the blocks at work."),
    ] = "none",
    max_memory: Annotated[
        str | None, typer.Option(help="What may be used, such as 20GiB; what the device has if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a batch is estimated to cost in memory, whether it fits, and what would make it fit.

    Examples:

    - `reelbatch plan --model hunyuanvideo-13b --device cuda --max-memory 80GiB --batch-size 2`

    - `reelbatch plan --model /models/HunyuanVideo --height 544 --width 960 --frames 97`

    Nothing is loaded and nothing is downloaded. The exit code is 1 for what does not fit.
    """
    from reelbatch.engine.memory import parse_bytes
    from reelbatch.tune.plan import answer

    found = answer(
        model,
        height=height,
        width=width,
        frames=frames,
        batch_size=batch_size,
        cfg=true_cfg > 1,
        dtype=dtype,
        device=device,
        isolation=isolation,
        offload=offload,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
    )
    if as_json:
        typer.echo(json.dumps(found.record()))
    else:
        _show_plan(found)
    raise typer.Exit(0 if found.fits else SOME_FAILED)


@app.command()
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="WIDTHxHEIGHTxFRAMES, as 1280x720x129; may be repeated. The model's own if not given.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A prompt file as `generate` takes it: its mix of shapes is what is measured.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; the model's own if not given.", rich_help_panel=MEASURED)
    ] = None,
    true_cfg: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance scale; above 1, a step costs two.", rich_help_panel=MEASURED),
    ] = None,
    model: Annotated[
        str, typer.Option(help="demo, a folder in the Diffusers layout, or a hub id.", rich_help_panel=ENGINE)
    ] = "demo",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.", rich_help_panel=ENGINE)] = "auto",
    dtype: Annotated[str, typer.Option(help="As `generate` takes it.", rich_help_panel=ENGINE)] = "auto",
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Several between commas, as fp32,bf16, in one table; their quality is against fp32 alone.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="Attention kernel: auto, or a name that `doctor` shows.", rich_help_panel=ENGINE)
    ] = "auto",
    budget: Annotated[str, typer.Option(help="Time for all of it, as 90s, 5m, 1h.", rich_help_panel=BOUNDS)] = "90s",
    max_latency: Annotated[
        str | None,
        typer.Option(help="Longest wait for the last video of a batch, as 30s or 10m.", rich_help_panel=BOUNDS),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory at the peak, as 20GiB.", rich_help_panel=BOUNDS)
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch size tried.", rich_help_panel=BOUNDS)] = 32,
    out: Annotated[
        Path, typer.Option(help="Folder for tune.html, tune.json and the pictures.", rich_help_panel=OUTPUT)
    ] = Path("out/tune"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and no table.", rich_help_panel=OUTPUT)
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="List the stored profiles and measure nothing.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Measure batch sizes on this machine, and say which to use and why.

    Examples:

    - `reelbatch tune`: the bundled model at its own size, in 90 seconds

    - `reelbatch tune --model /models/HunyuanVideo --shape 960x544x97 --budget 30m --max-latency 20m`

    - `reelbatch tune --prompts suite.csv --dtypes fp32,bf16`

    Batches of growing size are run, in both isolations: a few steps each, extrapolated to full videos, and checked by
    a full run. The advice is the smallest batch within 5 % of the best throughput that keeps to the limits; exact
    isolation unless packed is more than 10 % faster. `generate` then takes it when --batch-size is not given.
    Other programs on the machine make the figures worse: measure when it is quiet. Ctrl-C keeps what was measured.
    """
    from reelbatch.engine.memory import parse_bytes
    from reelbatch.tune import report as tune_report
    from reelbatch.tune import run as tune_run
    from reelbatch.tune.choose import Limits
    from reelbatch.tune.display import Display

    if show:
        _show_profiles(as_json)
        return
    if dtypes is not None and dtype != "auto":
        raise ValueError(f"--dtype {dtype} and --dtypes {dtypes} were given; give one of them")
    limits = Limits(
        None if max_latency is None else tune_run.parse_seconds(max_latency, "--max-latency"),
        None if max_memory is None else parse_bytes(max_memory),
    )
    seconds = tune_run.parse_seconds(budget, "--budget")
    several = [dtype] if dtypes is None else tune_run.parse_dtypes(dtypes)
    info, workloads = _workloads(model, shape or [], prompt_file, steps, true_cfg, max_batch)
    _check_writable(out)
    _quiet_libraries()
    with _warnings_as_lines(), _interruptible() as interrupted, Display(console) as display:
        found = tune_run.tune(
            info,
            workloads,
            device=device,
            dtypes=several,
            against_fp32=dtypes is not None,
            attention=attention,
            budget=seconds,
            limits=limits,
            largest=max_batch,
            tell=display.tell,
            stopping=lambda: bool(interrupted),
        )
    files = tune_report.write(found, out)
    if as_json:
        typer.echo(json.dumps(tune_report.record(found)))
    else:
        answer = Console()
        answer.print(tune_report.terminal(found, answer.width))
    _say(f"page: {files['html']}; figures: {files['json']}")
    if interrupted:
        _say("stopped; this is what was measured until then, and no profile was stored")
        raise typer.Exit(INTERRUPTED)
    if found.profiles:
        _say(
            "stored: `generate` takes this batch size when --batch-size is not given (tune --show lists what is stored)"
        )
    raise typer.Exit(0 if all(swept.choice for swept in found.sweeps) else SOME_FAILED)


# -- generate, in parts ----------------------------------------------------------------------------


def open_engine(model: str, **options: Any) -> Engine:
    """The engine of a run; its libraries' own progress bars are silenced, ours are shown instead."""
    from reelbatch.engine.engine import Engine

    _quiet_libraries()
    return Engine.from_pretrained(model, **options)


def _quiet_libraries() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


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
        _say(line)
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


# -- tune, in parts --------------------------------------------------------------------------------


def _workloads(
    model: str,
    shape: Sequence[str],
    prompt_file: Path | None,
    steps: int | None,
    true_cfg: float | None,
    largest: int,
) -> tuple[ModelInfo, list[Workload]]:
    """The model, and what is to be measured with it."""
    from reelbatch.jobs.prompts import make_requests, read_entries
    from reelbatch.models.checkpoint import inspect, resolve
    from reelbatch.tune import workload

    if prompt_file is not None and shape:
        raise ValueError("--prompts and --shape were given; a prompt file says its shapes itself: give one of them")
    shapes = [workload.parse_shape(text) for text in shape] or [{}]
    info = inspect(resolve(model))
    fields: dict[str, Any] = {
        name: value for name, value in (("steps", steps), ("true_cfg", true_cfg)) if value is not None
    }
    if prompt_file is not None:
        requests = make_requests(read_entries(prompt_file), fields, first_seed=0, limits=info.limits)
        return info, [workload.of_mix(requests, prompt_file.name)]
    if true_cfg is not None and true_cfg > 1:
        fields["negative_prompt"] = ""
    made = [workload.of_shape(info, fields | sizes, largest) for sizes in shapes]
    return info, list({one.name: one for one in made}.values())


def _show_profiles(as_json: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from reelbatch.tune import profiles

    stored = profiles.stored()
    if as_json:
        known = [
            {"file": str(path), "profile": None, "problem": found}
            if isinstance(found, str)
            else {"file": str(path), "profile": found.model_dump(mode="json"), "problem": profiles.stale(found)}
            for path, found in stored
        ]
        typer.echo(json.dumps(known))
        return
    if not stored:
        _say(f"no profile is stored in {profiles.cache_folder()}: `reelbatch tune` makes one")
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("model", "shapes", "dtype", "batch", "isolation", "videos/h", "measured"):
        table.add_column(column, no_wrap=True)
    table.add_column("here")
    for path, found in stored:
        if isinstance(found, str):
            table.add_row(path.name, *[""] * 6, found)
            continue
        about = found.identity
        kind = about.dtype if about.attention == "auto" else f"{about.dtype}, {about.attention}"
        row = (about.model, about.shapes, kind, str(found.batch_size), found.isolation)
        rate = f"{found.videos_per_hour:,.0f}" if found.videos_per_hour >= 100 else f"{found.videos_per_hour:.2f}"
        table.add_row(*row, rate, str(found.measured), profiles.stale_in_short(found) or "usable")
    Console().print(table)
    _say(f"kept in {profiles.cache_folder()}; a file that is deleted there is forgotten")


# -- plan, in parts --------------------------------------------------------------------------------


def _show_plan(found: Answer) -> None:
    from rich.table import Table

    from reelbatch.engine.memory import how_far_off
    from reelbatch.tune.plan import LARGEST_BATCH, PHASES

    setup, shape = found.setup, found.setup.shape
    title = (
        f"{setup.network.name}: {setup.batch_size} × {shape.width}×{shape.height}, {shape.frames} frames"
        f"{', true CFG' if shape.cfg else ''}; {setup.precision}, {setup.isolation}, offload {setup.offload}, "
        f"{setup.device}"
    )
    table = Table("phase", title=title)
    for column in ("weights GiB", "activations GiB", "estimated peak GiB"):
        table.add_column(column, justify="right")
    for phase, total in found.plan.phases.items():
        sizes = (found.plan.weights[phase], getattr(found.plan, phase), total)
        table.add_row(PHASES[phase], *(f"{size / 2**30:.2f}" for size in sizes))
    answer = Console()

    def tell(text: str, style: str | None = None) -> None:
        answer.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    answer.print(table)
    if setup.held:
        tell(f"besides, this process holds {setup.held / 2**30:.2f} GiB before a model is loaded")
    tell(found.verdict, None if found.fits else "red")
    for number, remedy in enumerate(found.remedies):
        start = "what would make it fit, the cheapest first: " if number == 0 else "  or: "
        tell(f"{start}{', '.join(remedy.changes)} (estimated peak {remedy.peak / 2**30:.2f} GiB)")
    if any(change.startswith("--offload") for remedy in found.remedies for change in remedy.changes):
        tell("  (offload is planned for here only: `generate` cannot do it yet)")
    if not found.fits and not found.remedies:
        tell("no smaller batch, dtype, offload or VAE tiling makes it fit: make it smaller or shorter")
    most = f"{found.largest_batch}{' or more' if found.largest_batch == LARGEST_BATCH else ''}"
    tell(f"largest batch that fits as it is set: {most if found.largest_batch else 'none'}")
    tell(how_far_off(setup.device))


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
