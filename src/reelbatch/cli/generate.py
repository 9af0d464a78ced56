"""`reelbatch generate`: videos of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from reelbatch.cli import options as given
from reelbatch.cli.common import OUTPUT, app, check_writable, warnings_as_lines
from reelbatch.cli.making import Plan, check_requests, make, request_fields


@app.command()
def generate(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A file of prompts: .txt (one a line), .jsonl, .csv or .parquet (any request field, and `copies`).",
        ),
    ] = None,
    copies: given.Copies = None,
    prompt_2: given.Prompt2 = None,
    negative_prompt: given.NegativePrompt = None,
    seed: given.Seed = 0,
    height: given.Height = None,
    width: given.Width = None,
    frames: given.Frames = None,
    steps: given.Steps = None,
    guidance: given.Guidance = None,
    true_cfg: given.TrueCfg = None,
    flow_shift: given.FlowShift = None,
    fps: given.Fps = None,
    attention_rule: given.AttentionRule = None,
    tag: given.Tag = None,
    model: given.Model = "demo",
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    isolation: given.IsolationOption = "exact",
    attention: given.AttentionOption = "auto",
    batch_size: given.BatchSize = None,
    batch_tokens: given.BatchTokens = None,
    max_memory: given.MaxMemory = None,
    lora: given.LoraOption = None,
    offload: given.OffloadOption = None,
    checkpoint_every: given.CheckpointEvery = None,
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

    Every video is an mp4 with a sidecar JSON beside it; the folder gets a contact sheet, a report and a manifest.
    Videos that are there already, of the same request and model, are kept: the same command again makes what is
    missing, and goes on with what Ctrl-C stopped. For whole prompt suites, see `reelbatch job`.
    """
    from reelbatch.jobs.manifest import Manifest
    from reelbatch.jobs.prompts import make_requests
    from reelbatch.loading.hub import resolve
    from reelbatch.loading.inspection import inspect

    options = context.params
    info = inspect(resolve(model))
    entries = _entries(prompts or [], prompt_file)
    requests = make_requests(entries, request_fields(options), first_seed=seed, limits=info.limits)
    check_requests(requests, info)
    check_writable(out)
    with warnings_as_lines():
        code = make(
            Plan(requests, info, options),
            Manifest.in_folder(out),
            out,
            mode="add",
            overwrite=overwrite,
            checkpoint_every=checkpoint_every,
            as_json=as_json,
        )
    raise typer.Exit(code)


def _entries(prompts: Sequence[str], prompt_file: Path | None) -> list[Any]:
    from reelbatch.jobs.prompts import Entry, read_entries

    entries = [Entry(f"prompt {number}", {"prompt": prompt}) for number, prompt in enumerate(prompts, 1)]
    if prompt_file is not None:
        entries += read_entries(prompt_file)
    if not entries:
        raise ValueError("no prompt given: give prompts in quotes, or a file with --prompts (see --help)")
    return entries
