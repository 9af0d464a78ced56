"""Does the bundled model draw what it is asked? `python -m reelbatch.demo.evaluate --help`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import HunyuanVideoPipeline

from reelbatch.demo import shapes
from reelbatch.engine.engine import Engine
from reelbatch.engine.planner import Isolation
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.request import VideoRequest

Draw = Callable[[Sequence[VideoRequest]], list[shapes.Clip]]
"""Requests of one size to clips, in their order."""


@dataclass(frozen=True)
class Score:
    """Shares of attributes that were read back as asked."""

    clips: int
    attributes: dict[str, float]

    @property
    def all(self) -> float:
        return sum(self.attributes.values()) / len(self.attributes)


def prompts(count: int, seed: int = 1) -> tuple[list[tuple[shapes.Scene, str]], list[tuple[shapes.Scene, str]]]:
    """Scenes and captions, `count` in all: half of scenes seen in training, half of combinations never seen."""
    rng = random.Random(seed)

    def choose(scenes: list[shapes.Scene]) -> list[tuple[shapes.Scene, str]]:
        chosen = [rng.choice(scenes) for _ in range(count // 2)]
        return [(scene, shapes.caption(scene, rng.randrange(len(shapes.WORDINGS)))) for scene in chosen]

    seen, unseen = shapes.split()
    return choose(seen), choose(unseen)


def score(
    asked: Sequence[tuple[shapes.Scene, str]], draw: Draw, known: tuple[str, ...] = shapes.SHAPES, **fields: Any
) -> Score:
    """Makes a clip of every caption, with its place in the list as seed, and reads it back.

    Args:
        known: the shapes that the reader tells apart.
    """
    requests = [VideoRequest(prompt=caption, seed=seed, **fields) for seed, (_, caption) in enumerate(asked)]
    right = dict.fromkeys(shapes.ATTRIBUTES, 0)
    for (scene, _), clip in zip(asked, draw(requests), strict=True):
        for name, matches in shapes.read(clip, known).matches(scene).items():
            right[name] += matches
    return Score(len(asked), {name: count / len(asked) for name, count in right.items()})


def with_engine(
    batch: int, isolation: Isolation = "exact", model: str = "demo", lora: Sequence[tuple[str | Path, float]] = ()
) -> Draw:
    engine = Engine.from_pretrained(model, isolation=isolation, max_batch_size=batch, lora=lora)
    return lambda requests: [video.frames for video in engine.generate(requests)]


def with_diffusers(batch: int, model: str = str(DEMO_FOLDER)) -> Draw:
    pipeline = HunyuanVideoPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    profile = json.loads((DEMO_FOLDER / "reelbatch.json").read_text())["defaults"]

    def draw(requests: Sequence[VideoRequest]) -> list[shapes.Clip]:
        clips: list[shapes.Clip] = []
        for start in range(0, len(requests), batch):
            part = requests[start : start + batch]
            frames = pipeline(
                [request.prompt for request in part],
                height=part[0].height or profile["height"],
                width=part[0].width or profile["width"],
                num_frames=part[0].frames or profile["frames"],
                num_inference_steps=part[0].steps or profile["steps"],
                generator=[torch.Generator().manual_seed(request.seed) for request in part],
                output_type="np",
            ).frames
            clips += [(video * 255).round().astype("uint8") for video in frames]
        return clips

    return draw


def main(
    count: Annotated[int, typer.Option("--prompts", help="How many; half are combinations never trained on.")] = 200,
    batch: Annotated[int, typer.Option(help="Videos that share a step.")] = 8,
    by: Annotated[str, typer.Option(help="exact, packed or diffusers.")] = "exact",
    model: Annotated[str, typer.Option(help="demo, or a folder of the same kind.")] = "demo",
    height: Annotated[int, typer.Option()] = 64,
    width: Annotated[int, typer.Option()] = 64,
    frames: Annotated[int, typer.Option()] = 9,
    steps: Annotated[int, typer.Option()] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Makes videos of captions and reads colour, shape, size, motion and background back from their frames."""
    folder = str(DEMO_FOLDER) if model == "demo" else model
    isolation: Literal["exact", "packed"] = "packed" if by == "packed" else "exact"
    draw = with_diffusers(batch, folder) if by == "diffusers" else with_engine(batch, isolation, model)
    seen, unseen = prompts(count)
    sizes: dict[str, Any] = {"height": height, "width": width, "frames": frames, "steps": steps}
    scores = {"seen": score(seen, draw, **sizes), "unseen": score(unseen, draw, **sizes)}
    total = sum(score.all for score in scores.values()) / len(scores)
    if as_json:
        typer.echo(json.dumps({name: {**score.attributes, "all": score.all} for name, score in scores.items()}))
        return
    typer.echo("combinations  " + "  ".join(f"{name:>10}" for name in (*shapes.ATTRIBUTES, "all")))
    for name, one in scores.items():
        shares = (*one.attributes.values(), one.all)
        typer.echo(f"{name:<12}  " + "  ".join(f"{share:>10.1%}" for share in shares))
    typer.echo(
        f"{total:.2%} of all attributes of {count} clips read back as asked ({by}, batch {batch}, {steps} steps)"
    )


if __name__ == "__main__":
    typer.run(main)
