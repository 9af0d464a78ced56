"""Jobs whose processes are killed, ended and stopped at random moments, and jobs that are started three times at once.

    python benchmarks/kills.py                              # 100 signals over 1, 2 and 4 processes, and 20 races
    python benchmarks/kills.py --kills 1000 --races 100     # about 70 minutes
    python tests/tiny15.py FOLDER && python benchmarks/kills.py --images --lines 100 --copies 1 --model FOLDER

The same `job run` is started in one, two or four processes; random ones get SIGKILL, SIGTERM, or SIGSTOP and later
SIGCONT, and others are started in their places. At the end every video must be there once (nothing lost, nothing
doubled), be the file that the manifest has, and have the frames that it has alone: those of a job with one video a
batch, that nothing disturbed. Processes are forked from one that has everything imported, so that signals fall into the
job and not into its start. Leases are shorter than usual, so that some run out while a process is stopped.
With `--images`, for HunyuanVideo 1.5, prompts, prompts with words in quotes and prompts with images of different sizes
take turns.
"""

from __future__ import annotations

import hashlib
import json
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
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

FILE = "manifest.sqlite"
COLORS = ("red", "green", "blue", "yellow")
PROMPTS = [f"a {size} {color} circle" for size in ("small", "large") for color in COLORS]
SIZE = ("--height", "64", "--width", "64")
STOPPED = 130  # exit code of a command that SIGTERM asked to save its state and stop
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
LEASE, BEAT, LONGEST_STOP = 2.0, 0.4, 4.0
"""Seconds: of a lease, between two beats, and for which a process is stopped at most."""
IN_THE_WORK = 0.8
"""Share of the signals that wait until a video runs."""
NEEDED = ("cli", "jobs.worker", "jobs.report", "jobs.display", "jobs.prompts", "tune.profiles", "engine.engine")


@dataclass
class Counts:
    """What was seen.

    Attributes:
        in_the_work: signals while a video ran.
        given_up: videos that failed, as the rule says, since three processes died in a row without a step gained; they
            were put back in line.
        crashed: processes that ended by themselves with an error.
    """

    signals: Counter[str] = field(default_factory=Counter)
    videos: int = 0
    attempts: int = 0
    in_the_work: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    given_up: int = 0
    crashed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return sum(self.signals.values())

    def fault(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.problems.append(f"{kind}: {what}")


def prepare() -> None:
    """Imports everything, and shortens the leases of all processes that are forked from here."""
    for name in NEEDED:
        import_module(f"reelbatch.{name}")
    from reelbatch.jobs import heartbeat, leases, worker

    leases.LEASE_SECONDS, heartbeat.BEAT_SECONDS, worker.BEAT_SECONDS = LEASE, BEAT, BEAT
    worker.OTHERS_SECONDS = BEAT


class Process:
    """A forked process that runs a command. begin: it waits until this end of a pipe is closed."""

    def __init__(self, command: Sequence[str], log: Path, begin: tuple[int, int] | None = None) -> None:
        self.log, self.code, self.stopped_until = log, None, 0.0
        self.code: int | None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            if begin is not None:
                os.close(begin[1])
                os.read(begin[0], 1)
            from reelbatch.cli import main

            sys.argv = ["reelbatch", *command]
            main()
            os._exit(0)
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        finally:
            os._exit(1)

    def running(self) -> bool:
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code is None

    def wait(self) -> int:
        if self.running():
            os.kill(self.pid, signal.SIGCONT)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code or 0

    def send(self, name: str, seconds: float) -> None:
        """seconds: for which it is stopped."""
        os.kill(self.pid, SIGNALS[name])
        if name == "STOP":
            self.stopped_until = time.monotonic() + seconds
        else:
            os.kill(self.pid, signal.SIGCONT)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def go_on(self) -> None:
        """Continues it, if its time has come."""
        if self.stopped_until and time.monotonic() >= self.stopped_until and self.running():
            os.kill(self.pid, signal.SIGCONT)
            self.stopped_until = 0.0


class Job(NamedTuple):
    """What is asked for.

    Attributes:
        extra: further options.
    """

    prompts: Path
    model: str
    extra: tuple[str, ...]

    def command(self, out: Path, copies: int, batch: int, *extra: str) -> list[str]:
        words = ["job", "run", str(self.prompts), "--out", str(out), "--copies", str(copies), "--model", self.model]
        same = ["--device", "cpu", "--frames", "5", "--steps", "4", "--dtype", "float32", "--batch-size", str(batch)]
        return [*words, *same, *self.extra, *extra]


def write_prompts(folder: Path, count: int) -> Path:
    """So many lines, in a file."""
    lines = [f"{PROMPTS[number % len(PROMPTS)]}{' again' * (number // len(PROMPTS))}" for number in range(count)]
    file = folder / "prompts.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def write_mixed_prompts(folder: Path, count: int) -> Path:
    """So many lines, in a file: prompts, prompts with words in quotes, and prompts with an image, in turn."""
    import PIL.Image

    lines = []
    for number in range(count):
        prompt = f"a {COLORS[number % len(COLORS)]} sign {number}"
        line: dict[str, object] = {"prompt": prompt, "seed": number, "guidance": 1 + number % 4}
        if number % 3 == 0:
            line |= {"frames": (1, 5, 9)[number // 3 % 3], "negative_prompt": "a circle"}
        elif number % 3 == 1:
            line["prompt"] = f'{prompt} that says "stop {number}" and “go”'
        else:
            line["image"] = f"{number}.png"
            size = (16 + 7 * (number % 11), 16 + 5 * (number % 13))
            PIL.Image.effect_noise(size, 40 + number).convert("RGB").save(folder / f"{number}.png")
        lines.append(json.dumps(line))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def rows(folder: Path, columns: str) -> list[tuple]:
    try:
        with closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True, timeout=30)) as database:
            return list(database.execute(f"SELECT {columns} FROM video ORDER BY number"))
    except sqlite3.Error:  # there is no manifest yet
        return []


def frames_of(folder: Path) -> dict[str, str]:
    return dict(rows(folder, "file, frames_sha256"))


def check(folder: Path, alone: dict[str, str], counts: Counts) -> None:
    """Counts what is wrong with the folder of a job that has run through."""
    found = rows(folder, "file, state, sha256, frames_sha256, attempts")
    counts.videos += len(alone)
    counts.attempts += sum(row[-1] for row in found)
    by_file = {file: rest for file, *rest in found}
    for file, frames in alone.items():
        state, sha256, its_frames, _ = by_file.get(file, ("not in the manifest", None, None, 0))
        path = folder / file
        if state != "done" or not path.is_file() or not path.with_suffix(".json").is_file():
            counts.fault("lost", f"{file}: {state}, its file {'is' if path.exists() else 'is not'} there")
        elif its_frames != frames or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            counts.fault("wrong", f"{file}: other frames than alone, or another file than the manifest has")
        elif json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["frames_sha256"] != frames:
            counts.fault("wrong", f"{file}: its sidecar is another's")
    for file in by_file.keys() - alone.keys():
        counts.fault("doubled", f"{file}: a row too many")
    known = {
        FILE,
        "report.html",
        "contact-sheet.png",
        *alone,
        *(str(Path(file).with_suffix(".json")) for file in alone),
    }
    for path in folder.rglob("*"):  # a page that was being drawn has an hour's grace
        if path.is_file() and str(path.relative_to(folder)) not in known and not path.name.endswith(".part"):
            counts.fault("doubled", f"{path.relative_to(folder)}: a file too many")


class Crowd:
    """So many processes at a time that run one command; each that ends or is stopped is replaced."""

    def __init__(self, command: Sequence[str], folder: Path, logs: Path, size: int, counts: Counts) -> None:
        self.command, self.folder, self.logs, self.size, self.counts = command, folder, logs, size, counts
        self.members: list[Process] = []
        self._started = 0
        logs.mkdir()

    def fill(self) -> None:
        for member in self.members:
            member.go_on()
        self._let_go([member for member in self.members if not member.running()])
        while len(self.awake()) < self.size:
            self._started += 1
            self.members.append(Process(self.command, self.logs / str(self._started)))

    def awake(self) -> list[Process]:
        return [member for member in self.members if not member.stopped_until and member.running()]

    def wait(self) -> None:
        for member in self.members:
            member.wait()
        self._let_go(list(self.members))

    def _let_go(self, ended: Sequence[Process]) -> None:
        for member in ended:
            self.members.remove(member)
            sent = [-number for number in SIGNALS.values()]
            if member.code in (0, STOPPED, *sent) or (member.code == 1 and self.retry_given_up()):
                continue
            self.counts.fault("crashed", f"a process ended with {member.code}: {member.log.read_text()[-500:]}")

    def retry_given_up(self) -> int:
        """Puts videos back in line whose processes died too often; returns how many there have been."""
        from reelbatch.jobs.manifest import Manifest, State

        failed = [error for state, error in rows(self.folder, "state, error") if state == "failed"]
        if failed and all("the process that made it died" in str(error) for error in failed):
            manifest = Manifest.in_folder(self.folder)
            self.counts.given_up += len(manifest.retry([State.FAILED]))
            manifest.close()
        return self.counts.given_up


def disturb(crowd: Crowd, signals: int, names: Sequence[str], longest: float, draw: random.Random) -> None:
    """Runs a job to its end, with up to so many signals at random moments."""
    while True:
        states = [state for (state,) in rows(crowd.folder, "state")]
        if states and all(state == "done" for state in states):
            break
        crowd.retry_given_up()
        crowd.fill()
        if draw.random() < IN_THE_WORK:  # else it may fall into the loading of the model
            wait_for_work(crowd)
        time.sleep(draw.uniform(0, longest))
        if signals and (awake := crowd.awake()):
            name = draw.choice(names)
            crowd.counts.in_the_work += any(state == "running" for (state,) in rows(crowd.folder, "state"))
            draw.choice(awake).send(name, draw.uniform(0, LONGEST_STOP))
            crowd.counts.signals[name] += 1
            signals -= 1
    crowd.wait()


def wait_for_work(crowd: Crowd) -> None:
    """Until a video runs, or nobody is left who could begin one."""
    while crowd.awake() and not any(state == "running" for (state,) in rows(crowd.folder, "state")):
        time.sleep(0.02)
        for member in crowd.members:  # one that is stopped may hold the manifest's lock
            member.go_on()


def race(command: Sequence[str], logs: Path, starts: int, counts: Counts) -> None:
    """Starts a command so many times at once."""
    logs.mkdir()
    begin = os.pipe()
    processes = [Process(command, logs / str(number), begin) for number in range(starts)]
    os.close(begin[0])
    os.close(begin[1])
    for process in processes:
        if process.wait():
            counts.fault("crashed", f"a start ended with {process.code}: {process.log.read_text()[-500:]}")


def run_through(command: Sequence[str], log: Path) -> None:
    if code := Process(command, log).wait():
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()}")


def report(counts: Counts, what: str, seconds: float) -> None:
    sent = ", ".join(f"{number} {name}" for name, number in sorted(counts.signals.items()))
    sent += f" ({counts.in_the_work} while a video ran)" if sent else ""
    faults = ", ".join(f"{kind} {getattr(counts, kind)}" for kind in ("lost", "doubled", "wrong", "crashed"))
    rest = f"given up after three deaths and tried again {counts.given_up}"
    begun = f"{counts.videos} videos, begun {counts.attempts} times"
    print(f"{what}: {sent + '; ' if sent else ''}{begun}: {faults}; {rest}; {seconds:.0f} s", flush=True)
    for problem in counts.problems[:20]:
        print(f"  {problem}", flush=True)


def main(
    kills: Annotated[int, typer.Option(help="Signals in all, shared by the numbers of processes.")] = 100,
    races: Annotated[int, typer.Option(help="Jobs that are started three times at once, in a fresh folder.")] = 20,
    processes: Annotated[list[int], typer.Option(help="That share a job; may be repeated.")] = [1, 2, 4],  # noqa: B006
    lines: Annotated[int, typer.Option(help="Of the prompt file.")] = 8,
    copies: Annotated[int, typer.Option(help="Of each line, in a job that is disturbed.")] = 6,
    signals: Annotated[list[str], typer.Option("--signal", help="May be repeated.")] = list(SIGNALS),  # noqa: B006
    longest: Annotated[float, typer.Option(help="Seconds at most that a signal waits besides.")] = 1.0,
    seed: int = 0,
    model: str = "demo",
    images: Annotated[
        bool, typer.Option(help="Lines with images and with words in quotes among the others; needs --model.")
    ] = False,
) -> None:
    """Prints what was seen, and ends with 1 if anything was lost, doubled, wrong or crashed."""
    prepare()
    draw, all_counts = random.Random(seed), []
    print(f"expected: about {(kills * 3.0 + races * 12.0) / 60:.0f} minutes on two cores", flush=True)
    with tempfile.TemporaryDirectory() as root:
        prompts = (write_mixed_prompts if images else write_prompts)(Path(root), lines)
        job, calm = Job(prompts, model, () if images else SIZE), Path(root, "calm")
        run_through(job.command(calm, copies, 1), Path(root, "log"))
        alone = frames_of(calm)
        singles = alone
        if copies > 1 and races:
            run_through(job.command(Path(root, "singles"), 1, 1), Path(root, "log"))
            singles = frames_of(Path(root, "singles"))
        for share, size in enumerate(processes):
            counts, started = Counts(), time.monotonic()
            wanted = kills // len(processes) + (share < kills % len(processes))
            all_counts.append(counts)
            while counts.sent < wanted and not counts.problems:
                out = Path(root, f"o-{size}-{counts.videos}")
                command = job.command(out, copies, 4, "--checkpoint-every", "1")
                crowd = Crowd(command, out, Path(f"{out}-logs"), size, counts)
                disturb(crowd, wanted - counts.sent, signals, longest, draw)
                run_through(command, Path(root, "log"))
                check(out, alone, counts)
            report(counts, f"{size} process{'es' if size > 1 else ''}", time.monotonic() - started)
        counts, started = Counts(), time.monotonic()
        all_counts.append(counts)
        for number in range(races):
            out = Path(root, f"race-{number}")
            command = job.command(out, 1, 4)
            race(command, Path(f"{out}-logs"), 3, counts)
            run_through(command, Path(root, "log"))
            check(out, singles, counts)
        if races:
            report(counts, f"{races} races of three starts", time.monotonic() - started)
    raise typer.Exit(1 if any(counts.problems for counts in all_counts) else 0)


if __name__ == "__main__":
    typer.run(main)
