"""Two versions of reelbatch, in turn on one machine: is anything slower?

    python benchmarks/two_versions.py OLD_SOURCE       # the checkout OLD_SOURCE against the one of this file
    python benchmarks/two_versions.py OLD_SOURCE --seconds 5 --threads 2

Each version is a process of its own that runs the bundled model; the processes take turns, repeat by repeat, so that
what disturbs the machine disturbs both. A figure is the median; a ratio is the new version's over the old one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

SHAPES = ((3, 8, 8), (3, 32, 32), (5, 64, 64))
"""Latent frames, height and width of the transformer's cells."""
CLIPS = ((64, 64, 9), (128, 128, 9))
"""Height, width and frames of the end-to-end cells."""
STEPS = 6
BATCHES = (1, 2, 4, 8)
MOST_TOKENS = 12_000
"""Of a cell; larger ones would take minutes a repeat."""
ISOLATIONS = ("exact", "packed")

WORKER = """
import json, sys, time
import torch
threads = int(sys.argv[1])
torch.set_num_threads(threads)
from reelbatch import Engine, HunyuanVideoTransformer3DModel, VideoRequest
try:
    from reelbatch.models.hunyuan_video.branch import Branch
    from reelbatch.loading.hub import DEMO_FOLDER
except ImportError:  # of version 0.1.0
    from reelbatch.models.branch import Branch
    from reelbatch.models.checkpoint import DEMO_FOLDER

network = HunyuanVideoTransformer3DModel.from_pretrained(DEMO_FOLDER / "transformer", dtype=torch.float32).eval()
config, engines = network.config, {}

def branches(shape, batch):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)
    lengths = [12 + round(19 * i / max(batch - 1, 1)) for i in range(batch)]
    return [
        Branch(draw(config.in_channels, *shape), draw(n, config.text_embed_dim), draw(config.pooled_projection_dim),
               torch.tensor(1000.0 - 100 * i), torch.tensor(6000.0))
        for i, n in enumerate(lengths)
    ]

def transformer(isolation, shape, batch):
    given = branches(shape, batch)
    packs = [[branch] for branch in given] if isolation == "exact" else [given]
    with torch.no_grad():
        started = time.perf_counter()
        network(packs=packs)
        return time.perf_counter() - started

def generate(isolation, size, batch, steps):
    engine = engines.get(isolation) or Engine.from_pretrained("demo", device="cpu", isolation=isolation)
    engines[isolation] = engine
    height, width, frames = size
    fields = dict(prompt="a large red circle moving left", height=height, width=width, frames=frames, steps=steps)
    asked = [VideoRequest(seed=i, **fields) for i in range(batch)]
    started = time.perf_counter()
    engine.generate(asked)
    return time.perf_counter() - started

for line in sys.stdin:
    part, isolation, shape, batch, steps = json.loads(line)
    network_alone = part == "transformer"
    seconds = transformer(isolation, shape, batch) if network_alone else generate(isolation, shape, batch, steps)
    print(json.dumps(seconds), flush=True)
"""


class Version:
    """A process that runs one version."""

    def __init__(self, source: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(threads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, cell: tuple[Any, ...]) -> float:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        return _ask(stdin, stdout, cell)


def _ask(stdin: IO[str], stdout: IO[str], cell: tuple[Any, ...]) -> float:
    stdin.write(json.dumps(cell) + "\n")
    stdin.flush()
    return float(json.loads(stdout.readline()))


def cells() -> list[tuple[Any, ...]]:
    transformer = [
        ("transformer", isolation, shape, batch, 1)
        for shape in SHAPES
        for batch in BATCHES
        if shape[0] * shape[1] * shape[2] // 4 * batch <= MOST_TOKENS
        for isolation in ISOLATIONS
    ]
    return transformer + [
        ("end to end", isolation, clip, batch, STEPS) for clip in CLIPS for batch in BATCHES for isolation in ISOLATIONS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each cell, at least five repeats")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    old, new = (Version(source, asked.threads) for source in (asked.old, Path(__file__).parents[1]))
    print("| | size | batch | isolation | repeats | before, s | now, s | now / before |")
    print("|---|---|---|---|---|---|---|---|")
    ratios: list[float] = []
    for cell in cells():
        times: dict[Version, list[float]] = {old: [], new: []}
        for version in (old, new):  # warm
            version.seconds(cell)
        started = time.perf_counter()
        while len(times[old]) < 5 or (time.perf_counter() - started < asked.seconds and len(times[old]) < 60):
            order = (old, new) if len(times[old]) % 2 else (new, old)
            for version in order:
                times[version].append(version.seconds(cell))
        before, now = statistics.median(times[old]), statistics.median(times[new])
        ratio = now / before
        ratios.append(ratio)
        part, isolation, shape, batch, _ = cell
        size = "×".join(map(str, shape))
        row = (part, size, batch, isolation, len(times[old]), f"{before:.4f}", f"{now:.4f}", f"{ratio:.3f}")
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print(
        f"\nslowest {max(ratios):.3f}, geometric mean {statistics.geometric_mean(ratios):.3f}, of {len(ratios)} cells"
    )


if __name__ == "__main__":
    main()
