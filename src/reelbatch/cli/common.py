"""What all commands share: the app, how they speak to people, and how they are stopped."""

from __future__ import annotations

import os
import shlex
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer
from rich.console import Console

from reelbatch import __version__

SOME_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Many HunyuanVideo videos in one run, each the video you would have got alone.",
)
console = Console(stderr=True)

REQUEST = "What each video is (a prompt file's line may say otherwise)"
ENGINE = "How it runs"
OUTPUT = "What comes out"
MEASURED = "What is measured"
BOUNDS = "What it keeps to"

# What libraries say while they are imported is not for those who run commands.
for _library in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
    os.environ.setdefault(_library, "error")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reelbatch {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def command_again(context: typer.Context, **changed: Any) -> str:
    """The command that is running, as a person types it.

    Args:
        changed: values of parameters that are to be others; None leaves an option out.
    """
    words = ["reelbatch", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        value = changed.get(name, context.params[name])
        if value is None or value is False or value == parameter.default:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [parameter.opts[0]] if one is True else [parameter.opts[0], str(one)]
    return shlex.join(words)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Gives a list that is no longer empty after the first Ctrl-C; a second one stops at once."""
    interrupted: list[int] = []

    def stop(signum: int, frame: object) -> None:
        if interrupted:  # at once, without waiting for threads: whatever is on the disk is whole
            console.show_cursor(True)
            os._exit(INTERRUPTED)
        interrupted.append(signum)
        say("stopping after this step (Ctrl-C again stops at once)")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings meant for people come as a line, without the place in the code; those of libraries are dropped."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("reelbatch"):
            say(f"warning: {message}", style="yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def check_writable(out: Path) -> None:
    """Raises OSError now rather than after the first video has been computed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"--out {out}: no videos can be written there: {error.strerror}") from error


def quiet_libraries() -> None:
    """Diffusers and transformers show no bars and no warnings of their own from now on: a command shows its own.

    Loading is quiet by itself; this is for what they say while they work, and for the modules that a command imports
    late.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
