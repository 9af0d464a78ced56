"""What `tune` shows while it measures: a line that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.text import Text

from reelbatch.tune.results import Update
from reelbatch.wording import duration


class Display:
    """Shows updates: what is done stays, what is going on is replaced by what comes next."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = Status("starting", console=console) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def show(self, update: Update) -> None:
        line = update.text
        if update.left is not None:
            line += f" ({'at most' if update.at_most else 'about'} {duration(update.left)} left)"
        if self._status and not update.done:
            self._status.update(Text(line))
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
