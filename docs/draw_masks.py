"""Draws the pictures of docs/masks.md, from the masks and rules that the package itself reads.

python docs/draw_masks.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from reelbatch.attention import FORMS, Rule, Sizes, SlidingTile, canonical, own_frame, own_pixel
from reelbatch.attention.rules import coordinates

matplotlib.use("Agg")
FOLDER = Path(__file__).parent / "masks"
SIZES = Sizes(batch=2, heads=3, queries=4, keys=6)
NAMES = {"B": "samples", "H": "heads", "Q": "queries", "K": "keys"}
MAY, MAY_NOT, ASKING = "#2f6fb0", "#e9ecf0", "#e07b00"
COLORS = ListedColormap([MAY_NOT, MAY, ASKING])
SAME = {
    "K": "one row for all",
    "BK": "a row a sample",
    "QK": "one grid for all",
    "HQK": "a grid a head",
    "BQK": "a grid a sample",
    "BHQK": "every grid its own",
}


def grid(axes: Axes, cells: Tensor) -> None:
    """A grid of cells with lines between them."""
    axes.imshow(cells.int(), cmap=COLORS, vmin=0, vmax=2, aspect="equal")
    rows, columns = cells.shape
    axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#9aa3ad")


def draw_form(form: str) -> None:
    """The tensor as it is held, on the left, and what it says to every sample and head, on the right."""
    batch, heads, queries, keys = SIZES
    generator = torch.Generator().manual_seed(FORMS.index(form))
    mask = torch.rand(SIZES.of(form), generator=generator) < 0.55
    meaning = canonical(mask, SIZES).expand(SIZES)

    leading = form[:-2] if form.endswith("QK") else ""  # axes that make several grids of it
    held = mask.reshape(-1, mask.shape[-2] if mask.ndim > 1 else 1, keys)
    columns = heads if "H" in leading else 1
    rows = len(held) // columns

    figure = Figure(figsize=(11.5, 4.0), layout="constrained")
    figure.supxlabel("blue: the query may attend to the key; grey: it may not", fontsize=9, color="#5b6570")
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.0), wspace=0.06)
    shape = ", ".join(f"{axis} = {size}" for axis, size in zip(form, mask.shape, strict=True))
    left.suptitle(f"the mask you hold:  [{shape}]", fontsize=12, fontweight="bold")
    right.suptitle(f"what it says:  {SAME[form]}", fontsize=12, fontweight="bold")

    for place, axes in enumerate(left.subplots(rows, columns, squeeze=False).flat):
        grid(axes, held[place])
        of = {"B": place // columns if "B" in leading else None, "H": place % columns if "H" in leading else None}
        axes.set_title(", ".join(f"{NAMES[a][:-1]} {of[a]}" for a in "BH" if of[a] is not None), fontsize=9)
        if place >= len(held) - columns:
            axes.set_xlabel(f"keys (K = {keys})", fontsize=9)
        if place % columns == 0 and held.shape[1] > 1:
            axis = form[-2]
            axes.set_ylabel(f"{NAMES[axis]} ({axis} = {held.shape[1]})", fontsize=9)
    for place, axes in enumerate(right.subplots(batch, heads, squeeze=False).flat):
        sample, head = divmod(place, heads)
        grid(axes, meaning[sample, head])
        axes.set_title(f"sample {sample}, head {head}", fontsize=9)
        if sample == batch - 1:
            axes.set_xlabel(f"keys (K = {keys})", fontsize=9)
        if head == 0:
            axes.set_ylabel(f"queries (Q = {queries})", fontsize=9)
    figure.savefig(FOLDER / f"{form}.png", dpi=80)


PATCHES, TEXT = (4, 8, 8), 8
QUERY = (1, 2, 5)
"""Frame, row and column of the token that asks."""
RULES: dict[str, tuple[Rule, str]] = {
    "own_frame": (own_frame, "own_frame: its own frame, and the text"),
    "own_pixel": (own_pixel, "own_pixel: its own place in every frame, and the text"),
    "sliding_tile": (
        SlidingTile(frames=1, rows=2, columns=2, reach=1),
        "SlidingTile(frames=1, rows=2, columns=2, reach=1): the tiles (framed) around its own, and the text",
    ),
}


def draw_rule(name: str) -> None:
    """What one token sees, frame by frame, and the mask over all tokens."""
    rule, title = RULES[name]
    tokens = coordinates(PATCHES, TEXT, torch.device("cpu"))
    seen = rule(tokens.as_queries(), tokens)
    frames, rows, columns = PATCHES
    video = frames * rows * columns
    asking = (QUERY[0] * rows + QUERY[1]) * columns + QUERY[2]
    shown = seen[asking].int()
    shown[asking] = 2

    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(2.0, 1.0))
    left.supxlabel(
        f"blue: what the orange token (frame {QUERY[0]}, row {QUERY[1]}, column {QUERY[2]}) sees", fontsize=10
    )
    plots = left.subplots(1, frames + 1, width_ratios=(*[columns] * frames, 1.2))
    for frame, axes in enumerate(plots[:frames]):
        grid(axes, shown[:video].reshape(PATCHES)[frame])
        if isinstance(rule, SlidingTile):
            for row in range(0, rows, rule.rows):
                for column in range(0, columns, rule.columns):
                    corner = (column - 0.5, row - 0.5)
                    tile = Rectangle(corner, rule.columns, rule.rows, fill=False, edgecolor="#20262e", linewidth=1.4)
                    tile.set_zorder(3)
                    axes.add_patch(tile)
            axes.set_xlim(-0.6, columns - 0.4)
            axes.set_ylim(rows - 0.4, -0.6)
        axes.set_title(f"frame {frame}", fontsize=9)
        axes.set_xlabel(f"columns ({columns})", fontsize=9)
    plots[0].set_ylabel(f"rows ({rows})", fontsize=9)
    grid(plots[frames], shown[video:, None])
    plots[frames].set_title(f"text ({TEXT})", fontsize=9)

    axes = right.subplots()
    matrix = seen.int()
    matrix[asking][seen[asking]] = 2
    axes.imshow(matrix, cmap=COLORS, vmin=0, vmax=2, interpolation="nearest")
    starts = [*range(0, video, rows * columns), video]
    labels = [*(f"frame {frame}" for frame in range(frames)), "text"]
    axes.set_xticks([start + (rows * columns if start < video else TEXT) // 2 for start in starts], labels, fontsize=8)
    axes.set_yticks([start + (rows * columns if start < video else TEXT) // 2 for start in starts], labels, fontsize=8)
    axes.tick_params(length=0)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=0.8)
        axes.axvline(start - 0.5, color="white", linewidth=0.8)
    axes.set_xlabel(f"keys (K = {video + TEXT})", fontsize=9)
    axes.set_ylabel(f"queries (Q = {video + TEXT})", fontsize=9)
    axes.set_title(f"the mask: {1 - seen.float().mean():.0%} of the pairs are left out", fontsize=9)
    figure.savefig(FOLDER / f"{name}.png", dpi=80)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for form in FORMS:
        draw_form(form)
    for name in RULES:
        draw_rule(name)
