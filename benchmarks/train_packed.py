"""Training on clips of mixed sizes: packed (reelbatch), padded to the largest (Diffusers), and one by one (Diffusers).

    python benchmarks/train_packed.py                      # the bundled model, on the CPU
    python benchmarks/train_packed.py --device cuda --dtype bf16 --model /models/HunyuanVideo

A step is forward, backward and AdamW (at a rate of 0, so that all see the same weights) over the same samples, the same
noise and the same flow-matching loss. The three take turns, again and again; the figure is the median, and a ratio is
the other's median over that of packed (2.00: packed is twice as fast).

Padded is what can be done with Diffusers' class: latents are filled with zeros to the largest frames, height and width
of the batch, texts to the longest, with its mask of text tokens, and the loss leaves the filling out. Its attention has
no mask of video tokens, so the filling is attended to: the loss it minimises is not the loss of its samples. One by one
has no filling and is right, a sample after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from diffusers import HunyuanVideoTransformer3DModel as Reference
from torch import Tensor

from reelbatch.device import device_name
from reelbatch.loading.hub import resolve
from reelbatch.models.hunyuan_video.family import HunyuanVideo
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.train.flow_matching import TIMESTEPS, Example, flow_matching_loss

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIXES = {
    "all alike": ((3, 8, 8),) * 8,
    "mixed lengths": ((1, 8, 8), (2, 8, 8), (3, 8, 8), (4, 8, 8), (5, 8, 8), (6, 8, 8), (8, 8, 8), (9, 8, 8)),
    "mixed sizes and lengths": (
        (1, 16, 16),
        (2, 8, 8),
        (3, 8, 12),
        (4, 12, 8),
        (3, 16, 16),
        (6, 8, 8),
        (2, 16, 24),
        (9, 8, 8),
    ),
}
"""Latent frames, height and width of the samples of a step; --times makes height and width so many times larger."""
TEXT = (9, 15, 21, 12, 30, 18, 11, 24)
"""Text tokens of the samples."""

Way = Literal["packed", "padded", "one by one"]


def samples(shapes: Sequence[tuple[int, int, int]], config, device: str) -> tuple[list[Example], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    examples = [
        Example(
            draw(config.in_channels, *shape),
            {"text": draw(text, config.text_embed_dim), "pooled": draw(config.pooled_projection_dim)},
        )
        for shape, text in zip(shapes, TEXT, strict=True)
    ]
    return examples, [draw(*one.latents.shape) for one in examples]


def fill(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros after the end of every dimension, up to these sizes."""
    missing = [size - have for size, have in zip(sizes, tensor.shape, strict=True)]
    return F.pad(tensor, [part for size in reversed(missing) for part in (0, size)])


def padded_loss(
    network: Reference, examples: Sequence[Example], sigmas: Tensor, noise: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """The flow-matching loss of each sample, over a batch filled up to one size."""
    largest = [max(sizes) for sizes in zip(*(one.latents.shape for one in examples), strict=True)]
    longest = max(len(one.conditioning["text"]) for one in examples)
    latents = torch.stack([fill(one.latents, largest) for one in examples])
    eps = torch.stack([fill(one, largest) for one in noise])
    real = torch.stack([fill(torch.ones_like(one.latents), largest) for one in examples])
    texts = [one.conditioning["text"] for one in examples]
    mask = torch.stack([fill(torch.ones(len(text), device=text.device), (longest,)) for text in texts])
    text = torch.stack([fill(text, (longest, text.shape[1])) for text in texts])
    level = sigmas[:, None, None, None, None]
    velocity = network(
        hidden_states=((1 - level) * latents + level * eps).to(dtype),
        timestep=sigmas * TIMESTEPS,
        encoder_hidden_states=text.to(dtype),
        encoder_attention_mask=mask.bool(),
        pooled_projections=torch.stack([one.conditioning["pooled"] for one in examples]).to(dtype),
        guidance=torch.full_like(sigmas, TIMESTEPS).to(dtype),
        return_dict=False,
    )[0]
    errors = (velocity.float() - (eps - latents)).square() * real
    return errors.flatten(1).sum(1) / real.flatten(1).sum(1)


def ways_of(
    ours: HunyuanVideoTransformer3DModel, theirs: Reference, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype
) -> dict[Way, Callable[[], float]]:
    device = str(ours.device)
    examples, noise = samples(shapes, ours.config, device)
    sigmas = torch.linspace(0.1, 0.9, len(examples), device=device)
    ones = torch.ones_like(sigmas)
    optimizers = {id(network): torch.optim.AdamW(network.parameters(), lr=0.0) for network in (ours, theirs)}

    def end(network: torch.nn.Module) -> None:
        optimizers[id(network)].step()
        optimizers[id(network)].zero_grad()

    def packed() -> float:
        loss = flow_matching_loss(ours, HunyuanVideo.training_branch, examples, sigmas, ones, noise, dtype).mean()
        loss.backward()
        end(ours)
        return float(loss.detach())

    def padded() -> float:
        loss = padded_loss(theirs, examples, sigmas, noise, dtype).mean()
        loss.backward()
        end(theirs)
        return float(loss.detach())

    def alone() -> float:
        total = 0.0
        for i, one in enumerate(examples):
            loss = padded_loss(theirs, [one], sigmas[i : i + 1], noise[i : i + 1], dtype).mean() / len(examples)
            loss.backward()
            total += float(loss.detach())
        end(theirs)
        return total

    return {"packed": packed, "padded": padded, "one by one": alone}


def measure(
    ways: dict[Way, Callable[[], float]], budget: float, device: str
) -> tuple[dict[Way, float], dict[Way, float]]:
    """Median seconds of each way, in turn after a warm-up, and its first loss."""

    def run(way: Callable[[], float]) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        way()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    losses = {name: way() for name, way in ways.items()}
    seconds: dict[Way, list[float]] = {name: [] for name in ways}
    started, repeats = time.perf_counter(), 0
    while repeats < 3 or (time.perf_counter() - started < budget and repeats < 25):
        for name, way in ways.items():
            seconds[name].append(run(way))
        repeats += 1
    return {name: statistics.median(times) for name, times in seconds.items()}, losses


def main(
    model: Annotated[str, typer.Option(help="demo, or a folder in the Diffusers layout.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of weights and activations.")] = "fp32",
    times: Annotated[int, typer.Option(min=1, help="Factor of height and width.")] = 1,
    budget: Annotated[float, typer.Option(help="Seconds of measuring a row.")] = 60,
    keep: Annotated[bool, typer.Option("--keep", help="Write the table to benchmarks/results.")] = False,
) -> None:
    """Measure a training step three ways, and print the table."""
    folder = resolve(model) / "transformer"
    loaded = {"torch_dtype": DTYPES[dtype]}
    ours = HunyuanVideoTransformer3DModel.from_pretrained(folder, **loaded).to(device).train()
    theirs = Reference.from_pretrained(folder, **loaded).to(device).train()
    lines = [
        "# A training step on clips of mixed sizes",
        "",
        f"{date.today()}, {device_name(device)}, {dtype}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, diffusers {version('diffusers')}, {model}",
        "",
        "| samples of a step | rows | rows padded | packed samples/s | padded | one by one | loss packed | padded | "
        "one by one |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    patch = ours.config.patch_size
    for name, mix in MIXES.items():
        shapes = [(frames, height * times, width * times) for frames, height, width in mix]
        seconds, losses = measure(ways_of(ours, theirs, shapes, DTYPES[dtype]), budget, device)
        rows = [frames * (height // patch) * (width // patch) for frames, height, width in shapes]
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        filled = len(shapes) * (largest[0] * (largest[1] // patch) * (largest[2] // patch) + max(TEXT))
        lines.append(
            f"| {name} | {sum(rows) + sum(TEXT):,} | {filled:,} | {len(shapes) / seconds['packed']:.2f} "
            f"| {seconds['padded'] / seconds['packed']:.2f}× | {seconds['one by one'] / seconds['packed']:.2f}× "
            f"| {losses['packed']:.4f} | {losses['padded']:.4f} | {losses['one by one']:.4f} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"train_packed_{device}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
