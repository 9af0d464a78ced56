"""Where the time of one step goes, by kind of operation, for reelbatch and for Diffusers.

python benchmarks/where_time_goes.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import typer
from diffusers import HunyuanVideoTransformer3DModel as Reference
from torch.profiler import ProfilerActivity, profile
from vs_diffusers import transformer_ways

from reelbatch.device import device_name
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

RESULTS = Path(__file__).parent / "results"
CASES = (((3, 8, 8), 8), ((3, 32, 32), 8), ((5, 64, 64), 1))
KINDS = {
    "matrix products": ("addmm", "mm", "bmm", "baddbmm", "mkldnn_linear"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "GELU and SiLU": ("gelu", "silu"),
    "norms": ("native_layer_norm", "pow", "rsqrt", "mean", "sum"),
    "joining and copying": ("cat", "copy_", "clone"),
    "multiplying and adding": ("mul", "mul_", "add", "add_", "addcmul", "div", "div_"),
}


def shares(step: Callable[[], object], repeats: int = 5) -> tuple[float, dict[str, float]]:
    """Milliseconds a step, and the share of each kind; the rest is calls, views and small operations."""
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(repeats):
            step()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), "the rest")
        spent[kind] += event.self_cpu_time_total
    total = spent.total()
    return total / repeats / 1000, {kind: spent[kind] / total for kind in (*KINDS, "the rest")}


def main() -> None:
    """Profiles three shapes in fp32 and keeps the table under benchmarks/results/."""
    folder = DEMO_FOLDER / "transformer"
    reference = Reference.from_pretrained(folder).eval()
    ours = HunyuanVideoTransformer3DModel.from_pretrained(folder).eval()
    lines = [
        "# Where the time of one step goes",
        "",
        f"{date.today()}, {device_name('cpu')}, torch {torch.__version__}, fp32, profiler on (so slower than timed)",
        "",
        "| shape | batch | way | ms | " + " | ".join((*KINDS, "the rest")) + " |",
        "|" + "---|" * (len(KINDS) + 5),
    ]
    with torch.no_grad():
        for shape, batch in CASES:
            for name, step in transformer_ways(reference, ours, shape, batch)[0].items():
                milliseconds, parts = shares(step)
                cells = " | ".join(f"{share:.0%}" for share in parts.values())
                lines.append(f"| {'×'.join(map(str, shape))} | {batch} | {name} | {milliseconds:.0f} | {cells} |")
    text = "\n".join(lines)
    print(text)
    (RESULTS / "where_time_goes.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
