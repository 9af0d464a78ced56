"""What rules save: attention under rules of several densities against attention without, and with a mask tensor.

    python benchmarks/masks.py                    # 8,320 tokens, four heads of 128 channels
    python benchmarks/masks.py --no-flex          # without the minutes that FlexAttention takes to compile
    python benchmarks/masks.py --device cuda --heads 24 --frames 33 --height 45 --width 80 --dtype bf16

The ways run one after the other, again and again; a figure is the median, a ratio is the unmasked median over it
(2.00: twice as fast). *pairs* and *blocks* are the shares that are left out; blocks are what is not computed. *tensor*
has the same mask as a boolean `[heads, N, N]`. *once* is what is done once a shape: the rules compiled, and
FlexAttention's own first call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from vs_diffusers import DTYPES, device_name

from reelbatch.attention import (
    HeadRules,
    Setting,
    Sizes,
    SlidingTile,
    choose,
    compile_rules,
    own_frame,
    own_pixel,
    per_sample,
    ragged_attention,
)
from reelbatch.attention.rules import RuleMask

RESULTS = Path(__file__).parent / "results"
LARGEST_TENSOR = 2**32
"""Elements of the boolean mask up to which the mask tensor takes part."""


@dataclass
class Row:
    rule: str
    pairs: float
    blocks: float
    once: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)


def cases(heads: int, frames: int, height: int, width: int) -> dict[str, HeadRules]:
    everyone = range(heads)
    quarter = SlidingTile(max(frames // 4, 1), height, width, reach=0)
    return {
        "own_frame, half the heads": HeadRules({range(heads // 2): own_frame}),
        "SlidingTile, a quarter of the frames": HeadRules({everyone: quarter}),
        "own_pixel": HeadRules({everyone: own_pixel}),
        "own_frame and own_pixel, half each": HeadRules(
            {range(heads // 2): own_frame, range(heads // 2, heads): own_pixel}
        ),
        "own_frame": HeadRules({everyone: own_frame}),
    }


def timed(way: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def dense(mask: RuleMask, heads: int) -> Tensor:
    """The rules as a boolean tensor."""
    count = len(mask)
    out = torch.zeros(heads, count, count, dtype=torch.bool, device=mask.some.device)
    for call in mask.calls:
        allowed = mask.allowed(call)
        pairs = (mask.places(call.queries)[:, None], mask.places(call.keys))
        for head in call.heads.tolist():
            out[head][pairs] = torch.tensor(True) if allowed is None else allowed
    return out


def main(
    heads: int = 4,
    head_dim: int = 128,
    frames: int = 16,
    height: int = 16,
    width: int = 32,
    text: int = 128,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: str = "cpu",
    repeats: int = 3,
    flex: Annotated[bool, typer.Option(help="Whether FlexAttention takes part.")] = True,
    out: Path = RESULTS,
) -> None:
    """Runs the comparison, prints its table and keeps it under benchmarks/results/."""
    where, grid = torch.device(device), (frames, height, width)
    count = frames * height * width + text
    torch.manual_seed(0)
    query, key, value = (torch.randn(count, heads, head_dim, device=where).to(DTYPES[dtype]) for _ in range(3))
    torch._inductor.config.force_disable_caches = True  # so that the first call of FlexAttention tells what it costs
    backends = ["sdpa", "flex"] if flex else ["sdpa"]

    print(HEADER)
    rows = []
    for name, rules in cases(heads, *grid).items():
        compile_rules.cache_clear()
        started = time.perf_counter()
        mask = compile_rules(rules, heads, grid, text, where)
        assert mask is not None
        once = {"rules": time.perf_counter() - started}
        pairs = dense(mask, heads)
        row = Row(name, 1 - pairs.float().mean().item(), mask.masked, once)
        ways: dict[str, Callable[[], object]] = {
            "unmasked": lambda: ragged_attention(query, key, value, (count,)),
            **{
                backend: lambda backend=backend, mask=mask: ragged_attention(
                    query, key, value, (count,), [mask], backend
                )
                for backend in backends
            },
        }
        if pairs.numel() <= LARGEST_TENSOR:
            tensor = per_sample(pairs, Sizes(1, heads, count, count))
            ways["tensor"] = lambda tensor=tensor: ragged_attention(query, key, value, (count,), tensor)
        first = {way: timed(call, where) for way, call in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, call in ways.items():
                seconds[way].append(timed(call, where))
        row.seconds = {way: statistics.median(times) for way, times in seconds.items()}
        if flex:
            once["flex"] = first["flex"] - row.seconds["flex"]
        rows.append(row)
        print(told(row), flush=True)
    chosen = choose(Setting(where.type, DTYPES[dtype], "rules"))
    about = (
        f"{date.today()}, {device_name(device)}, torch {torch.__version__}. {count:,} tokens ({frames} × {height} × "
        f"{width} patches and {text} of text), {heads} heads of {head_dim} channels, {dtype}; medians of {repeats}. "
        f"Chosen here for rules: {chosen.backend.name}."
    )
    out.mkdir(parents=True, exist_ok=True)
    page = f"# Attention under rules\n\n{about}\n\n{__doc__.rpartition(chr(10) * 2)[2].strip()}\n\n{HEADER}\n"
    page += "\n".join(map(told, rows)) + "\n"
    (out / f"masks_{where.type}.md").write_text(page, encoding="utf-8")
    print(f"\n{about}")


HEADER = (
    "| rule | pairs | blocks | unmasked s | rules, sdpa s | × | rules, flex s | × | tensor s | × "
    "| once: rules s | once: flex s |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def told(row: Row) -> str:
    unmasked = row.seconds["unmasked"]
    cells = [row.rule, f"{row.pairs:.1%}", f"{row.blocks:.1%}", f"{unmasked:.3f}"]
    for way in ("sdpa", "flex", "tensor"):
        took = row.seconds.get(way)
        cells += ["–", "–"] if took is None else [f"{took:.3f}", f"**{unmasked / took:.2f}**"]
    cells += [f"{row.once[what]:.2f}" if what in row.once else "–" for what in ("rules", "flex")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
