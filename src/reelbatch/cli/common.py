"""What all commands share: the app, how they speak to people, and how they are stopped."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from reelbatch import __version__
from reelbatch.wording import printable

SOME_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Many HunyuanVideo videos in one run, each the video you would have got alone.",
)


class SafeConsole(Console):
    """A console that shows foreign text (prompts, file names, errors) and never lets it act on the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


console = SafeConsole(stderr=True)

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
    """Gives a list that is no longer empty after the first Ctrl-C or SIGTERM; a second one stops at once.

    SIGTERM is what cluster schedulers, service managers and `kill` send some seconds before they end a process.
    """
    interrupted: list[int] = []

    def stop(signum: int, frame: object) -> None:
        if interrupted:  # at once, without waiting for threads: whatever is on the disk is whole
            console.show_cursor(True)
            os._exit(INTERRUPTED)
        interrupted.append(signum)
        say("stopping after this step (Ctrl-C again stops at once)")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings meant for people come as a line, without the place in the code; those of libraries are dropped."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("reelbatch"):
            say(f"warning: {message}", style="yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def check_writable(out: Path, what: str = "videos") -> None:
    """Raises OSError now rather than after the first video has been computed. Creates nothing.

    What is tried is the folder, or where it is not there the nearest one above it.
    """
    try:
        for folder in (out, *out.absolute().parents):
            try:
                about = folder.stat()
            except FileNotFoundError:
                if not folder.is_symlink():
                    continue
                raise FileNotFoundError(f"{folder} is a link to what is not there") from None
            if not S_ISDIR(about.st_mode):
                raise NotADirectoryError(f"{folder} is a file; name a folder")
            TemporaryFile(dir=folder).close()
            return
    except OSError as error:
        raise OSError(f"--out {out}: no {what} can be written there: {error.strerror or error}") from error


@contextmanager
def nothing_begun() -> Iterator[None]:
    """Within, Ctrl-C ends the command with a line that says so; nothing may have been written yet."""
    interrupted = False

    def stop(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        sys.exit(INTERRUPTED)

    def quiet(ignored: sys.UnraisableHookArgs) -> None:
        if not interrupted:  # else a destructor was at work when the exit was raised
            before[1](ignored)

    before, sys.unraisablehook = (signal.signal(signal.SIGINT, stop), sys.unraisablehook), quiet
    try:
        yield
    except BaseException:
        if not interrupted:
            raise
    finally:
        signal.signal(signal.SIGINT, before[0])
        sys.unraisablehook = before[1]
    if interrupted:  # also where a library swallowed the exit
        say("stopped before anything was begun; nothing is left behind")
        sys.exit(INTERRUPTED)


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
