"""What `tune` shows while it measures: a line that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.text import Text

from reelbatch.tune.results import Update
from reelbatch.wording import duration


@contextmanager
def display(console: Console) -> Iterator[Callable[[Update], None]]:
    """Gives a function that shows an update: what is done stays, what is going on is replaced by what comes next."""
    status = console.status("starting") if console.is_terminal else None

    def show(update: Update) -> None:
        line = update.text
        if update.left is not None:
            line += f" ({'at most' if update.at_most else 'about'} {duration(update.left)} left)"
        if status and not update.done:
            status.update(Text(line))
        else:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    with status or nullcontext():
        yield show
