"""A LoRA teaches the bundled model a word from 64 clips: can it do it before, can it after, and what does it forget?

    python benchmarks/lora_new_word.py                 # about 15 minutes of training, and the looks before and after
    python benchmarks/lora_new_word.py --minutes 2 --prompts 16 --out out/new-word

The word is "bar", three times as wide as high. The bundled model was trained on circles, squares, triangles and
crosses, and its tokenizers have no token for the word. Nothing is unknown to them, though: they spell it, the Llama
tokenizer in the bytes ` `, `b`, `a`, `r`, CLIP's in pieces too. No caption that the text encoders were trained on had
these tokens, so their embeddings are the random ones they started with; but they are embeddings, and the pooled vector
of a caption with the word lies about as far from those with the known shapes' names as these lie from each other. That
is enough to condition on: the encoders stay as they are, and only the transformer learns what the word looks like.

What would not do: a new colour (the VAE was trained on eight, and decodes a pink shape as a yellow one), and a shape
that the model draws by mistake anyway (asked for a "diamond", it draws what is sometimes read as one).

Taught with these clips alone, the model would draw bars whatever it is asked. So it is also shown 48 videos that it
made itself of words it knows (prior preservation: DreamBooth, arXiv 2208.12242, section 3.2); making them is part of
the time.

Training is `reelbatch.train` with the settings below, as the command runs it. Colour, shape, size, motion and
background are read back from the frames by `reelbatch.demo.shapes.read`, which here tells five shapes apart.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from reelbatch import VideoRequest
from reelbatch.demo import shapes
from reelbatch.demo.evaluate import Score, prompts, score, with_engine
from reelbatch.device import device_name
from reelbatch.train.config import make_config
from reelbatch.train.loop import train

RESULTS = Path(__file__).parent / "results"
WORD = "bar"
CLIPS = 64
HELD_OUT_SHARE = 0.25
"""Of the word's combinations with colour, size, motion and background: no clip shows them, half of the prompts ask."""
OWN_CLIPS = 48
"""Videos of old words that the model makes itself."""
SIZES = ((64, 64, 9),) * 5 + ((64, 96, 9),) * 2 + ((64, 64, 13),) * 2 + ((64, 64, 5),)
"""Height, width and frames of all these, in these proportions: the small ones, for the minutes that there are."""
STEPS = 1000
SETTINGS: dict[str, Any] = {
    "rank": 16,
    "targets": ["attention", "mlp", "refiner", "embedders"],
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 20,
    "batch_size": 16,
    "flow_shift": 3.0,
    "guidance": 1.0,
    "guidance_max": 8.0,
    "caption_dropout": 0.0,
    "ema_decay": 0.99,
    "max_frames": 13,
    "max_pixels": 6144,
    "save_every": 0,
    "log_every": 20,
    "device": "cpu",
}
BATCH = 8


def own_clips(folder: Path) -> Path:
    """What the model makes of captions that it was trained on, before it is taught anything new."""
    rng = random.Random(3)
    asked = [
        shapes.caption(rng.choice(shapes.split()[0]), rng.randrange(len(shapes.WORDINGS))) for _ in range(OWN_CLIPS)
    ]
    sizes = [SIZES[i % len(SIZES)] for i in range(OWN_CLIPS)]
    requests = [
        VideoRequest(prompt=caption, seed=10_000 + i, height=height, width=width, frames=frames)
        for i, (caption, (height, width, frames)) in enumerate(zip(asked, sizes, strict=True))
    ]
    clips = with_engine(BATCH, "packed")(requests)
    return shapes.write_clips(folder, ((clip, [caption]) for clip, caption in zip(clips, asked, strict=True)))


def combinations() -> tuple[list[shapes.Scene], list[shapes.Scene]]:
    """Scenes of the new shape: those that clips may show, and those that none shows."""
    everything = [
        shapes.Scene(color, WORD, size, motion, background)
        for color in shapes.COLORS
        for size in shapes.SIZES
        for motion in shapes.MOTIONS
        for background in shapes.BACKGROUNDS
    ]
    random.Random(0).shuffle(everything)
    count = round(len(everything) * HELD_OUT_SHARE)
    return everything[count:], everything[:count]


def asked_for(count: int) -> list[tuple[shapes.Scene, str]]:
    """Captions with the word, half of them of combinations that no clip shows."""
    rng = random.Random(1)
    shown, held_out = combinations()
    scenes = [rng.choice(shown) for _ in range(count // 2)] + [rng.choice(held_out) for _ in range(count - count // 2)]
    return [(scene, shapes.caption(scene, rng.randrange(len(shapes.WORDINGS)))) for scene in scenes]


def look(count: int, lora: list[tuple[str | Path, float]]) -> dict[str, Score]:
    """What the model makes of the word, and of the words that it knew."""
    known = shapes.SHAPES + shapes.NEW_SHAPES
    draw = with_engine(BATCH, "packed", lora=lora)
    seen, unseen = prompts(count)
    return {WORD: score(asked_for(count), draw, known), "old words": score(seen + unseen, draw, known)}


def table(looks: dict[str, dict[str, Score]]) -> str:
    lines = [f"{'asked for':<12}{'':<10}" + "".join(f"{name:>12}" for name in (*shapes.ATTRIBUTES, "all"))]
    for what in (WORD, "old words"):
        for when, found in looks.items():
            shares = (*found[what].attributes.values(), found[what].all)
            lines.append(f"{what:<12}{when:<10}" + "".join(f"{share:>12.1%}" for share in shares))
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the clips and the run.")] = Path("out/new-word"),
    count: Annotated[int, typer.Option("--prompts", help="Of the new word, and as many of the old.")] = 80,
    steps: Annotated[int, typer.Option(help="Training steps.")] = STEPS,
    minutes: Annotated[float, typer.Option(help="Training ends after so long at the latest.")] = 15,
    keep: Annotated[bool, typer.Option("--keep", help="Write the figures to benchmarks/results.")] = False,
) -> None:
    """Teach the word, and print what is read back before and after."""
    data = shapes.write_folder(out / "clips", CLIPS, combinations()[0], seed=5, sizes=SIZES)
    looks = {"before": look(count, [])}
    typer.echo(table(looks))
    started = time.monotonic()
    own = own_clips(out / "own")
    run = {"data": [data, own], "out": out / time.strftime("run-%Y%m%d-%H%M%S"), "steps": steps}
    config = make_config(SETTINGS | run)
    result = train(config, typer.echo, should_stop=lambda: time.monotonic() - started > 60 * minutes)
    seconds = time.monotonic() - started
    assert result.weights is not None
    looks["after"] = look(count, [(result.weights, 1.0)])
    typer.echo(f"\n{CLIPS} clips, {result.steps} steps, {seconds / 60:.1f} minutes in all, {count} prompts each\n")
    typer.echo(table(looks))
    if keep:
        record = {
            "date": str(date.today()),
            "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
            "settings": SETTINGS,
            "steps": result.steps,
            "seconds": seconds,
            "prompts": count,
            "looks": {
                when: {what: asdict(one) | {"all": one.all} for what, one in scores.items()}
                for when, scores in looks.items()
            },
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "lora_new_word.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
