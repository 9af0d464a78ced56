"""A job whose batch does not fit, in a process whose address space is really limited: tried at once, and by the engine.

    python benchmarks/real_limit.py

The child loads the bundled model, sets RLIMIT_AS to so much above what it holds then, and goes to work (Linux).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import psutil
import torch
import typer

from reelbatch import VideoRequest
from reelbatch.engine.engine import Engine
from reelbatch.engine.recovery import is_out_of_memory
from reelbatch.jobs.run import run
from reelbatch.models.checkpoint import DEMO_FOLDER, load
from reelbatch.video import places

SIDE = 512

Way = Literal["at once", "engine"]


def child(way: Way, above_mib: int, count: int, out: Path) -> None:
    engine = Engine(load(DEMO_FOLDER, "cpu", torch.float32), isolation="packed", max_batch_size=count)
    fields = {"height": SIDE, "width": SIDE, "frames": 1, "steps": 1, "true_cfg": 2.0, "negative_prompt": ""}
    requests = [VideoRequest(prompt="a large red circle", seed=i, id=f"r{i:02}", **fields) for i in range(count)]
    limit = psutil.Process().memory_info().vms + above_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if way == "at once":
        print(_at_once(engine, requests))
        return
    outcomes = list(run(engine, places(requests, out, engine.info)))
    errors = [str(outcome.error) for outcome in outcomes if outcome.error]
    print(f"{len(outcomes) - len(errors)} of {count} videos made", *errors, sep="; ")


def _at_once(engine: Engine, requests: list[VideoRequest]) -> str:
    samples = [engine._start(request.for_model(engine.limits)) for request in requests]
    try:
        engine._forward(samples)
    except Exception as error:
        return "out of memory" if is_out_of_memory(error) else repr(error)
    return "it fits"


def measure(way: Way, above_mib: int, count: int) -> tuple[str, list[str]]:
    """What the child said at its end, and its lines about memory on the way."""
    with tempfile.TemporaryDirectory() as out:
        words = [
            sys.executable,
            __file__,
            "--child",
            way,
            "--above",
            str(above_mib),
            "--count",
            str(count),
            "--out",
            out,
        ]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    said = [line for line in done.stderr.splitlines() if line.startswith("out of memory")]
    return done.stdout.strip().splitlines()[-1], said


def main(
    above: Annotated[int, typer.Option(help="MiB above what the loaded model takes.")] = 200,
    count: Annotated[int, typer.Option(help="Videos of 512×512, one frame, with classifier-free guidance.")] = 8,
    child_way: Annotated[str, typer.Option("--child", hidden=True)] = "",
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Runs the job both ways under the limit and prints what became of it."""
    if child_way:
        child("at once" if child_way == "at once" else "engine", above, count, out or Path())
        return
    for way in ("at once", "engine"):
        result, said = measure(way, above, count)
        print(f"{way}: {result}")
        for line in said:
            print(f"    {line}")


if __name__ == "__main__":
    typer.run(main)
