"""An output folder for the tests of jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reelbatch import VideoRequest
from reelbatch.engine.engine import Engine
from reelbatch.jobs.job import Job, Settings, open_job
from reelbatch.jobs.manifest import Manifest
from reelbatch.jobs.worker import Outcome, Worker

STEPS = 4


def asked(engine: Engine, count: int = 6, **fields: Any) -> list[VideoRequest]:
    sizes = {"height": 32, "width": 32, "frames": 5, "steps": STEPS}
    made = [VideoRequest(prompt=f"a cat {i}", seed=i, **{**sizes, **fields}) for i in range(count)]
    return [request.for_model(engine.limits) for request in made]


class Folder:
    """An output folder, and jobs of one engine in it."""

    def __init__(self, path: Path, engine: Engine, url: Any = None) -> None:
        self.path, self.engine = path, engine
        path.mkdir(exist_ok=True)
        self.manifest = Manifest.in_folder(path, url)

    def open(self, requests: list[VideoRequest], mode: str = "resume", **changed: Any) -> Job:
        overwrite = changed.pop("overwrite", False)
        settings = Settings(
            **{
                **dict.fromkeys(("model", "weights", "attention"), "m"),
                "device": "cpu",
                "dtype": "float32",
                "isolation": self.engine.config.isolation,
                **changed,
            }
        )
        return open_job(self.manifest, self.path, requests, settings, mode=mode, overwrite=overwrite)

    def run(self, job: Job, **options: Any) -> Iterator[Outcome]:
        worker = Worker(self.engine, self.manifest, job.number, self.path, weights="w", **options)
        return worker.outcomes()

    def make(self, requests: list[VideoRequest], **options: Any) -> list[Outcome]:
        return list(self.run(self.open(requests), **options))

    def states(self) -> dict[str, str]:
        return {row.prompt: row.state for row in self.manifest.rows()}

    def frames(self) -> dict[str, str | None]:
        return {row.prompt: row.frames_sha256 for row in self.manifest.rows()}

    def files(self) -> set[str]:
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()}
