"""Checkpoints of a run: saved under another name and renamed, so that none is half there; the last ones are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from reelbatch.outside_json import read_object

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
        made_with: settings that a run that goes on from here must share.
    """

    step: Annotated[int, Field(ge=0)] = 0
    sample: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clips: str = ""
    made_with: dict[str, Any] = field(default_factory=dict)


_POSITION = TypeAdapter(Position)


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
        anywhere: Callable[[bool], bool] = bool,
    ) -> Path:
        """Writes a checkpoint by `write`, which fills a folder, and removes old ones, and later ones: a run that went
        on from an earlier step has left them behind.

        Args:
            anywhere: whether what it is given is true on any device; so all go on, or none.

        Raises:
            OSError: if it could not be written; what was there before is as it was.
        """
        path = self.folder / PATTERN.format(position.step)
        part = self.folder / f".{path.name}.part"

        def begin() -> None:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

        def finish() -> None:
            (part / STATE).write_text(json.dumps(asdict(position)) + "\n", encoding="utf-8")
            if path.exists():
                shutil.rmtree(path)
            part.rename(path)

        for work, on_all in ((begin, False), (lambda: write(part), True), (finish, False)):
            failed: Exception | None = None
            try:
                if main or on_all:
                    work()
            except Exception as error:  # safetensors and torch.save wrap what the file system said
                failed = error
            if anywhere(failed is not None):
                if main:
                    shutil.rmtree(part, ignore_errors=True)
                reason = " ".join(str(failed).split()) if failed else "another device could not write its part"
                raise OSError(f"{path}: cannot be written: {reason}") from failed
        if main:
            there = self.all()
            now = there.index(path) + 1
            for other in [*there[:now][: -self.keep], *there[now:]]:
                shutil.rmtree(other, ignore_errors=True)
        return path

    def find(self, asked: str) -> Path | None:
        """The checkpoint that `resume` names; None for "auto" where there is none yet. Raises CheckpointError."""
        if asked == "auto":
            return self.last
        path = Path(asked).expanduser()
        if (path / STATE).is_file():
            return path
        there = ", ".join(str(checkpoint) for checkpoint in self.all()) or "none"
        raise CheckpointError(f"resume={asked}: is no checkpoint (a folder step-… with {STATE}); there are: {there}")


def read_position(checkpoint: Path) -> Position:
    """Raises CheckpointError if it cannot be read."""
    path, remedy = checkpoint / STATE, "resume from another checkpoint"
    try:
        return _POSITION.validate_json(json.dumps(read_object(path, remedy)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(f"{path}: cannot be read ({reason}); {remedy}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
