"""A job killed again and again: nothing is lost, nothing is made twice, and every frame is the undisturbed one's.

    python benchmarks/kill_resume.py                          # 100 kills of one process
    python benchmarks/kill_resume.py --processes 4 --kills 30 # four share the manifest, one of them is killed each time

The same command is started, killed with SIGKILL at a random moment, and started again; at the end it runs through. Its
processes are forked from one that has everything imported, so that kills fall into the job and not into its start.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from reelbatch.device import device_name
from reelbatch.jobs.manifest import FILE

RESULTS = Path(__file__).parent / "results"
PROMPTS = [f"a {size} {color} circle" for size in ("small", "large") for color in ("red", "green", "blue", "yellow")]


@dataclass(frozen=True)
class Found:
    """What the folder holds after all. rows: (state, file, sha256, frames_sha256, attempts) of every video.

    seen: states that rows were in at the moment of each kill.
    """

    kills: int
    rows: list[tuple[str, str, str, str, int]]
    files: set[str]
    hashes: dict[str, str]
    seen: Counter[str]

    def problems(self, undisturbed: Found) -> list[str]:
        """What is wrong; none if every video is there once, whole, and as in the undisturbed job."""
        told = [f"{file} is {state}" for state, file, *_ in self.rows if state != "done"]
        told += [
            f"{file} is not the file that was recorded"
            for _, file, sha, *_ in self.rows
            if self.hashes.get(file) != sha
        ]
        want = {file: frames for _, file, _, frames, _ in undisturbed.rows}
        got = {file: frames for _, file, _, frames, _ in self.rows}
        told += [f"{file} has other frames" for file in want if got.get(file) != want[file]]
        told += [f"{file} is too many" for file in sorted(self.files - undisturbed.files)]
        return told


def read(folder: Path, kills: int = 0, seen: Counter[str] | None = None) -> Found:
    import hashlib

    with closing(sqlite3.connect(folder / FILE)) as database:
        found = list(database.execute("SELECT state, file, sha256, frames_sha256, attempts FROM video ORDER BY number"))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    files -= {path.name for path in folder.glob(".*.part")}  # a sheet or report that was being drawn: an hour's grace
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files if name.endswith(".mp4")}
    return Found(kills, found, files, hashes, seen or Counter())


def start(command: Sequence[str], log: Path) -> int:
    """The command in a process of its own, forked with everything imported; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        from reelbatch.cli import main

        sys.argv = ["reelbatch", *command]
        main()
        os._exit(0)
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    finally:
        os._exit(1)


def ended(process: int) -> int | None:
    """The exit code of a process, or None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def run_through(command: Sequence[str], log: Path) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(start(command, log), 0)[1])
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()}")


def states(folder: Path) -> list[str]:
    try:
        with closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True, timeout=30)) as database:
            return [state for (state,) in database.execute("SELECT state FROM video")]
    except sqlite3.Error:  # there is no manifest yet
        return []


def kill_and_resume(
    command: Sequence[str], folder: Path, log: Path, *, kills: int, longest: float, processes: int, seed: int
) -> Found:
    """Runs the command, killing it at random moments up to `longest` seconds after it was started, and then through."""
    for needed in ("jobs.worker", "jobs.report", "tune.profiles"):
        import_module(f"reelbatch.{needed}")  # before the processes fork
    draw, seen, done = random.Random(seed), Counter[str](), 0
    running: list[int] = []
    while done < kills:
        running = [process for process in running if ended(process) is None]
        found = states(folder)
        if found and all(state == "done" for state in found):
            break
        while len(running) < processes:
            running.append(start(command, log))
        time.sleep(draw.uniform(0, longest))
        victim = running.pop(draw.randrange(len(running)))
        if ended(victim) is None:
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            done += 1
            seen.update(set(states(folder)))
    for process in running:
        os.waitpid(process, 0)
    run_through(command, log)
    return read(folder, done, seen)


def job_command(prompts: Path, out: Path, model: str, copies: int, extra: Sequence[str] = ()) -> list[str]:
    words = ["job", "run", str(prompts), "--out", str(out), "--copies", str(copies), "--model", model]
    return [*words, "--height", "32", "--width", "32", "--frames", "5", "--steps", "4", "--batch-size", "4", *extra]


def table(found: Found, processes: int, seconds: float) -> str:
    attempts = sum(attempts for *_, attempts in found.rows)
    return f"""| | |
|---|---|
| processes on the manifest | {processes} |
| kills (SIGKILL) | {found.kills} |
| videos | {len(found.rows)} |
| done, their files right | {sum(row[0] == "done" for row in found.rows)} |
| begun in all, as the killed ones were begun again | {attempts} |
| kills while a video was running | {found.seen["running"]} |
| kills with some videos done | {found.seen["done"]} |
| seconds in all | {seconds:.0f} |
"""


def main(
    kills: Annotated[int, typer.Option(help="At random moments.")] = 100,
    processes: Annotated[int, typer.Option(help="That share the manifest.")] = 1,
    copies: Annotated[int, typer.Option(help="Of each of eight prompts.")] = 100,
    longest: Annotated[float, typer.Option(help="Seconds that a process lives at most before it is killed.")] = 3.0,
    seed: int = 0,
    model: str = "demo",
    save: Annotated[bool, typer.Option(help="Keep the table under benchmarks/results/.")] = True,
) -> None:
    """Prints what was found, and ends with 1 if anything is wrong."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        prompts = Path(root, "prompts.txt")
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
        log, disturbed, calm = (Path(root, name) for name in ("log", "disturbed", "calm"))
        run_through(job_command(prompts, calm, model, copies), log)
        found = kill_and_resume(
            job_command(prompts, disturbed, model, copies, ["--checkpoint-every", "2"]),
            disturbed,
            log,
            kills=kills,
            longest=longest,
            processes=processes,
            seed=seed,
        )
        problems = found.problems(read(calm))
    text = table(found, processes, time.monotonic() - started)
    print(text)
    for problem in problems:
        print(problem)
    if save and not problems:
        name = f"kill_resume_{processes}"
        head = f"# A job killed {found.kills} times\n\n{date.today()}, {device_name('cpu')}"
        told = "every row done, every file right, none too many, all frames those of an undisturbed job"
        (RESULTS / f"{name}.md").write_text(f"{head}: {told}.\n\n{text}", encoding="utf-8")
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    typer.run(main)
