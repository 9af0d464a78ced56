"""Exceptions and Ctrl-C raised at random moments, from callbacks, text encoder, decoder and the writing of files.

    python benchmarks/interrupts.py                   # 100 in an engine, 100 in a job
    python benchmarks/interrupts.py --raises 1000     # of both kinds together, about four minutes

One thing raises at each random moment: an exception of an ordinary kind, or KeyboardInterrupt, where a signal's handler
would raise it. Whoever drives the engine goes on, as a person would who starts the command again. At the end every
request must have ended exactly once: with the frames that it has alone or, where its own text, decode or file raised an
ordinary exception, with that failure.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from reelbatch import Video, VideoRequest
from reelbatch.engine.engine import Engine, Failure
from reelbatch.jobs.job import Settings, open_job
from reelbatch.jobs.manifest import Manifest, State
from reelbatch.jobs.worker import Worker
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.video import Aside

REQUESTS = 6


OWN = ("encode", "decode", "write")
"""Places where an exception is the request's own failure."""


class Broken(Exception):
    """What is raised."""


@dataclass
class Counts:
    """raised: by place and kind. failed: requests that ended with what was raised in their own work."""

    raised: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    failed: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0

    @property
    def total(self) -> int:
        return sum(self.raised.values())

    @property
    def bad(self) -> int:
        return self.lost + self.doubled + self.wrong

    def add(self, ends: list[tuple[str, str | None, str]], alone: dict[str, str]) -> None:
        """ends: ids, the hash of their frames or None, and the error."""
        self.requests += len(alone)
        times = Counter(id for id, *_ in ends)
        self.lost += len(alone.keys() - times.keys())
        self.doubled += sum(number - 1 for number in times.values())
        for id, frames, error in ends:
            own = frames is None and error.rpartition(" ")[2] in OWN and "KeyboardInterrupt" not in error
            self.failed += own
            self.wrong += not own and frames != alone.get(id)


class Raiser:
    """Raises at random calls, up to `left` times."""

    def __init__(self, draw: random.Random, left: int, counts: Counts) -> None:
        self.draw, self.left, self.counts = draw, left, counts

    def __call__(self, place: str, often: float) -> None:
        if self.left and self.draw.random() < often:
            self.left -= 1
            error = self.draw.choice([Broken, KeyboardInterrupt])
            self.counts.raised[f"{place}: {error.__name__}"] += 1
            raise error(place)

    def around(self, place: str, work: Callable[..., Any], often: float) -> Callable[..., Any]:
        """Before or after the work."""

        def raising(*args: Any, **options: Any) -> Any:
            self(place, often / 2)
            result = work(*args, **options)
            self(place, often / 2)
            return result

        return raising


def requests(draw: random.Random) -> list[VideoRequest]:
    return [
        VideoRequest(prompt="a large red circle", seed=i, id=f"r{i}", height=32, width=32, frames=1, steps=1 + i % 3)
        for i in draw.sample(range(REQUESTS), REQUESTS)
    ]


@contextmanager
def faults(model: Model, raiser: Raiser) -> Iterator[None]:
    text, decoder = model.family.text, model.family.decoder
    with (
        patch.object(text, "encode", raiser.around("encode", text.encode, 0.08)),
        patch.object(decoder, "decode", raiser.around("decode", decoder.decode, 0.08)),
    ):
        yield


def listen(engine: Engine, raiser: Raiser) -> None:
    """Sets callbacks that raise."""

    def should_cancel(_: str) -> bool:
        raiser("should_cancel", 0.02)
        return False

    engine.on_progress = lambda _: raiser("on_progress", 0.04)
    engine.should_cancel = should_cancel
    engine.subscribe(lambda _: raiser("listener", 0.02))


def in_an_engine(model: Model, alone: dict[str, str], draw: random.Random, raises: int, counts: Counts) -> None:
    """One engine, driven on after everything that it raises."""
    engine = Engine(model, max_batch_size=draw.choice([1, 2, 4]), decode_beside=draw.choice([0, 2]))
    raiser = Raiser(draw, raises, counts)
    listen(engine, raiser)
    ends: list[Video | Failure] = []
    with faults(model, raiser):
        for request in requests(draw):
            engine.submit(request)
        while engine.busy:
            with suppress(Broken, KeyboardInterrupt):
                ends += engine.step()
    results = [
        (end.request.id, end.frames_sha256, "")
        if isinstance(end, Video)
        else (end.request.id, None, f"{type(end.error).__name__} {end.error}")
        for end in ends
    ]
    counts.add(results, alone)


def in_a_job(model: Model, alone: dict[str, str], draw: random.Random, raises: int, counts: Counts) -> None:
    """A job that is opened anew, with a new engine, after everything that it raises."""
    raiser = Raiser(draw, raises, counts)
    settings = Settings("m", "w", "cpu", "float32", "auto", "exact")
    with tempfile.TemporaryDirectory() as root, faults(model, raiser):
        folder = Path(root)
        manifest = Manifest.in_folder(folder)
        wanted = [request.for_model(model.limits) for request in requests(draw)]
        put_in_place = raiser.around("write", Aside.put_in_place, 0.15)
        with patch.object(Aside, "put_in_place", lambda self, *args: put_in_place(self, *args)):
            while True:
                job = open_job(manifest, folder, wanted, settings, mode="resume")
                if not job.open:
                    break
                engine = Engine(model, max_batch_size=draw.choice([1, 2, 4]))
                listen(engine, raiser)
                every = draw.choice([1, None])
                worker = Worker(engine, manifest, job.number, folder, weights="w", checkpoint_every=every)
                with suppress(Broken, KeyboardInterrupt):
                    for _ in worker.outcomes():
                        raiser("outcome", 0.04)
        rows = manifest.rows()
        ends = [(row.id, row.frames_sha256 if row.state == State.DONE else None, row.error or "") for row in rows]
        files = len(list(folder.glob("*.mp4")))
        done = sum(row.state == State.DONE for row in rows)
        placed = [row for row in rows if row.state == State.FAILED and (folder / row.file).exists()]
        counts.doubled += max(0, files - done - len(placed))
        counts.lost += max(0, done + len(placed) - files)
        counts.add(ends, alone)
        manifest.close()


def run(model: Model, raises: int, seed: int, jobs: bool) -> Counts:
    draw, counts = random.Random(seed), Counts()
    alone = {}
    for request in requests(random.Random(0)):
        (video,) = Engine(model).generate([request])
        alone[request.id] = video.frames_sha256
    work = in_a_job if jobs else in_an_engine
    while counts.total < raises and not counts.bad:
        work(model, alone, draw, raises - counts.total, counts)
    return counts


def main(
    raises: Annotated[int, typer.Option(help="In all, half in an engine and half in a job.")] = 200,
    seed: int = 0,
    model: str = "demo",
) -> None:
    """Prints what was seen, and ends with 1 if any request was lost, ended twice or has other frames."""
    import torch

    from reelbatch.loading.hub import resolve

    print(f"expected: about {raises * 0.2 / 60:.0f} minutes on two cores", flush=True)
    loaded = load(resolve(model), "cpu", torch.float32)
    bad = 0
    for jobs in (False, True):
        started = time.monotonic()
        counts = run(loaded, raises // 2 + (jobs and raises % 2), seed, jobs)
        bad += counts.bad
        print(
            f"{'a job' if jobs else 'an engine'}: raised {counts.total} times over {counts.requests} requests, "
            f"{counts.failed} of which failed for it: lost {counts.lost}, doubled {counts.doubled}, "
            f"wrong {counts.wrong}; {time.monotonic() - started:.0f} s"
        )
        print("  " + ", ".join(f"{what} {number}" for what, number in sorted(counts.raised.items())), flush=True)
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
