"""A job whose batch does not fit, in a process whose address space is really limited: tried at once, and by the engine.

    python benchmarks/real_limit.py

The child loads the bundled model, sets RLIMIT_AS to so much above what it holds then, and goes to work (Linux). No
files are written: the threads of the video encoder would take address space of their own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import Annotated, Literal

import psutil
import torch
import typer

from reelbatch import VideoRequest
from reelbatch.device import is_out_of_memory
from reelbatch.engine.engine import Engine, Failure
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.load import load

SIDE = 512

Way = Literal["at once", "engine"]


def child(way: Way, above_mib: int, count: int, side: int) -> None:
    engine = Engine(load(DEMO_FOLDER, "cpu", torch.float32), isolation="packed", max_batch_size=count)
    fields = {"height": side, "width": side, "frames": 1, "steps": 1, "true_cfg": 2.0, "negative_prompt": ""}
    requests = [VideoRequest(prompt="a large red circle", seed=i, id=f"r{i:02}", **fields) for i in range(count)]
    limit = psutil.Process().memory_info().vms + above_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if way == "at once":
        print(_at_once(engine, requests))
        return
    for request in requests:
        engine.submit(request)
    errors = [str(end.error) for end in engine.run() if isinstance(end, Failure)]
    print(f"{count - len(errors)} of {count} videos made", *errors, sep="; ")


def _at_once(engine: Engine, requests: list[VideoRequest]) -> str:
    samples = [engine._start(request.for_model(engine.limits)) for request in requests]
    try:
        engine._forward(samples)
    except Exception as error:
        return "out of memory" if is_out_of_memory(error) else repr(error)
    return "it fits"


def measure(way: Way, above_mib: int, count: int, side: int = SIDE) -> tuple[str, list[str]]:
    """What the child said at its end, and its lines about memory on the way."""
    options = {"--child": way, "--above": above_mib, "--count": count, "--side": side}
    words = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    said = [line for line in done.stderr.splitlines() if line.startswith("out of memory")]
    return done.stdout.strip().splitlines()[-1], said


def main(
    above: Annotated[int, typer.Option(help="MiB above what the loaded model takes.")] = 200,
    count: Annotated[int, typer.Option(help="Videos of one frame, with classifier-free guidance.")] = 8,
    side: Annotated[int, typer.Option(help="Pixels on a side.")] = SIDE,
    child_way: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Runs the job both ways under the limit and prints what became of it."""
    if child_way:
        child("at once" if child_way == "at once" else "engine", above, count, side)
        return
    for way in ("at once", "engine"):
        result, said = measure(way, above, count, side)
        print(f"{way}: {result}")
        for line in said:
            print(f"    {line}")


if __name__ == "__main__":
    typer.run(main)
