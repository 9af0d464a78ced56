"""`reelbatch job`: whole prompt suites, resumable, and what became of them."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.live import Live

from reelbatch.cli.common import OUTPUT, SOME_FAILED, app, check_writable, console, say, warnings_as_lines
from reelbatch.cli.job_views import show_outlook, status_record, status_table
from reelbatch.cli.options import EngineOptions, FormatOption, RequestOptions, with_options
from reelbatch.cli.run import Plan, make, measured, plan_of, warn

if TYPE_CHECKING:
    from reelbatch.formats import Format
    from reelbatch.jobs.job import Mode
    from reelbatch.jobs.manifest import Manifest, VideoRow
    from reelbatch.jobs.outlook import Outlook

SELECTION = "Which of them"
WATCH_SECONDS = 2.0

job = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make a whole prompt suite, stop and go on, and see what became of it.",
)
app.add_typer(job, name="job")

Out = Annotated[Path, typer.Option(help="Folder of the videos and of the manifest.", rich_help_panel=OUTPUT)]
Url = Annotated[
    str | None,
    typer.Option(
        "--manifest",
        help="Where the manifest is, if not in the folder: a database URL, as postgresql+psycopg://user@host/name.",
        envvar="REELBATCH_MANIFEST",
        rich_help_panel=OUTPUT,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts: JSON, and nothing else.", rich_help_panel=OUTPUT)]


@job.command()
@with_options
def run(
    prompts: Annotated[
        Path, typer.Argument(help="A prompt file: .txt, .csv, .tsv, .jsonl, .parquet, or VBench_full_info.json.")
    ],
    *,
    asked: RequestOptions,
    only: Annotated[
        list[str] | None,
        typer.Option(help="As tag=animal or seed=3; may be repeated, and all must hold.", rich_help_panel=SELECTION),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many videos at most.", rich_help_panel=SELECTION)] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="In a random order, the same each time.", rich_help_panel=SELECTION)
    ] = False,
    options: EngineOptions,
    out: Out = Path("out"),
    manifest: Url = None,
    naming: Annotated[
        Literal["default", "ascii", "vbench"],
        typer.Option(
            help="default: the prompt's letters in any script. ascii: without accents and other scripts. vbench: "
            "{prompt}-{index}.mp4, as its scorer wants, 25 of each prompt of temporal_flickering and 5 of the others.",
            rich_help_panel=OUTPUT,
        ),
    ] = "default",
    format: FormatOption = "mp4",
    names_from: Annotated[
        Path | None,
        typer.Option(
            "--named-after",
            help="A prompt file with a line for each of PROMPTS: files are named after its prompts, as VBench's scorer "
            "wants it of rewritten prompts.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep what the folder holds of these, and make the rest beside it.")
    ] = False,
    as_new: Annotated[bool, typer.Option("--as-new", help="Make all of these, beside what the folder holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be made, and the time and disk it takes; make nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the videos of a prompt file, and go on where an earlier run of the same command stopped.

    Examples:

    - `reelbatch job run suite.txt --out suite --copies 5`

    - `reelbatch job run VBench_full_info.json --out vbench --naming vbench --model /models/HunyuanVideo`

    - `reelbatch job run rewritten.txt --named-after VBench_full_info.json --out vbench --naming vbench`

    - `reelbatch job run suite.csv --only tag=animal --limit 20 --dry-run`

    Every video is a row of the manifest, and is done only once its file is complete: a kill at any moment loses no
    more than the steps that run, and with --checkpoint-every less. The same command goes on; started twice or on
    several machines that see the folder, it shares the work. Ctrl-C saves the running videos' state and stops; a
    second one stops at once. `job status`, in another terminal, shows how far it is.
    """
    from reelbatch.formats import check_format
    from reelbatch.jobs.manifest import Manifest
    from reelbatch.jobs.naming import vbench_problems
    from reelbatch.jobs.prompts import make_requests, named_after, only_those, read_entries, shuffled
    from reelbatch.jobs.vbench import check_readable, with_copies
    from reelbatch.loading.hub import resolve
    from reelbatch.loading.inspection import inspect

    if add and as_new:
        raise ValueError("--add and --as-new were given; --add keeps what is there, --as-new does not: give one")
    check_format(format)
    if naming == "vbench":
        check_readable(format)
    info = inspect(resolve(options.model))
    entries = read_entries(prompts)
    if names_from is not None:
        entries = named_after(entries, names_from)
    line = None
    if naming == "vbench":
        entries, line = with_copies(entries, asked.copies)
    requests = make_requests(entries, asked.request_fields, first_seed=asked.seed, limits=info.limits)
    requests = only_those(requests, only or [])
    requests = (shuffled(requests, asked.seed) if shuffle else requests)[:limit]
    if not requests:
        raise ValueError(f"--only {' --only '.join(only or [])} leaves none of the prompts in {prompts}")
    warn(requests, info)
    if line:
        say(line)
    if naming == "vbench":
        for problem in vbench_problems(requests):
            say(f"warning: {problem}", style="yellow")
    plan = plan_of(options, requests, info)
    if dry_run:
        if plan.advice:
            say(plan.advice)
        show_outlook(_outlook(plan, out, manifest, format), as_json)
        return
    check_writable(out)
    mode: Mode = "add" if add else "new" if as_new else "resume"
    with warnings_as_lines():
        code = make(
            plan, Manifest.in_folder(out, manifest), out, mode=mode, naming=naming, format=format, as_json=as_json
        )
    raise typer.Exit(code)


@job.command()
def status(
    out: Out = Path("out"),
    manifest: Url = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every 2 seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, how fast, and what failed."""
    opened = _open(out, manifest)
    if as_json:
        typer.echo(json.dumps(status_record(opened)))
        return
    if not watch:
        Console().print(status_table(opened))
        return
    with Live(status_table(opened), auto_refresh=False) as live:
        while True:
            live.update(status_table(opened), refresh=True)
            time.sleep(WATCH_SECONDS)


@job.command()
def retry(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of videos, as `job export` lists them.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All that failed.")] = False,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="All that were cancelled.")] = False,
    out: Out = Path("out"),
    manifest: Url = None,
) -> None:
    """Put videos that failed or were cancelled back in line; the next `job run` makes them."""
    from reelbatch.jobs.manifest import State

    if not (ids or failed or cancelled):
        raise ValueError("nothing was named: give ids, --failed or --cancelled")
    wanted = {State.FAILED: failed or bool(ids), State.CANCELLED: cancelled or bool(ids)}
    opened = _open(out, manifest)
    _refuse_unknown(opened, ids or [])
    moved = opened.retry([state for state, chosen in wanted.items() if chosen], ids)
    say(f"{len(moved)} videos are in line again; the command that made the job makes them")


@job.command()
def cancel(
    ids: Annotated[list[str], typer.Argument(help="Ids of videos, as `job export` lists them.")],
    out: Out = Path("out"),
    manifest: Url = None,
) -> None:
    """Cancel videos that are not made yet; one that runs is dropped within seconds, and the others go on."""
    opened = _open(out, manifest)
    _refuse_unknown(opened, ids)
    moved = opened.cancel(ids)
    for id in ids:
        if id not in moved:
            say(f"{id} is not cancelled: it had ended already", style="yellow")
    say(f"{len(moved)} videos are cancelled")
    raise typer.Exit(0 if len(moved) == len(ids) else SOME_FAILED)


@job.command()
def verify(
    out: Out = Path("out"),
    manifest: Url = None,
    again: Annotated[
        bool, typer.Option("--make-again", help="Put what is wrong back in line; damaged files are set aside.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the file of every video that is done: its hash, that it decodes, its size and frame count."""
    from rich.progress import track

    from reelbatch.jobs.manifest import State
    from reelbatch.jobs.verify import make_again
    from reelbatch.jobs.verify import verify as check

    opened = _open(out, manifest)
    total = opened.counts()[State.DONE]
    wrong = []
    for checked in track(check(opened, out), "verifying", total, console=console, transient=True):
        if as_json:
            row = checked.row
            typer.echo(json.dumps({"id": row.id, "file": row.file, "problem": checked.problem}))
        if checked.problem:
            wrong.append(checked.row)
            say(f"{out / checked.row.file} {checked.problem}", style="red")
    if wrong and again:
        make_again(opened, out, wrong)
        say(f"{len(wrong)} of {total} videos were wrong and are in line again")
    else:
        say(f"{total - len(wrong)} of {total} videos are right" + ("; --make-again makes the others" if wrong else ""))
    raise typer.Exit(SOME_FAILED if wrong else 0)


@job.command()
def export(
    to: Annotated[Path | None, typer.Argument(help="A .csv or .jsonl file; without it, JSONL is printed.")] = None,
    out: Out = Path("out"),
    manifest: Url = None,
) -> None:
    """Write all rows of the manifest to a file, for a spreadsheet or a script."""
    if to is not None and to.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{to}: name a .csv or a .jsonl file")
    records = [row.record() for row in _open(out, manifest).rows()]
    if to is not None and to.suffix == ".csv":
        with to.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(records[0] if records else [])
            writer.writerows([_cell(value) for value in record.values()] for record in records)
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        sys.stdout.write(text) if to is None else to.write_text(text, encoding="utf-8")
    if to is not None:
        say(f"{len(records)} rows in {to}")


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _open(out: Path, url: str | None) -> Manifest:
    from reelbatch.jobs.manifest import Manifest

    return Manifest.in_folder(out, url, must_exist=True)


def _refuse_unknown(manifest: Manifest, ids: Sequence[str]) -> None:
    unknown = [id for id in ids if manifest.row(id) is None]
    if unknown:
        raise ValueError(f"no video has the id {', '.join(unknown)}; `reelbatch job export` lists all of them")


def _outlook(plan: Plan, out: Path, url: str | None, format: Format) -> Outlook:
    from reelbatch.jobs.job import settings_of
    from reelbatch.jobs.manifest import FILE, Manifest
    from reelbatch.jobs.outlook import look_ahead

    rows: list[VideoRow] = []
    if url is not None or (out / FILE).exists():
        rows = Manifest.in_folder(out, url, must_exist=True).rows()
    free = shutil.disk_usage(next(folder for folder in (out, *out.resolve().parents) if folder.exists())).free
    settings = settings_of(plan.config, plan.info, "default", format)
    return look_ahead(plan.requests, settings, rows, plan.config.max_batch_size, measured(plan), free)
