"""`reelbatch job`: whole prompt suites, resumable, and what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.live import Live

from reelbatch.cli.common import (
    OUTPUT,
    SOME_FAILED,
    SafeConsole,
    app,
    check_writable,
    console,
    nothing_begun,
    say,
    warnings_as_lines,
)
from reelbatch.cli.job_views import show_outlook, status_record, status_table
from reelbatch.cli.options import EngineOptions, FormatOption, RequestOptions, with_options
from reelbatch.cli.run import JobSpec, draw_sheet, make, outlook, plan_of, ready, warn
from reelbatch.cli.seeds import choose_seed, stored_seed

if TYPE_CHECKING:
    from reelbatch.jobs.job import Mode
    from reelbatch.jobs.manifest import Manifest

SELECTION = "Which of them"
WATCH_SECONDS = 2.0

job = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make a whole prompt suite, stop and go on, and see what became of it.",
)
app.add_typer(job, name="job")

OUT = Path("out")
Out = Annotated[Path, typer.Option(help="Folder of the videos and of the manifest.", rich_help_panel=OUTPUT)]
Folder = Annotated[Path | None, typer.Argument(help="Folder of the job, as --out names it.", show_default=False)]
Ids = Annotated[
    list[str] | None,
    typer.Argument(
        help="Ids of videos, as `job export` lists them. The job's folder may stand before them.",
        metavar="[FOLDER] [ID]...",
        show_default=False,
    ),
]
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
    out: Out = OUT,
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
    if add and as_new:
        raise ValueError("--add and --as-new were given; --add keeps what is there, --as-new does not: give one")
    mode: Mode = "add" if add else "new" if as_new else "resume"
    with warnings_as_lines(), nothing_begun():
        from reelbatch.formats import check_format
        from reelbatch.jobs.job import JobChanged
        from reelbatch.jobs.naming import vbench_problems
        from reelbatch.jobs.prompts import make_requests, named_after, only_those, read_entries, shuffled
        from reelbatch.jobs.vbench import check_readable, with_copies
        from reelbatch.loading.hub import resolve
        from reelbatch.loading.inspection import inspect

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

        def spec_of(seed: int) -> JobSpec:
            requests = make_requests(entries, asked.request_fields, first_seed=seed, limits=info.limits)
            requests = only_those(requests, only or [])
            requests = (shuffled(requests, seed) if shuffle else requests)[:limit]
            if not requests:
                raise ValueError(f"--only {' --only '.join(only or [])} leaves none of the prompts in {prompts}")
            plan = plan_of(options, requests, info)
            return JobSpec(plan, out, manifest, mode, naming, format, random_seed=seed if drawn else None)

        seed, drawn = choose_seed(asked.seed, out, manifest, mode)
        spec = spec_of(seed)
        warn(spec.plan.requests, info, options.model)
        if line:
            say(line)
        if naming == "vbench":
            for problem in vbench_problems(spec.plan.requests):
                say(f"warning: {problem}", style="yellow")
        if dry_run:
            show_outlook(outlook(spec), as_json)
            return
        engine = ready(spec)
    with warnings_as_lines():
        try:
            code = make(spec, engine, as_json=as_json)
        except JobChanged:
            other = stored_seed(out, manifest, mode) if drawn else None
            if other is None or other == seed:
                raise
            code = make(spec_of(other), engine, as_json=as_json)  # another run that began at once drew it first
    raise typer.Exit(code)


@job.command()
def status(
    folder: Folder = None,
    out: Out = OUT,
    manifest: Url = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every 2 seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, how fast, and what failed."""
    opened = _open(_one_of(folder, out), manifest)
    if as_json:
        typer.echo(json.dumps(status_record(opened)))
        return
    if not watch:
        SafeConsole().print(status_table(opened))
        return
    with Live(status_table(opened), console=SafeConsole(), auto_refresh=False) as live:
        while True:
            live.update(status_table(opened), refresh=True)
            time.sleep(WATCH_SECONDS)


@job.command()
def retry(
    ids: Ids = None,
    failed: Annotated[bool, typer.Option("--failed", help="All that failed.")] = False,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="All that were cancelled.")] = False,
    out: Out = OUT,
    manifest: Url = None,
) -> None:
    """Put videos that failed or were cancelled back in line; the next `job run` makes them."""
    from reelbatch.jobs.manifest import State

    out, named = _folder_first(ids or [], out)
    if not (named or failed or cancelled):
        raise ValueError("nothing was named: give ids, --failed or --cancelled")
    wanted = {State.FAILED: failed or bool(named), State.CANCELLED: cancelled or bool(named)}
    opened = _open(out, manifest)
    _refuse_unknown(opened, named)
    states = [state for state, chosen in wanted.items() if chosen]
    moved = opened.retry(states, named or None)
    if moved:
        say(f"{len(moved)} videos are in line again; the command that made the job makes them")
    else:
        say(f"nothing to do: {'none of these videos' if named else 'no video of this job'} {' or '.join(states)}")


@job.command()
def cancel(
    ids: Ids = None,
    out: Out = OUT,
    manifest: Url = None,
) -> None:
    """Cancel videos that are not made yet; one that runs is dropped within seconds, and the others go on."""
    out, named = _folder_first(ids or [], out)
    if not named:
        raise ValueError("nothing was named: give the ids of videos, as `job export` lists them")
    opened = _open(out, manifest)
    _refuse_unknown(opened, named)
    moved = opened.cancel(named)
    for id in named:
        if id not in moved:
            say(f"{id} is not cancelled: it had ended already", style="yellow")
    say(f"{len(moved)} videos are cancelled")
    raise typer.Exit(0 if len(moved) == len(named) else SOME_FAILED)


@job.command()
def verify(
    folder: Folder = None,
    out: Out = OUT,
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

    out = _one_of(folder, out)
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
def report(folder: Folder = None, out: Out = OUT, manifest: Url = None) -> None:
    """Draw the report and the contact sheet anew, also while the job runs."""
    from reelbatch.jobs.report import write_report

    out = _one_of(folder, out)
    opened = _open(out, manifest)
    check_writable(out, "report")
    rows = opened.rows()
    say(f"report: {write_report(out, opened.jobs(), rows)}{draw_sheet(out, rows)}")


@job.command()
def export(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A .csv or .jsonl file to write; without it, JSONL is printed. The job's folder may stand before it.",
            metavar="[FOLDER] [FILE]",
        ),
    ] = None,
    out: Out = OUT,
    manifest: Url = None,
) -> None:
    """Write all rows of the manifest to a file, for a spreadsheet or a script."""
    from reelbatch.jobs.export import write_rows

    given = list(paths or [])
    to = given.pop() if given and given[-1].suffix in (".csv", ".jsonl") else None
    if len(given) > 1 or (given and not given[0].is_dir()):
        raise ValueError(f"{given[-1]}: name a .csv or a .jsonl file, and before it the folder of a job")
    rows = _open(_one_of(given[0] if given else None, out), manifest).rows()
    write_rows(rows, to)
    if to is not None:
        say(f"{len(rows)} rows in {to}")


def _one_of(folder: Path | None, out: Path) -> Path:
    """The folder of a job, given as an argument or by --out."""
    if folder is None:
        return out
    if out != OUT:
        raise ValueError(f"two folders were given, {folder} and --out {out}; give one")
    return folder


def _folder_first(ids: Sequence[str], out: Path) -> tuple[Path, list[str]]:
    """The folder of a job, which may stand before ids of videos, and the ids."""
    if ids and Path(ids[0]).is_dir():
        return _one_of(Path(ids[0]), out), list(ids[1:])
    return out, list(ids)


def _open(out: Path, url: str | None) -> Manifest:
    from reelbatch.jobs.manifest import Manifest

    return Manifest.in_folder(out, url, must_exist=True)


def _refuse_unknown(manifest: Manifest, ids: Sequence[str]) -> None:
    unknown = [id for id in ids if manifest.row(id) is None]
    if unknown:
        raise ValueError(f"no video has the id {', '.join(unknown)}; `reelbatch job export` lists all of them")
