"""What precision costs in training: memory, speed and loss in fp32, bf16, fp16 and over 8-bit weights.

    python benchmarks/train_precision.py                   # a LoRA of the bundled model, on the CPU
    python benchmarks/train_precision.py --device cuda --model /models/HunyuanVideo --size 544x960x33

Every cell is a process of its own that trains on the same clips with the same samples, noise levels and noise. Memory
is the peak during the steps, above what the process held before the first one ("above") and in all; on the CPU it is
the resident set, on a GPU what its allocator gave out. Seconds are the median of the steps after the first two. The
loss is the mean of all steps, and the held-out loss that after them.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

RESULTS = Path(__file__).parent / "results"
PRECISIONS: dict[str, dict[str, str]] = {
    "no": {"mixed_precision": "no"},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "int8 + LoRA": {"base_dtype": "int8"},
}
SIZES = ("64x64x9", "96x128x9", "128x192x17")
"""Height, width and frames."""
CLIPS = 12
WARM_UP = 2


def cell(settings: dict[str, Any]) -> dict[str, float]:
    """Trains, and tells what it took; to be called in a fresh process."""
    from reelbatch.memory.gauge import memory_of
    from reelbatch.train.config import make_config
    from reelbatch.train.loop import Run, make_accelerator

    config = make_config(settings)
    run = Run(config, make_accelerator(config), lambda text: None)
    memory = memory_of(run.accelerator.device)
    before = memory.used()
    memory.reset()
    losses, seconds = [], []
    for _ in range(config.steps):
        started = time.perf_counter()
        outcome = run.step()
        seconds.append(time.perf_counter() - started)
        losses.append(outcome.loss)
    peak = memory.peak()
    return {
        "above": peak - before,
        "peak": peak,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "loss": statistics.mean(losses),
        "held_out": run.validation_loss(),
    }


def write_clips(folder: Path, size: str) -> Path:
    from reelbatch.demo import shapes

    height, width, frames = map(int, size.split("x"))
    return shapes.write_folder(folder, CLIPS, shapes.split()[0], sizes=[(height, width, frames)])


def main(
    model: Annotated[str, typer.Option(help="demo, or a folder in the Diffusers layout.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    method: Annotated[str, typer.Option(help="lora or full (which has no 8-bit weights).")] = "lora",
    size: Annotated[list[str] | None, typer.Option(help="HEIGHTxWIDTHxFRAMES; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a pack.")] = 4,
    steps: Annotated[int, typer.Option(min=3, help="Of each cell.")] = 12,
    keep: Annotated[bool, typer.Option("--keep", help="Write the table to benchmarks/results.")] = False,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure all cells, and print the table."""
    if child:
        print(json.dumps(cell(json.loads(child))))
        return
    from reelbatch.device import device_name

    lines = [
        "# Precision in training",
        "",
        f"{date.today()}, {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"peft {version('peft')}, torchao {version('torchao')}, {model}, {method}, {batch} samples a step, "
        f"{steps} steps",
        "",
        "| clips | precision | checkpointing | MiB above | MiB in all | s a step | loss | held-out loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for one in size or SIZES:
            data = write_clips(Path(scratch) / one, one)
            height, width, frames = map(int, one.split("x"))
            for (name, precision), checkpointing in itertools.product(PRECISIONS.items(), (False, True)):
                if method == "full" and "base_dtype" in precision:
                    continue
                settings = {
                    "model": model,
                    "data": str(data),
                    "validation_share": 0.25,
                    "max_frames": frames,
                    "max_pixels": height * width,
                    "method": method,
                    "device": device,
                    "batch_size": batch,
                    "steps": steps,
                    "gradient_checkpointing": checkpointing,
                    "cache": str(Path(scratch) / "cache"),
                    "out": str(Path(scratch) / f"{one}-{name}-{checkpointing}"),
                    **precision,
                }
                call = [sys.executable, __file__, "--child", json.dumps(settings)]
                done = subprocess.run(call, capture_output=True, text=True)
                if done.returncode:
                    told = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
                    row = f"| {one} | {name} | {'yes' if checkpointing else 'no'} | failed: {told} | | | | |"
                else:
                    found = json.loads(done.stdout.strip().splitlines()[-1])
                    row = (
                        f"| {one} | {name} | {'yes' if checkpointing else 'no'} | {found['above'] / 2**20:.0f} "
                        f"| {found['peak'] / 2**20:.0f} | {found['seconds']:.3f} | {found['loss']:.4f} "
                        f"| {found['held_out']:.4f} |"
                    )
                print(row, flush=True)
                lines.append(row)
    text = "\n".join(lines)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"train_precision_{method}_{device}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
