"""`reelbatch generate`: videos of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reelbatch.cli.common import OUTPUT, app, nothing_begun, warnings_as_lines
from reelbatch.cli.options import EngineOptions, FormatOption, RequestOptions, with_options
from reelbatch.cli.run import JobSpec, make, plan_of, ready, warn
from reelbatch.cli.seeds import choose_seed


@app.command()
@with_options
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
    *,
    asked: RequestOptions,
    options: EngineOptions,
    again: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A video made before, with its sidecar beside it: make it again and compare the frames. All is as the "
            "sidecar says; it is kept only if --out is given.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the videos.", rich_help_panel=OUTPUT)] = Path("out"),
    naming: Annotated[
        Literal["default", "ascii"],
        typer.Option(
            help="default: the prompt's letters in any script. ascii: without accents and other scripts.",
            rich_help_panel=OUTPUT,
        ),
    ] = "default",
    format: FormatOption = "mp4",
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

    - `reelbatch generate --again out/a-small-blue-cross-seed0.mp4`

    Every video is an mp4 with a sidecar JSON beside it; the folder gets a contact sheet, a report and a manifest.
    Videos that are there already, of the same request and model, are kept: the same command again makes what is
    missing, and goes on with what Ctrl-C stopped. For whole prompt suites, see `reelbatch job`.
    """
    if again is not None:
        from reelbatch.cli.again import make_again

        raise typer.Exit(make_again(context, again, options, out, overwrite=overwrite, as_json=as_json))
    with warnings_as_lines(), nothing_begun():
        from reelbatch.formats import check_format
        from reelbatch.jobs.prompts import make_requests
        from reelbatch.loading.hub import resolve
        from reelbatch.loading.inspection import inspect

        check_format(format)
        info = inspect(resolve(options.model))
        entries = _entries(prompts or [], prompt_file)
        seed, drawn = choose_seed(asked.seed, out)
        requests = make_requests(entries, asked.request_fields, first_seed=seed, limits=info.limits)
        warn(requests, info, options.model)
        plan = plan_of(options, requests, info)
        spec = JobSpec(
            plan, out, naming=naming, format=format, overwrite=overwrite, random_seed=seed if drawn else None
        )
        engine = ready(spec)
    with warnings_as_lines():
        code = make(spec, engine, as_json=as_json)
    raise typer.Exit(code)


def _entries(prompts: Sequence[str], prompt_file: Path | None) -> list[Any]:
    from reelbatch.jobs.prompts import Entry, read_entries

    entries = [Entry(f"prompt {number}", {"prompt": prompt}) for number, prompt in enumerate(prompts, 1)]
    if prompt_file is not None:
        entries += read_entries(prompt_file)
    if not entries:
        raise ValueError("no prompt given: give prompts in quotes, or a file with --prompts (see --help)")
    return entries
