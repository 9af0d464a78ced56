"""reelbatch against Diffusers' own HunyuanVideo 1.5, in turn, on the same random weights and inputs, with guidance.

    python benchmarks/vs_diffusers15.py              # a step of the transformer, and from prompts to frames
    python benchmarks/vs_diffusers15.py --part step --batch 1 --repeats 1

A step is what classifier-free guidance asks for: both branches of every video, text to video, prompts of different
lengths, one in four with words to be drawn. Diffusers does it in two forwards and gets what its pipeline gives it:
1,000 rows of text, 256 of glyphs and 729 for an image that is not there, with masks. "repaired" is Diffusers'
transformer after `reelbatch.repair`, called in the same way. From prompts to frames, Diffusers makes one video at a
time: its VAE raises at two.

Every cell runs all of them one after the other, again and again. Seconds are medians of the processor's time with one
thread, on which other work on the machine has little influence; a first round measures memory: by how much the
process's resident set grows at most.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffusers import HunyuanVideo15Pipeline
from torch import Tensor

from reelbatch import VideoRequest
from reelbatch.device import device_name, trim_heap
from reelbatch.engine.engine import Engine
from reelbatch.memory.gauge import ResidentMemory
from reelbatch.models.hunyuan_video15.branch import Branch
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel
from reelbatch.repairs import hunyuan_video15 as repairs

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parents[1] / "tests"
TEXT, GLYPHS, IMAGE = 1000, 256, 729
"""Rows that Diffusers' pipeline makes of every prompt, of its glyphs, and of no image."""
NETWORK = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "rope_axes_dim": (8, 12, 12),
    "num_layers": 3,
    "mlp_ratio": 4.0,
}
"""What differs from the tiny model of the tests: 64 channels and three blocks, of random weights."""
SHAPES = ((64, 64, 9), (192, 192, 17), (256, 256, 17))
"""Height, width and frames: 48, 720 and 1,280 tokens."""
CLIPS = ((64, 64, 9), (128, 128, 9))
STEPS = 4

Ways = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Cell:
    """One row of the table: median seconds and peak bytes by who made it, of so many repeats."""

    part: str
    shape: str
    batch: int
    tokens: int
    repeats: int
    seconds: dict[str, float]
    peaks: dict[str, int]


def measure(ways: Ways, repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds and peak bytes of each: one round for memory, which warms up too, and `repeats` for time."""
    memory = ResidentMemory()
    peaks: dict[str, int] = {}
    for name, work in ways.items():
        gc.collect()
        trim_heap()
        memory.reset()
        before = memory.used()
        work()
        peaks[name] = memory.peak() - before
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}, peaks


# -- inputs ----------------------------------------------------------------------------------------


def draw(*size: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    if torch.device(device).type != "cpu":  # fake: it has no values
        return torch.empty(size, device=device, dtype=dtype)
    return torch.randn(size, dtype=dtype)


def branches_of(config: Any, latent_shape: tuple[int, int, int], batch: int, **to: Any) -> list[Branch]:
    """Conditional and unconditional branches of each video: prompts of 40 to 100 tokens, an empty negative prompt."""
    branches = []
    for i in range(batch):
        latents = draw(config.in_channels, *latent_shape, **to)
        timestep = torch.tensor(1000.0 - 100 * i, device=to.get("device", "cpu"))
        glyphs = draw(30, config.text_embed_2_dim, **to) if i % 4 == 1 else None
        branches.append(Branch(latents, draw(40 + 20 * i, config.text_embed_dim, **to), timestep, glyphs=glyphs))
        branches.append(Branch(latents, draw(8, config.text_embed_dim, **to), timestep))
    return branches


def padded(branches: list[Branch], config: Any) -> dict[str, Tensor]:
    """These branches as Diffusers' pipeline gives them to its transformer."""
    like = branches[0].text
    text = like.new_zeros(len(branches), TEXT, config.text_embed_dim)
    glyphs = like.new_zeros(len(branches), GLYPHS, config.text_embed_2_dim)
    masks = like.new_zeros(len(branches), TEXT), like.new_zeros(len(branches), GLYPHS)
    for i, branch in enumerate(branches):
        for states, mask, own in ((text, masks[0], branch.text), (glyphs, masks[1], branch.glyphs)):
            if own is not None:
                states[i, : len(own)] = own
                mask[i, : len(own)] = 1
    return {
        "hidden_states": torch.stack([branch.latents for branch in branches]),
        "timestep": torch.stack([branch.timestep for branch in branches]),
        "encoder_hidden_states": text,
        "encoder_attention_mask": masks[0],
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": masks[1],
        "image_embeds": like.new_zeros(len(branches), IMAGE, config.image_embed_dim),
    }


# -- measured --------------------------------------------------------------------------------------


def tiny15() -> Any:
    """The tests' small models."""
    sys.path.append(str(TESTS))
    import tiny15 as module

    return module


def latent_shape(height: int, width: int, frames: int) -> tuple[int, int, int]:
    return (frames - 1) // 4 + 1, height // 16, width // 16


def forwards(model: Any, batches: list[dict[str, Tensor]]) -> object:
    return [model(**inputs, return_dict=False)[0] for inputs in batches]


def step_cells(batches: list[int], repeats: int) -> Iterator[Cell]:
    """One step of the transformer, both branches of every video."""
    reference = tiny15().transformer(**NETWORK)
    ours = HunyuanVideo15Transformer3DModel.from_config(reference.config).eval()
    ours.load_state_dict(reference.state_dict())
    repaired = copy.deepcopy(reference)
    repairs.NETWORK.repair(repaired)
    for size in SHAPES:
        shape = latent_shape(*size)
        for batch in batches:
            torch.manual_seed(0)
            branches = branches_of(ours.config, shape, batch)
            two = [padded(branches[of::2], ours.config) for of in (0, 1)]

            ways: Ways = {
                "diffusers": partial(forwards, reference, two),
                "repaired": partial(forwards, repaired, two),
                "exact": partial(ours, packs=[[branch] for branch in branches]),
                "packed": partial(ours, packs=[branches]),
            }
            seconds, peaks = measure(ways, repeats)
            name = "×".join(map(str, size))
            yield Cell("step", name, batch, shape[0] * shape[1] * shape[2], repeats, seconds, peaks)


def clip_cells(batches: list[int], repeats: int) -> Iterator[Cell]:
    """From prompts to frames: encoding, steps and decoding."""
    tiny = tiny15()
    pipe = tiny.pipeline("text", **NETWORK)
    pipe.set_progress_bar_config(disable=True)
    model = tiny.model(tiny.pipeline("image", **NETWORK))
    prompts = ("a cat", 'a sign that says "go" at night', "two horses running on the sea", "a yellow star")
    for height, width, frames in CLIPS:
        for batch in batches:
            asked = [
                VideoRequest(prompt=prompt, seed=i, steps=STEPS, height=height, width=width, frames=frames)
                for i, prompt in enumerate(prompts[:batch])
            ]

            ways: Ways = {
                "diffusers": partial(by_diffusers, pipe, asked),
                "exact": partial(by_engine, model, asked, "exact"),
                "packed": partial(by_engine, model, asked, "packed"),
            }
            seconds, peaks = measure(ways, repeats)
            rows = latent_shape(height, width, frames)
            name = f"{height}×{width}×{frames}"
            yield Cell("prompts to frames", name, batch, rows[0] * rows[1] * rows[2], repeats, seconds, peaks)


def by_engine(model: Any, asked: list[VideoRequest], isolation: Any) -> object:
    model.family.forget()  # each run encodes its prompts anew, as Diffusers does
    return Engine(model, isolation=isolation, max_batch_size=len(asked)).generate(asked)


def by_diffusers(pipe: HunyuanVideo15Pipeline, asked: list[VideoRequest]) -> object:
    sizes = ("height", "width", "num_frames")
    return [
        pipe(
            request.prompt,
            **dict(zip(sizes, request.size, strict=True)),
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
        )
        for request in asked
    ]


# -- tables ----------------------------------------------------------------------------------------

WHO = ("diffusers", "repaired", "exact", "packed")
HEADER = (
    "| part | shape | tokens | batch | Diffusers s | repaired s | exact s | packed s | exact × | packed × "
    "| Diffusers peak | repaired peak | exact peak | packed peak |\n" + "|---" * 14 + "|"
)


def binary(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def row(cell: Cell) -> str:
    seconds = [f"{cell.seconds[who]:.3f}" if who in cell.seconds else "–" for who in WHO]
    ratios = [f"**{cell.seconds['diffusers'] / cell.seconds[who]:.2f}**" for who in ("exact", "packed")]
    peaks = [binary(cell.peaks[who]) if who in cell.peaks else "–" for who in WHO]
    parts = [cell.part, cell.shape, str(cell.tokens), str(cell.batch), *seconds, *ratios, *peaks]
    return f"| {' | '.join(parts)} |"


def about() -> str:
    """Date, processor and versions."""
    text = f"{date.today()}, {device_name('cpu')}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{text}, transformers {version('transformers')}"


def main(
    part: Annotated[list[str], typer.Option(help="step or clips.")] = ["step", "clips"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 2, 4],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Rounds that are timed.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the table and its figures go.")] = RESULTS,
) -> None:
    """Runs the comparison, prints its table and keeps it under benchmarks/results/."""
    torch.set_num_threads(1)
    cells: list[Cell] = []
    print(HEADER)
    with torch.no_grad():
        for name, made in (("step", step_cells), ("clips", clip_cells)):
            for cell in made(batch, repeats) if name in part else ():
                print(row(cell), flush=True)
                cells.append(cell)
                keep(out / "vs_diffusers15_cpu", __doc__, [HEADER, *map(row, cells)], [asdict(each) for each in cells])


def keep(stem: Path, what: str, lines: list[str], figures: list[dict[str, Any]]) -> None:
    """Writes a table and its figures."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    title = f"# reelbatch against Diffusers, HunyuanVideo 1.5\n\n{about()}\n\n{what.strip()}\n\n"
    stem.with_suffix(".md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps({"about": about(), "cells": figures}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
