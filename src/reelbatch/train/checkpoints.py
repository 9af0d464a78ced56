"""Checkpoints of a run: written aside and renamed, so that what has its name is whole; the last ones are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

STATE = "reelbatch.json"
PATTERN = "step-{:07d}"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or gone on from."""


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps that are behind it.
        sample: number of the next sample to be drawn.
        seconds: time spent in steps.
        clips: a hash of the clips that the numbers are of, in their order.
    """

    step: int = 0
    sample: int = 0
    seconds: float = 0.0
    clips: str = ""


class Checkpoints:
    """The checkpoints in one folder. Only the main process may `save`; the others call it with `main=False`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE}"))

    @property
    def last(self) -> Path | None:
        return next(reversed(self.all()), None)

    def save(
        self,
        position: Position,
        write: Callable[[Path], None],
        *,
        main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> Path:
        """Writes a checkpoint by `write`, which fills a folder, and removes old ones.

        Raises:
            OSError: if it could not be written; what was there before is as it was.
        """
        path = self.folder / PATTERN.format(position.step)
        part = self.folder / f".{path.name}.part"
        try:
            if main:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            wait()
            write(part)
            wait()
            if main:
                (part / STATE).write_text(json.dumps(asdict(position)) + "\n", encoding="utf-8")
                if path.exists():
                    shutil.rmtree(path)
                part.rename(path)
        except Exception as error:
            if main:
                shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, OSError):
                raise
            # safetensors and torch.save wrap what the file system said
            raise OSError(f"{path}: cannot be written: {' '.join(str(error).split())}") from error
        wait()
        if main:
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return path

    def find(self, asked: str) -> Path | None:
        """The checkpoint that `resume` names; None for "auto" where there is none yet. Raises CheckpointError."""
        if asked == "auto":
            return self.last
        path = Path(asked).expanduser()
        if (path / STATE).is_file():
            return path
        there = ", ".join(str(found) for found in self.all()) or "none"
        raise CheckpointError(f"resume={asked}: is no checkpoint (a folder step-… with {STATE}); there are: {there}")


def read_position(checkpoint: Path) -> Position:
    """Raises CheckpointError if it cannot be read."""
    try:
        return Position(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / STATE}: cannot be read ({error}); resume from another checkpoint"
        ) from None
