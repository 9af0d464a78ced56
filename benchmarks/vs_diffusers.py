"""reelbatch against Diffusers' own HunyuanVideo, in turn, on the same weights and inputs.

    python benchmarks/vs_diffusers.py                  # the transformer alone, and end to end, on the bundled model
    python benchmarks/vs_diffusers.py --part transformer --dtype fp32 --batch 1 --batch 8
    python benchmarks/vs_diffusers.py --part 13b --device cuda    # the 13B configuration with random weights

Every cell runs Diffusers, packed and exact one after the other, again and again; the figure is the median, and a ratio
is Diffusers' median over ours (2.00: twice as fast). Diffusers gets what its pipeline gives it: text padded to 256
tokens and a mask.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from math import exp, log
from pathlib import Path
from typing import Annotated, Literal

import diffusers
import torch
import typer
from diffusers import HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel as Reference

from reelbatch import VideoRequest
from reelbatch.device import device_name
from reelbatch.engine.engine import Engine
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.load import load
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

RESULTS = Path(__file__).parent / "results"
PADDED_TEXT = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((3, 8, 8), (3, 16, 16), (3, 32, 32), (5, 32, 32), (5, 64, 64))
"""Latent frames, height and width, growing; used are the first, a middle one, and the largest within the limit."""
LONG_SECONDS = 10.0
LARGEST_SECONDS = 2.0
"""A shape is used if one forward of Diffusers at batch 1 takes no longer."""
CLIPS = ((64, 64, 9), (128, 128, 9))
"""Height, width and frames of the end-to-end cells."""
STEPS = 10
LARGEST_CLIP_SECONDS = 5.0
"""A clip is used if one run of Diffusers at batch 1 takes no longer."""
GIANT_SHAPES = (((61, 320, 512), 60), ((129, 720, 1280), 12))
"""Frames, height and width for the 13B configuration, and how many of its 60 blocks run (the time is then scaled)."""

Way = Literal["diffusers", "packed", "exact"]


@dataclass(frozen=True)
class Cell:
    """One row of the table. Seconds are medians; `repeats` tells of how many."""

    part: str
    dtype: str
    shape: str
    batch: int
    tokens: int
    repeats: int
    diffusers: float
    packed: float
    exact: float

    @property
    def ratios(self) -> tuple[float, float]:
        return self.diffusers / self.packed, self.diffusers / self.exact


def measure(ways: dict[Way, Callable[[], object]], budget: float, device: str) -> tuple[dict[Way, float], int]:
    """Median seconds of each way, run in turn until the time is up (three times at least), after a warm-up.

    A way whose warm-up takes long is warm by then: its warm-up is the first of its repeats.
    """

    def run(way: Callable[[], object]) -> float:
        started = time.perf_counter()
        way()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds: dict[Way, list[float]] = {name: [run(way)] for name, way in ways.items()}
    repeats = 1
    if sum(map(sum, seconds.values())) < LONG_SECONDS:
        seconds, repeats = {name: [] for name in ways}, 0
    started = time.perf_counter()
    while repeats < 3 or (time.perf_counter() - started < budget and repeats < 25):
        for name, way in ways.items():
            seconds[name].append(run(way))
        repeats += 1
    return {name: statistics.median(times) for name, times in seconds.items()}, repeats


def second_call(way: Callable[[], object]) -> float:
    """Seconds that it takes once warm."""
    way()
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


# -- the transformer alone -------------------------------------------------------------------------


def transformer_ways(
    reference: Reference, ours: HunyuanVideoTransformer3DModel, shape: tuple[int, int, int], batch: int
) -> tuple[dict[Way, Callable[[], object]], int]:
    """The three ways to one step of a batch of mixed timesteps, guidance and text lengths; and the tokens a sample."""
    config, dtype, device = ours.config, ours.dtype, ours.device
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    lengths = [12 + round(19 * i / max(batch - 1, 1)) for i in range(batch)]
    branches = [
        Branch(
            latents=draw(config.in_channels, *shape),
            text=draw(length, config.text_embed_dim),
            pooled=draw(config.pooled_projection_dim),
            timestep=torch.tensor(1000.0 - 100 * i, device=device),
            guidance=torch.tensor(6.0, device=device, dtype=dtype) * 1000.0,
        )
        for i, length in enumerate(lengths)
    ]
    text = torch.zeros(batch, PADDED_TEXT, config.text_embed_dim, device=device, dtype=dtype)
    mask = torch.zeros(batch, PADDED_TEXT, device=device, dtype=dtype)
    for i, branch in enumerate(branches):
        text[i, : len(branch.text)] = branch.text
        mask[i, : len(branch.text)] = 1
    padded = {
        "hidden_states": torch.stack([branch.latents for branch in branches]),
        "timestep": torch.stack([branch.timestep for branch in branches]),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "pooled_projections": torch.stack([branch.pooled for branch in branches]),
        "guidance": torch.stack([branch.guidance for branch in branches]),
    }
    ways: dict[Way, Callable[[], object]] = {
        "diffusers": lambda: reference(**padded, return_dict=False),
        "packed": lambda: ours(packs=[branches]),
        "exact": lambda: ours(packs=[[branch] for branch in branches]),
    }
    frames, height, width = shape
    return ways, (frames // config.patch_size_t) * (height // config.patch_size) * (width // config.patch_size)


def transformer_cells(dtype: str, batches: list[int], budget: float) -> list[Cell]:
    folder = DEMO_FOLDER / "transformer"
    reference = Reference.from_pretrained(folder, torch_dtype=DTYPES[dtype]).eval()
    ours = HunyuanVideoTransformer3DModel.from_pretrained(folder, torch_dtype=DTYPES[dtype]).eval()

    def affordable(shape: tuple[int, int, int]) -> bool:
        return second_call(transformer_ways(reference, ours, shape, 1)[0]["diffusers"]) <= LARGEST_SECONDS

    fitting = [shape for shape in SHAPES if affordable(shape)]
    cells = []
    for shape in dict.fromkeys((fitting[0], fitting[len(fitting) // 2], fitting[-1])):
        for batch in batches:
            ways, tokens = transformer_ways(reference, ours, shape, batch)
            seconds, repeats = measure(ways, budget, "cpu")
            cells.append(Cell("transformer", dtype, "×".join(map(str, shape)), batch, tokens, repeats, **seconds))
            show(cells[-1])
    return cells


# -- end to end ------------------------------------------------------------------------------------


def end_to_end_cells(dtype: str, batches: list[int], budget: float) -> list[Cell]:
    """From prompts to frames: encoding, steps and decoding, with true prompts of different length."""
    pipeline = HunyuanVideoPipeline.from_pretrained(DEMO_FOLDER, torch_dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    model = load(DEMO_FOLDER, "cpu", DTYPES[dtype])
    colors = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "brown")
    cells = []
    for height, width, frames in CLIPS:
        sizes = {"height": height, "width": width, "frames": frames}
        for batch in batches:
            requests = [
                VideoRequest(
                    prompt=f"a large {color} circle moving left" + " on a black background" * (i % 2),
                    seed=i,
                    steps=STEPS,
                    **sizes,
                )
                for i, color in enumerate(colors[:batch])
            ]

            def theirs(requests: list[VideoRequest] = requests) -> object:
                return pipeline(
                    [request.prompt for request in requests],
                    height=requests[0].height,
                    width=requests[0].width,
                    num_frames=requests[0].frames,
                    num_inference_steps=STEPS,
                    generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                    output_type="np",
                )

            def ours(isolation: Way, requests: list[VideoRequest] = requests) -> object:
                model.family.forget()  # each run encodes its prompts anew, as Diffusers does
                return Engine(model, isolation=isolation, max_batch_size=len(requests)).generate(requests)

            if batch == batches[0] and second_call(theirs) > LARGEST_CLIP_SECONDS:
                break
            ways: dict[Way, Callable[[], object]] = {
                "diffusers": theirs,
                "packed": lambda: ours("packed"),
                "exact": lambda: ours("exact"),
            }
            seconds, repeats = measure(ways, budget, "cpu")
            tokens = ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
            cells.append(Cell("end to end", dtype, f"{height}×{width}×{frames}", batch, tokens, repeats, **seconds))
            show(cells[-1])
    return cells


# -- the 13B configuration -------------------------------------------------------------------------


def giant_cells(device: str, budget: float) -> list[Cell]:
    """Random weights in bfloat16. Where fewer blocks run, the seconds shown are scaled up to all of them."""
    cells = []
    for (frames, height, width), blocks in GIANT_SHAPES:
        layers = {"num_layers": blocks // 3, "num_single_layers": blocks - blocks // 3}
        with torch.device(device):
            ours = HunyuanVideoTransformer3DModel(**layers).to(torch.bfloat16).eval()
            reference = Reference(**layers).to(torch.bfloat16).eval()
        reference.load_state_dict(ours.state_dict(), assign=True)  # the very same tensors
        shape = ((frames - 1) // 4 + 1, height // 8, width // 8)
        for batch in (1, 2):
            ways, tokens = transformer_ways(reference, ours, shape, batch)
            seconds, repeats = measure(ways, budget, device)
            scaled = {way: value * 60 / blocks for way, value in seconds.items()}
            name = f"{height}×{width}×{frames}" + ("" if blocks == 60 else f" ({blocks} of 60 blocks, scaled)")
            cells.append(Cell("13B transformer", "bf16", name, batch, tokens, repeats, **scaled))
            show(cells[-1])
    return cells


# -- what is told ----------------------------------------------------------------------------------

HEADER = (
    "| part | dtype | shape | tokens a sample | batch | Diffusers s | packed s | exact s | packed × | exact × |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def row(cell: Cell) -> str:
    packed, exact = cell.ratios
    return (
        f"| {cell.part} | {cell.dtype} | {cell.shape} | {cell.tokens} | {cell.batch} | {cell.diffusers:.3f} "
        f"| {cell.packed:.3f} | {cell.exact:.3f} | **{packed:.2f}** | **{exact:.2f}** |"
    )


def show(cell: Cell) -> None:
    print(row(cell), flush=True)


def summary(cells: list[Cell]) -> str:
    lines = []
    for index, name in enumerate(("packed", "exact")):
        ratios = [cell.ratios[index] for cell in cells]
        mean = exp(sum(map(log, ratios)) / len(ratios))
        lines.append(
            f"- {name}: {mean:.2f}× in the geometric mean of {len(ratios)} cells, {min(ratios):.2f}× at the least"
        )
    return "\n".join(lines)


def main(
    part: Annotated[list[str], typer.Option(help="transformer, end-to-end or 13b.")] = ["transformer", "end-to-end"],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="fp32 or bf16.")] = ["fp32", "bf16"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 2, 4, 8],  # noqa: B006
    device: Annotated[str, typer.Option(help="Only the 13B part runs on another than the CPU.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Seconds a cell, beyond the first three repeats.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Where the table and its figures go.")] = RESULTS,
) -> None:
    """Runs the comparison, prints its table and keeps it under benchmarks/results/."""
    print(HEADER)
    cells: list[Cell] = []
    with torch.no_grad():
        for name in dtype:
            if "transformer" in part:
                cells += transformer_cells(name, batch, budget)
            if "end-to-end" in part:
                cells += end_to_end_cells(name, batch, budget)
            if cells:
                keep(cells, device, out)
        if "13b" in part:
            cells += giant_cells(device, budget)
    print("\n" + keep(cells, device, out))


def keep(cells: list[Cell], device: str, out: Path) -> str:
    """Writes the table and its figures, and returns what they come to."""
    about = f"{date.today()}, {device_name(device)}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
    about += f"transformers {version('transformers')}"
    text = f"# reelbatch against Diffusers\n\n{about}\n\n{summary(cells)}\n\n{HEADER}\n" + "\n".join(map(row, cells))
    out.mkdir(parents=True, exist_ok=True)
    stem = f"vs_diffusers_{'cpu' if device == 'cpu' else 'gpu'}"
    (out / f"{stem}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"{stem}.json").write_text(json.dumps({"about": about, "cells": [asdict(cell) for cell in cells]}, indent=1))
    return f"{about}\n{summary(cells)}"


if __name__ == "__main__":
    typer.run(main)
