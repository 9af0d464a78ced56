"""`reelbatch tune`: which batch size to use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reelbatch.cli.common import (
    BOUNDS,
    ENGINE,
    INTERRUPTED,
    MEASURED,
    OUTPUT,
    SOME_FAILED,
    SafeConsole,
    app,
    check_writable,
    command_again,
    console,
    interruptible,
    quiet_libraries,
    say,
    warnings_as_lines,
)
from reelbatch.cli.options import AttentionOption, Device, Dtype, LoraOption, Model
from reelbatch.cli.profiles import forget_profiles, show_profiles

if TYPE_CHECKING:
    from reelbatch.loading.inspection import ModelInfo
    from reelbatch.tune.quality import Scene
    from reelbatch.tune.workload import Workload


@app.command()
def tune(
    context: typer.Context,
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
    model: Model = "demo",
    device: Device = "auto",
    dtype: Dtype = "auto",
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Several between commas, as fp32,bf16, in one table; their quality is against fp32 alone.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    attention: AttentionOption = "auto",
    lora: LoraOption = None,
    offload: Annotated[
        Literal["none", "component", "block"] | None,
        typer.Option(
            help="Weights on the device: all; of the component at work; of the blocks at work. The first that one "
            "video is estimated to fit with, if not given.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
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
    forget: Annotated[
        bool,
        typer.Option(
            "--forget",
            help="Remove the stored profiles of --model (of --shape, if given) and measure nothing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Measure batch sizes on this machine, and say which to use and why.

    Examples:

    - `reelbatch tune`: the bundled model at its own size, in 90 seconds

    - `reelbatch tune --model /models/HunyuanVideo --shape 960x544x97 --budget 30m --max-latency 20m`

    - `reelbatch tune --prompts suite.csv --dtypes fp32,bf16`

    - `reelbatch tune --forget --model /models/HunyuanVideo`: `generate` goes by the default batch size again

    Batches of growing size are run, in both isolations: a few steps each, extrapolated to full videos, and checked by
    a full run. The advice is the smallest batch within 5 % of the best throughput that keeps to the limits; exact
    isolation unless packed is more than 10 % faster. `generate` then takes it when --batch-size is not given.
    There is no advice, nothing is stored and the exit code is 1 if fewer than two sizes could be measured or the
    repeats lie too far apart; what is missing is said. Other programs on the machine make the figures worse: measure
    when it is quiet. Ctrl-C keeps what was measured.
    """
    from reelbatch.device import parse_bytes
    from reelbatch.engine.config import EngineConfig
    from reelbatch.loading.lora import parse_lora
    from reelbatch.tune.choose import Limits
    from reelbatch.tune.display import display
    from reelbatch.tune.report import record, terminal
    from reelbatch.tune.run import Tuning, parse_dtypes, parse_seconds
    from reelbatch.tune.write import write

    if show or forget:
        if show and forget:
            raise ValueError("--show and --forget were given; give one of them")
        if show:
            show_profiles(as_json)
        else:
            forget_profiles(model, shape or [], as_json)
        return
    if dtypes is not None and dtype != "auto":
        raise ValueError(f"--dtype {dtype} and --dtypes {dtypes} were given; give one of them")
    limits = Limits(
        None if max_latency is None else parse_seconds(max_latency, "--max-latency"),
        None if max_memory is None else parse_bytes(max_memory),
    )
    seconds = parse_seconds(budget, "--budget")
    several = [dtype] if dtypes is None else parse_dtypes(dtypes)
    loras = tuple((str(path), scale) for path, scale in map(parse_lora, lora or []))
    config = EngineConfig(model=model, device=device, attention=attention, lora=loras)
    command = command_again(context, budget=None, **({"max_batch": None} if max_batch < 2 else {}))
    info, workloads = _workloads(model, shape or [], prompt_file, steps, true_cfg, max_batch)
    check_writable(out, "page")
    quiet_libraries()
    with warnings_as_lines(), interruptible() as interrupted, display(console) as show_update:
        report = Tuning(
            info,
            workloads,
            config,
            dtypes=several,
            against_fp32=dtypes is not None,
            offload=offload,
            budget=seconds,
            limits=limits,
            largest=max_batch,
            command=command,
            on_update=show_update,
            stopping=lambda: bool(interrupted),
        ).run()
    files = write(report, out)
    if as_json:
        typer.echo(json.dumps(record(report)))
    else:
        answer = SafeConsole()
        answer.print(terminal(report, answer.width))
    say(f"page: {files['html']}; figures: {files['json']}")
    if interrupted:
        say("stopped; this is what was measured until then, and no profile was stored")
        raise typer.Exit(INTERRUPTED)
    if report.profiles:
        say(
            "stored: `generate` takes this batch size (and offload) when --batch-size is not given (tune --show lists "
            "what is stored)"
        )
    raise typer.Exit(0 if all(sweep.choice for sweep in report.sweeps) else SOME_FAILED)


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
    from reelbatch.loading.hub import DEMO_FOLDER, resolve
    from reelbatch.loading.inspection import inspect
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
    captions = _demo_captions if info.folder == DEMO_FOLDER else None
    measured = [workload.of_shape(info, fields | sizes, largest, captions) for sizes in shapes]
    return info, list({one.name: one for one in measured}.values())


def _demo_captions(count: int) -> Sequence[tuple[Scene, str]]:
    """Captions that the bundled model knows, with what they show: seen in training and not, in turn."""
    from reelbatch.demo.evaluate import prompts

    seen, unseen = prompts(2 * count)
    return [pair for pairs in zip(seen, unseen, strict=True) for pair in pairs][:count]
