"""Peak memory of one step against the length of the sequence: it grows with the tokens, not with their square.

    python benchmarks/memory.py

Every figure is a process of its own: its peak resident set during one forward, less its resident set before.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer

from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

RESULTS = Path(__file__).parent / "results"
LATENTS = ((4, 64, 64), (8, 64, 64), (16, 64, 64))
"""Latent frames, height and width: 4,096, 8,192 and 16,384 video tokens."""
TEXT_TOKENS = 20


def measure(frames: int, height: int, width: int) -> tuple[int, int]:
    """Tokens, and bytes at the peak of one forward; to be called in a fresh process."""
    model = HunyuanVideoTransformer3DModel.from_pretrained(DEMO_FOLDER / "transformer").eval()
    config = model.config
    branch = Branch(
        latents=torch.randn(config.in_channels, frames, height, width),
        text=torch.randn(TEXT_TOKENS, config.text_embed_dim),
        pooled=torch.randn(config.pooled_projection_dim),
        timestep=torch.tensor(500.0),
        guidance=torch.tensor(6000.0),
    )
    before = psutil.Process().memory_info().rss
    with torch.no_grad():
        model(packs=[[branch]])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    tokens = (frames // config.patch_size_t) * (height // config.patch_size) * (width // config.patch_size)
    return tokens + TEXT_TOKENS, peak - before


def main(child: Annotated[str, typer.Option(hidden=True)] = "") -> None:
    """Measures three lengths and prints the table that is kept under benchmarks/results/."""
    if child:
        print(*measure(*(int(size) for size in child.split(","))))
        return
    lines = [
        "# Peak memory of one step, by length",
        "",
        f"{date.today()}, CPU, fp32, torch {torch.__version__}, the bundled model",
        "",
        "| tokens | peak MiB | KiB a token | an N×N fp32 mask alone, MiB |",
        "|---|---|---|---|",
    ]
    for shape in LATENTS:
        call = [sys.executable, __file__, "--child", ",".join(map(str, shape))]
        tokens, peak = map(int, subprocess.run(call, check=True, capture_output=True, text=True).stdout.split())
        row = f"| {tokens} | {peak / 2**20:.0f} | {peak / tokens / 2**10:.1f} | {4 * tokens**2 / 2**20:.0f} |"
        lines.append(row)
    text = "\n".join(lines)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_by_length.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
