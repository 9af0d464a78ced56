"""Does `generate` make as many videos an hour as `tune` promised?

    python benchmarks/tune_promise.py                 # the bundled model, on a quiet machine
    python benchmarks/tune_promise.py --shape 128x128x9 --budget 3m

`reelbatch tune` runs in one process with a cache of its own. Then `reelbatch generate` runs in another, with the
isolation that was advised and no --batch-size, so that it takes the profile; it makes several batches of other prompts.
Its rate is taken between the end of its first batch and the end of its last, writing of files included, and is also
given for `Engine.generate` alone, in a third process after a warm-up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from reelbatch.demo import evaluate
from reelbatch.device import device_name

RESULTS = Path(__file__).parent / "results"
NEAR = 0.10
LEAST_SECONDS = 20.0
"""About how long the counted batches should take together."""


def reelbatch(*words: str, cache: str, told: Path) -> subprocess.Popen[str]:
    """The command in a process of its own; what it tells people goes to the file `told`."""
    return subprocess.Popen(
        [sys.executable, "-m", "reelbatch", *words],
        env=os.environ | {"REELBATCH_CACHE": cache},
        stdout=subprocess.PIPE,
        stderr=told.open("w"),
        text=True,
    )


def promise(shape: str, budget: str, cache: str, out: Path) -> dict[str, Any]:
    """What `tune` advises: its chosen point."""
    words = ["--json", "--budget", budget, "--out", str(out), *(["--shape", shape] if shape else [])]
    told = out.with_name("tune.txt")
    found, _ = reelbatch("tune", *words, cache=cache, told=told).communicate()
    if not found:
        raise SystemExit(told.read_text())
    (swept,) = json.loads(found)["sweeps"]
    choice = swept["choice"]
    (point,) = [
        p
        for p in swept["points"]
        if p["batch"] == choice["batch"] and (p["batch"] == 1 or p["isolation"] == choice["isolation"])
    ]
    return {**point, "isolation": choice["isolation"]}


def by_command(prompts: list[str], point: dict[str, Any], shape: str, cache: str, out: Path) -> tuple[float, str]:
    """Videos an hour of `generate`, from the end of its first batch to the end of its last; and what it said of its
    batch size."""
    sizes = dict(zip(("--width", "--height", "--frames"), shape.split("x"), strict=True)) if shape else {}
    options = [word for pair in sizes.items() for word in pair]
    words = ["--json", "--isolation", point["isolation"], "--out", str(out), *options]
    told = out.with_name("generate.txt")
    process = reelbatch("generate", *prompts, *words, cache=cache, told=told)
    ends = []
    for line in process.stdout or ():
        assert json.loads(line)["state"] == "done"
        ends.append(time.perf_counter())
    process.wait()
    said = next((line for line in told.read_text().splitlines() if line.startswith("batch size")), "nothing")
    batch = point["batch"]
    batches = len(ends) // batch
    first, last = ends[batch - 1], ends[batches * batch - 1]
    return (batches - 1) * batch / (last - first) * 3600, said


def by_engine(prompts: list[str], point: dict[str, Any], shape: str) -> float:
    """Videos an hour of `Engine.generate` in a process of its own."""
    sizes = dict(zip(("width", "height", "frames"), map(int, shape.split("x")), strict=True)) if shape else {}
    code = f"""
import time
from reelbatch import VideoRequest
from reelbatch.engine.engine import Engine
engine = Engine.from_pretrained("demo", isolation={point["isolation"]!r}, max_batch_size={point["batch"]})
requests = [VideoRequest(prompt=p, seed=i, **{sizes!r}) for i, p in enumerate({prompts!r})]
engine.generate(requests[:{point["batch"]}])
engine.model.family.forget()
started = time.perf_counter()
engine.generate(requests[{point["batch"]}:])
print("seconds", time.perf_counter() - started)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = float(done.stdout.split()[-1])
    return (len(prompts) - point["batch"]) / seconds * 3600


def main(
    shape: Annotated[str, typer.Option(help="WIDTHxHEIGHTxFRAMES; the bundled model's own if not given.")] = "",
    budget: Annotated[str, typer.Option(help="Of `tune`.")] = "90s",
    out: Annotated[Path, typer.Option(help="Where the figures are kept.")] = RESULTS,
) -> None:
    """Runs both, prints the ratio, and keeps it under benchmarks/results/."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        started = time.perf_counter()
        point = promise(shape, budget, str(place / "cache"), place / "tune")
        tuned = time.perf_counter() - started
        batches = 1 + max(2, round(LEAST_SECONDS / point["last_video_seconds"]))
        _, asked = evaluate.prompts(2 * batches * point["batch"], seed=7)
        prompts = [caption for _, caption in asked]
        command, said = by_command(prompts, point, shape, str(place / "cache"), place / "videos")
        engine = by_engine(prompts, point, shape)
    ratios = {"generate": command / point["videos_per_hour"], "engine": engine / point["videos_per_hour"]}
    near = {name: abs(ratio - 1) <= NEAR for name, ratio in ratios.items()}
    lines = [
        f"# What `tune` promised and `generate` gave: {shape or 'the default shape'}",
        "",
        f"{date.today()}, {device_name('cpu')}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}",
        "",
        f"- `tune --budget {budget}` ended after {tuned:.0f} s: batch size {point['batch']}, {point['isolation']}, "
        f"{point['videos_per_hour']:,.0f} videos an hour promised",
        f"- `generate` said: {said}",
        f"- `generate`, {len(prompts)} videos, files written: {command:,.0f} an hour, {ratios['generate']:.3f} of the "
        f"promise ({'within' if near['generate'] else 'not within'} {NEAR:.0%})",
        f"- `Engine.generate`: {engine:,.0f} an hour, {ratios['engine']:.3f} of the promise "
        f"({'within' if near['engine'] else 'not within'} {NEAR:.0%})",
    ]
    print("\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tune_promise_cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
