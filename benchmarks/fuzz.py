"""Files and requests from outside, broken in thousands of ways: each a clear error or a right result.

    python benchmarks/fuzz.py    # 10,000 models, LoRAs and prompt files, 100,000 requests
    python benchmarks/fuzz.py --models 500 --loras 0 --prompts 0 --requests 0 --seed 3

A case is made from the seed and its number, and runs in a forked process that may take 2 GiB more than it began with.
It ends "refused" (by the package's own error), "right" (what was given is what came out), or in a failure: "wrong" (an
unclear message, or another result), "other" (another exception), "executed" (a planted pickle ran), "slow" (over 10 s),
"memory", "died".
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fuzz_cases import Case, Loras, Models, Planted, Prompts, Wrong, one_request

from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.load import load

SECONDS, BYTES, HUNG = 10.0, 2 * 2**30, 120
"""Most processor time and memory of a case, and the time after which its process is killed."""
ENDS = ("right", "refused", "wrong", "other", "executed", "slow", "memory", "died")


def fuzz(
    make: Callable[[Path, bytes], Case], count: int, seed: int, kind: str, log: Callable[[str], None]
) -> Counter[str]:
    """Runs the cases; gives how many ended how. Failures are logged with the number that makes them again."""
    counts: Counter[str] = Counter()
    number = 0
    while number < count:
        with tempfile.TemporaryDirectory() as work:
            number = _in_process(make, Path(work), range(number, count), seed, kind, counts, log)
    return counts


def _in_process(
    make: Callable[[Path, bytes], Case],
    work: Path,
    numbers: range,
    seed: int,
    kind: str,
    counts: Counter[str],
    log: Callable[[str], None],
) -> int:
    """Forks, and reads a line of each case; gives the number of the case to go on with in another process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _serve(make, work, numbers, seed, kind, writer)
    os.close(writer)
    number, rest, failed, silent = numbers.start, b"", False, 0
    try:
        while number < numbers.stop:
            ready = bool(select.select([reader], [], [], 1.0)[0])
            silent = 0 if ready else silent + 1  # seconds in which this process ran: all may be stopped for a while
            if not ready and silent < HUNG:
                continue
            if not ready:
                os.kill(child, signal.SIGKILL)
                counts["slow"] += 1
                log(f"{kind} {number} (seed {seed}): no end after {HUNG} s")
                return number + 1
            data = os.read(reader, 2**16)
            if not data and failed:  # what a failure leaves behind is none of the next case's
                return number
            if not data:
                counts["died"] += 1
                log(f"{kind} {number} (seed {seed}): the process died")
                return number + 1
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                result, _, reason = line.decode().partition(" ")
                counts[result] += 1
                if failed := result not in ENDS[:2]:
                    log(f"{kind} {number} (seed {seed}): {result}: {reason}")
                number += 1
        return number
    finally:
        os.close(reader)
        os.waitpid(child, 0)


def _serve(make: Callable[[Path, bytes], Case], work: Path, numbers: range, seed: int, kind: str, writer: int) -> None:
    """The child: never returns."""
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  libraries warn of what they are given
        mark = work / "executed"
        case = make(work, pickle.dumps(Planted(mark)))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        for number in numbers:
            started = time.process_time()
            try:
                result = case(random.Random(f"{seed} {kind} {number}"))
            except MemoryError:
                result = "memory"
            except Exception as error:
                reason = " ".join(ascii(f"{type(error).__name__}: {error}").split())[:300]
                memory = "memory" in reason.lower() and isinstance(error, RuntimeError)
                result = f"{'memory' if memory else 'wrong' if isinstance(error, Wrong) else 'other'} {reason}"
            if time.process_time() - started > SECONDS:
                result = f"slow {time.process_time() - started:.0f} s, then {result}"
            if mark.exists():
                result = "executed"
                mark.rmdir()
            os.write(writer, f"{result}\n".encode())
            if result not in ENDS[:2]:
                return
    finally:
        os._exit(0)


def main(
    models: Annotated[int, typer.Option(help="Mutated model folders.")] = 10_000,
    loras: Annotated[int, typer.Option(help="Mutated LoRA files.")] = 10_000,
    prompts: Annotated[int, typer.Option(help="Mutated prompt files.")] = 10_000,
    requests: Annotated[int, typer.Option(help="Random requests.")] = 100_000,
    seed: Annotated[int, typer.Option(help="All cases are made of it and their numbers.")] = 0,
    folder: Annotated[Path, typer.Option(help="The model folder that is mutated.")] = DEMO_FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Count how files and requests from outside end; the exit code is 1 if any is neither refused nor right."""
    family: Any = load(folder, "cpu", "float32").family
    kinds: dict[str, tuple[int, Callable[[Path, bytes], Case]]] = {
        "model": (models, partial(Models, folder)),
        "lora": (loras, partial(Loras, family.transformer)),
        "prompts": (prompts, Prompts),
        "request": (requests, lambda work, planted: one_request),
    }
    results = {}
    for kind, (count, make) in kinds.items():
        started = time.monotonic()
        counts = fuzz(make, count, seed, kind, lambda line: typer.echo(line, err=True))
        results[kind] = {name: counts[name] for name in ENDS}
        if not as_json:
            shown = ", ".join(f"{counts[name]} {name}" for name in ENDS)
            typer.echo(f"{count} {kind}: {shown} ({time.monotonic() - started:.0f} s)")
    if as_json:
        typer.echo(json.dumps({"seed": seed, **results}))
    failures = sum(number for counts in results.values() for name, number in counts.items() if name not in ENDS[:2])
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
