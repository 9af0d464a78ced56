"""A whole prompt suite in one command, against a loop over Diffusers' pipeline, and against a process for each prompt.

    python benchmarks/bulk.py --prompts VBench/prompts/all_dimension.txt

Same weights, sizes, steps and video files everywhere. The whole suite is made once, by `reelbatch job run`. For the
ratios, jobs of a part of the suite and Diffusers' loop over a smaller part take turns, and what counts are the medians
of seconds a video; a process for each prompt, as many scripts have it, is timed from its start to its end.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from reelbatch import Video, VideoRequest
from reelbatch.device import device_name
from reelbatch.loading.hub import DEMO_FOLDER

RESULTS = Path(__file__).parent / "results"
SIDE, FRAMES, STEPS = 32, 5, 4
SUITE = 946
"""Lines of VBench's suite; a suite of the same form is made where no file is named."""


def suite(path: Path | None) -> list[str]:
    if path is not None:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    things = ("dog", "stop sign", "laptop", "boat", "street", "horse", "cup", "tree", "bridge", "child", "clock")
    doings = (
        "in still water",
        "frozen in time",
        "running to join a herd of its kind",
        "on a wooden table",
        "in the rain",
    )
    styles = ("", ", oil painting", ", zoom in", ", pan left", ", in cyberpunk style", ", in slow motion")
    made = [f"a {thing} {doing}{style}" for style in styles for doing in doings for thing in things]
    return [f"{made[i % len(made)]}{', seen again' * (i // len(made))}" for i in range(SUITE)]


def job_words(prompts: Path, out: Path, isolation: str) -> list[str]:
    words = ["job", "run", str(prompts), "--out", str(out), "--isolation", isolation, "--steps", str(STEPS)]
    return [*words, "--height", str(SIDE), "--width", str(SIDE), "--frames", str(FRAMES)]


class Ours:
    """A job, as `job run` has it, with a model that is loaded."""

    def __init__(self, isolation: str, batch_size: int) -> None:
        from reelbatch.engine.engine import Engine

        self.engine = Engine.from_pretrained("demo", isolation=isolation, max_batch_size=batch_size)  # type: ignore[arg-type]

    def __call__(self, prompts: Sequence[str]) -> None:
        from reelbatch.jobs.job import Settings, open_job
        from reelbatch.jobs.manifest import Manifest
        from reelbatch.jobs.prompts import Entry, make_requests
        from reelbatch.jobs.worker import Worker

        fields = {"height": SIDE, "width": SIDE, "frames": FRAMES, "steps": STEPS}
        entries = [Entry(str(i), {"prompt": prompt}) for i, prompt in enumerate(prompts)]
        requests = make_requests(entries, fields, first_seed=0, limits=self.engine.limits)
        with tempfile.TemporaryDirectory() as out:
            manifest = Manifest.in_folder(Path(out))
            settings = Settings("demo", "", "cpu", "float32", "auto", self.engine.config.isolation)
            job = open_job(manifest, Path(out), requests, settings, mode="resume")
            outcomes = list(Worker(self.engine, manifest, job.number, Path(out), weights="").outcomes())
            assert all(outcome.error is None for outcome in outcomes)
            assert len(outcomes) == len(prompts)


class Loop:
    """Diffusers' pipeline, a prompt at a time, each video written as an mp4 by the same encoder."""

    def __init__(self) -> None:
        from diffusers import HunyuanVideoPipeline

        self.pipeline = HunyuanVideoPipeline.from_pretrained(str(DEMO_FOLDER))
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompts: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as out:
            for i, prompt in enumerate(prompts):
                frames = self.pipeline(
                    prompt=prompt,
                    height=SIDE,
                    width=SIDE,
                    num_frames=FRAMES,
                    num_inference_steps=STEPS,
                    generator=torch.Generator().manual_seed(0),
                    output_type="np",
                ).frames[0]
                request = VideoRequest(prompt=prompt, seed=0, fps=8)
                Video(request, (frames * 255).round().astype("uint8")).save(Path(out, f"{i}.mp4"))


def a_process(prompt: str) -> float:
    """Seconds of a process that loads Diffusers' pipeline and makes one video."""
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--alone", prompt], check=True, capture_output=True)
    return time.perf_counter() - started


def whole(prompts: Path, isolation: str) -> tuple[float, int]:
    """Seconds of `reelbatch job run` for all prompts, its start included, and the videos that are done."""
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        words = [sys.executable, "-m", "reelbatch", *job_words(prompts, Path(out), isolation)]
        subprocess.run(words, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        status = [sys.executable, "-m", "reelbatch", "job", "status", "--out", out, "--json"]
        done = json.loads(subprocess.run(status, check=True, capture_output=True, text=True).stdout)["done"]
    return seconds, done


def main(
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line; made up if not given.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns that ours and the loop take.")] = 5,
    ours: Annotated[int, typer.Option(help="Videos of each of our turns.")] = 96,
    theirs: Annotated[int, typer.Option(help="Videos of each of the loop's turns.")] = 24,
    processes: Annotated[int, typer.Option(help="Processes of one prompt that are timed.")] = 3,
    batch_size: int = 32,
    alone: Annotated[str, typer.Option(hidden=True)] = "",
    keep_as: Annotated[str, typer.Option(help="Name of the table's file under benchmarks/results/.")] = "bulk_cpu",
) -> None:
    """Prints the table that is kept under benchmarks/results/."""
    if alone:
        Loop()([alone])
        return
    lines = suite(prompts)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(lines))
        file.flush()
        seconds = {name: whole(Path(file.name), name) for name in ("exact", "packed")}
    ways = {
        "exact": (Ours("exact", batch_size), ours),
        "packed": (Ours("packed", batch_size), ours),
        "loop": (Loop(), theirs),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way, count in ways.values():
        way(lines[: count // 4])  # warm
    for turn in range(rounds):
        for name, (way, count) in ways.items():
            some = [lines[(turn * ours + i) % len(lines)] for i in range(count)]
            started = time.perf_counter()
            way(some)
            times[name].append((time.perf_counter() - started) / count)
    medians = {name: statistics.median(found) for name, found in times.items()}
    single = statistics.median(a_process(line) for line in lines[:processes])
    text = report(lines, seconds, medians, times, single, rounds, ours, theirs, processes, batch_size)
    print(text)
    (RESULTS / f"{keep_as}.md").write_text(text, encoding="utf-8")


def report(
    lines: list[str],
    whole: dict[str, tuple[float, int]],
    medians: dict[str, float],
    times: dict[str, list[float]],
    single: float,
    rounds: int,
    ours: int,
    theirs: int,
    processes: int,
    batch_size: int,
) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("reelbatch", "torch", "diffusers"))
    rows = [
        ("a process for each prompt (Diffusers)", single, ""),
        ("a loop over Diffusers' pipeline", medians["loop"], _spread(times["loop"])),
        ("reelbatch, exact", medians["exact"], _spread(times["exact"])),
        ("reelbatch, packed", medians["packed"], _spread(times["packed"])),
    ]
    table = [
        f"| {name} | {seconds:.3f} | {spread} | {medians['loop'] / seconds:.2f} | {single / seconds:.1f} |"
        for name, seconds, spread in rows
    ]
    told = [
        f"- `reelbatch job run --isolation {name}` made {done} of {len(lines)} videos in {seconds:.0f} s in all"
        for name, (seconds, done) in whole.items()
    ]
    return "\n".join(
        [
            f"# A suite of {len(lines)} prompts, {len(set(lines))} of them different\n",
            f"{date.today()}, {device_name('cpu')}, {torch.get_num_threads()} threads, {versions}, "
            f"Python {sys.version.split()[0]}\n",
            f"The bundled model in fp32, {SIDE}×{SIDE}, {FRAMES} frames, {STEPS} steps; all written as mp4.\n",
            *told,
            f"\nIn turn, {rounds} times: jobs of {ours} videos (batches of {batch_size}) and the loop over {theirs}; "
            f"medians, with the lowest and highest. Processes: the median of {processes}.\n",
            "| | seconds a video | lowest to highest | times the loop's speed | times a process's |",
            "|---|---|---|---|---|",
            *table,
            "",
        ]
    )


def _spread(times: list[float]) -> str:
    return f"{min(times):.3f} to {max(times):.3f}"


if __name__ == "__main__":
    typer.run(main)
