"""The command line. Thin: it reads options, calls the rooms, and speaks to people. A module a command."""

from __future__ import annotations

import os
import signal
import sys

from reelbatch.cli import generate, job, model_convert, model_info, plan, train, tune  # in the order of --help
from reelbatch.cli.common import BAD_INPUT, INTERRUPTED, SOME_FAILED, app, console

__all__ = ["app", "generate", "job", "main", "model_convert", "model_info", "plan", "train", "tune"]


def main() -> None:
    """Runs the command line; every error is a line for the person, or a traceback with REELBATCH_DEBUG=1."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))  # where a command does not stop by itself
    try:
        app(prog_name="reelbatch")
    except Exception as error:
        if os.environ.get("REELBATCH_DEBUG"):
            raise
        message = str(error).strip() or type(error).__name__
        expected = isinstance(error, ValueError | OSError)
        kind = "" if expected else f" ({type(error).__name__}; REELBATCH_DEBUG=1 shows where)"
        console.print(f"error: {message}{kind}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT if expected else SOME_FAILED)
