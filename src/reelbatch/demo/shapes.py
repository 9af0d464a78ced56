"""The little world of the bundled model: one flat shape that moves (or rests) above a grey floor.

`draw` makes a clip of a `Scene`, `caption` puts the scene into words, and `read` looks at a clip, drawn or
generated, and says which scene is in it, by plain image processing. Clips are `uint8 [frames, height, width, 3]`.

`python -m reelbatch.demo.shapes --out FOLDER --clips N` writes clips with their captions, for `reelbatch train`.

Every length below is in pixels of a picture whose shorter side is 64; other sizes scale with that side.
The floor is not decoration: the VAE's group norms erase the brightness of a nearly uniform picture, so every
scene carries a fixed contrast that tells its background apart.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

Clip = NDArray[np.uint8]
Mask = NDArray[np.float32]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 20, 30),
    "orange": (255, 128, 0),
    "yellow": (250, 230, 20),
    "green": (20, 165, 50),
    "cyan": (30, 220, 235),
    "blue": (25, 50, 225),
    "purple": (165, 30, 200),
    "brown": (120, 65, 15),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "white": (255, 255, 255)}
SIZES: dict[str, float] = {"small": 8.0, "large": 14.0}  # half the extent
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
NEW_SHAPES: tuple[str, ...] = ("bar",)
"""Drawn and read like the others, but in none of the bundled model's clips or captions: for teaching it something."""
MOTIONS: dict[str, tuple[int, int]] = {  # direction (x to the right, y down)
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}

REFERENCE_SIDE = 64
FLOOR_HEIGHT = 8.0
FLOOR_COLOR = (128, 128, 128)
SPEED = 2.0  # per frame: 16 px in 9 frames, 8 px in 5
LONGEST_TRAVEL = 20.0  # so that long clips keep the shape inside the picture
JITTER = 2.0  # how far a clip's path may be off the middle, where there is room
GAP = 2.0  # between the shape and the floor or the picture's edge

CLEAR_ENOUGH = 0.55  # overlap with the nearest template below which a shape is not recognised


@dataclass(frozen=True)
class Scene:
    """What a clip shows: a combination of the five attributes, each by its name."""

    color: str
    shape: str
    size: str
    motion: str
    background: str

    def attributes_in(self, clip: Clip) -> list[bool]:
        """Whether `read` sees each attribute in a clip."""
        return list(read(clip).matches(self).values())


@dataclass(frozen=True)
class Attributes:
    """What `read` sees in a clip; None where nothing could be made out."""

    color: str | None
    shape: str | None
    size: str | None
    motion: str | None
    background: str | None

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Each attribute's name, and whether it is as the scene asked."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


ATTRIBUTES: tuple[str, ...] = ("color", "shape", "size", "motion", "background")


def scenes() -> list[Scene]:
    """All 640 combinations, in a fixed order."""
    return [Scene(*names) for names in itertools.product(COLORS, SHAPES, SIZES, MOTIONS, BACKGROUNDS)]


def split(seed: int = 0, held_out: float = 0.25) -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on, and scenes that training never sees (the share `held_out` of all), drawn by `seed`."""
    everything = scenes()
    order = np.random.default_rng(seed).permutation(len(everything))
    count = round(len(everything) * held_out)
    return [everything[i] for i in sorted(order[count:])], [everything[i] for i in sorted(order[:count])]


# Words ------------------------------------------------------------------------------------------------------------

_MOVING = {name: f"moving {name}" for name in MOTIONS if name != "still"} | {"still": "standing still"}
_GOING = {
    "left": "slides to the left",
    "right": "slides to the right",
    "up": "rises to the top",
    "down": "sinks to the bottom",
    "still": "does not move at all",
}
_SIZE_WORDS = {"small": "little", "large": "big"}

WORDINGS: tuple[Callable[[Scene], str], ...] = (
    lambda s: f"a {s.size} {s.color} {s.shape} {_MOVING[s.motion]} on a {s.background} background",
    lambda s: f"{s.size} {s.color} {s.shape}, {s.motion}, {s.background}",
    lambda s: (
        f"a video of a {_SIZE_WORDS[s.size]} {s.color} {s.shape} that {_GOING[s.motion]} "
        f"in front of a {s.background} background"
    ),
)


def caption(scene: Scene, wording: int = 0) -> str:
    """The scene in words; `wording` picks one of `WORDINGS` (middling, short, long)."""
    return WORDINGS[wording](scene)


# Drawing ----------------------------------------------------------------------------------------------------------


def _distance(shape: str, x: NDArray[np.floating], y: NDArray[np.floating], radius: float) -> NDArray[np.floating]:
    """Signed distance to the outline (negative inside) of a shape of half extent `radius` about the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius
    if shape == "triangle":  # as wide as high, tip up
        slope = (2 * np.abs(x) - (y + radius)) / np.sqrt(5.0)
        return np.maximum(slope, y - radius)
    if shape == "cross":
        arm = radius / 3
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
        level = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
        return np.minimum(upright, level)
    if shape == "bar":  # the cross without its upright arm
        return np.maximum(np.abs(x) - radius, np.abs(y) - radius / 3)
    raise ValueError(f"shape {shape!r} is none of {', '.join(SHAPES + NEW_SHAPES)}")


def _cover(shape: str, radius: float, center: tuple[float, float], height: int, width: int) -> Mask:
    """How much of each pixel the shape covers, 0 to 1, `[height, width]`; `center` is (x, y)."""
    x = np.arange(width)[None, :] + 0.5 - center[0]
    y = np.arange(height)[:, None] + 0.5 - center[1]
    return np.clip(0.5 - _distance(shape, x, y, radius), 0.0, 1.0).astype(np.float32)


def _scale(height: int, width: int) -> float:
    return min(height, width) / REFERENCE_SIDE


def path(scene: Scene, height: int, width: int, frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The shape's centre (x, y) in each frame, `[frames, 2]`: straight, at one speed, off the middle by chance."""
    scale = _scale(height, width)
    room = np.array([width, height - FLOOR_HEIGHT * scale])
    travel = min(SPEED * (frames - 1), LONGEST_TRAVEL) * scale * np.array(MOTIONS[scene.motion])
    slack = room / 2 - (SIZES[scene.size] + GAP) * scale - np.abs(travel) / 2
    offset = rng.uniform(-1, 1, 2) * np.minimum(slack, JITTER * scale)
    along = np.linspace(-0.5, 0.5, frames)[:, None] if frames > 1 else np.zeros((1, 1))
    return room / 2 + np.round(offset) + along * travel


def draw_masked(scene: Scene, height: int, width: int, frames: int, rng: np.random.Generator) -> tuple[Clip, Mask]:
    """A clip of the scene and how far the shape covers each of its pixels (`[frames, height, width]`, 0 to 1)."""
    radius = SIZES[scene.size] * _scale(height, width)
    centers = path(scene, height, width, frames, rng)
    cover = np.stack([_cover(scene.shape, radius, (x, y), height, width) for x, y in centers])
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    picture[_floor_row(height, width) :] = FLOOR_COLOR
    color = np.array(COLORS[scene.color], np.float32)
    clip = picture + cover[..., None] * (color - picture)
    return np.rint(clip).astype(np.uint8), cover


def draw(
    scene: Scene, height: int = 64, width: int = 64, frames: int = 9, rng: np.random.Generator | None = None
) -> Clip:
    """A clip of the scene, `uint8 [frames, height, width, 3]`; `rng` places the shape (middle of nowhere: seed 0)."""
    return draw_masked(scene, height, width, frames, rng or np.random.default_rng(0))[0]


# Reading ----------------------------------------------------------------------------------------------------------


def _floor_row(height: int, width: int) -> int:
    """The first row of the floor."""
    return height - round(FLOOR_HEIGHT * _scale(height, width))


def _nearest(color: NDArray[np.float32], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(color - np.array(palette[name]))))


def _read_background(above_floor: NDArray[np.float32]) -> tuple[str, NDArray[np.float32]]:
    """The background's name and its colour as it is in the clip, from the pixels along the picture's edge."""
    edge = np.concatenate([above_floor[:, 0], above_floor[:, :, 0], above_floor[:, :, -1]], axis=1).reshape(-1, 3)
    color = np.median(edge, axis=0)
    return _nearest(color, BACKGROUNDS), color


def _read_cover(
    above_floor: NDArray[np.float32], background: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The shape's colour, and its cover in each frame, from how far each pixel is from the background's colour."""
    offset = above_floor - background
    far = np.linalg.norm(offset, axis=-1)
    inside = far > 0.7 * np.quantile(far, 0.98)
    color = np.median(above_floor[inside], axis=0) if inside.any() else background
    toward = color - background
    cover = offset @ toward / max(float(toward @ toward), 1.0)
    return color, np.where(cover > 0.25, np.clip(cover, 0, 1), 0.0).astype(np.float32)


def _centers(cover: Mask) -> NDArray[np.float64]:
    """Centre of mass (x, y) of each frame's cover, `[frames, 2]`; NaN in a frame that shows nothing."""
    _, height, width = cover.shape
    mass = cover.sum(axis=(1, 2), dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = (cover.sum(axis=1) @ (np.arange(width) + 0.5)) / mass
        y = (cover.sum(axis=2) @ (np.arange(height) + 0.5)) / mass
    return np.stack([x, y], axis=1)


def _overlap(cover: Mask, centers: NDArray[np.float64], shape: str, radius: float) -> float:
    """Intersection over union (soft) of the cover with a drawn shape that has the same centre of mass."""
    _, height, width = cover.shape
    middle = (width / 2, height / 2)
    own = _centers(_cover(shape, radius, middle, height, width)[None])[0] - middle
    drawn = np.stack([_cover(shape, radius, (x, y), height, width) for x, y in centers - own])
    return float(np.minimum(cover, drawn).sum() / np.maximum(cover, drawn).sum())


def _read_motion(centers: NDArray[np.float64], scale: float) -> str:
    """The direction of the straight line through the centres; still below half the drawn speed."""
    frames = len(centers)
    if frames == 1:
        return "still"
    velocity = np.polyfit(np.arange(frames), centers, 1)[0]
    speed = min(SPEED, LONGEST_TRAVEL / (frames - 1)) * scale
    if np.abs(velocity).max() < speed / 2:
        return "still"
    return max(MOTIONS, key=lambda name: float(velocity @ np.array(MOTIONS[name])))


def read(clip: Clip, known: tuple[str, ...] = SHAPES) -> Attributes:
    """What a clip `uint8 [frames, height, width, 3]` shows; `known`: the shapes that are told apart.

    The background is read along the edge, the shape's colour from the pixels farthest from it, the shape and its
    size by the best overlap with a drawn one of the same centre of mass, the motion from how that centre moves.
    """
    _, height, width, _ = clip.shape
    scale = _scale(height, width)
    above_floor = clip[:, : _floor_row(height, width) - 1].astype(np.float32)
    background, background_color = _read_background(above_floor)
    color, cover = _read_cover(above_floor, background_color)
    centers = _centers(cover)
    if not np.isfinite(centers).all():
        return Attributes(None, None, None, None, background)
    overlaps = {
        (shape, size): _overlap(cover, centers, shape, radius * scale)
        for shape in known
        for size, radius in SIZES.items()
    }
    (shape, size), best = max(overlaps.items(), key=lambda item: item[1])
    motion = _read_motion(centers, scale)
    if best < CLEAR_ENOUGH:
        return Attributes(_nearest(color, COLORS), None, None, motion, background)
    return Attributes(_nearest(color, COLORS), shape, size, motion, background)


# A folder of clips ------------------------------------------------------------------------------------------------

CLIP_SIZES = (
    *((64, 64, 9),) * 5,
    *((64, 96, 9),) * 2,
    *((64, 64, 13),) * 2,
    *((96, 96, 9),) * 3,
    (64, 64, 5),
    (64, 64, 17),
    (96, 128, 9),
    (128, 128, 9),
)
"""Height, width and frames of the clips that are written, in these proportions."""
FPS = 8


def write_folder(
    out: Path,
    clips: int,
    scenes: Sequence[Scene],
    seed: int = 0,
    sizes: Sequence[tuple[int, int, int]] = CLIP_SIZES,
) -> Path:
    """Writes clips of scenes drawn by chance, with every wording of their captions (`write_clips`).

    Args:
        scenes: that are drawn from.
        sizes: height, width and frames, taken in turn.
    """
    rng = np.random.default_rng(seed)

    def drawn() -> Iterator[tuple[Clip, list[str]]]:
        for number in range(clips):
            scene = scenes[int(rng.integers(len(scenes)))]
            captions = [caption(scene, wording) for wording in range(len(WORDINGS))]
            yield draw(scene, *sizes[number % len(sizes)], rng), captions

    return write_clips(out, drawn())


def write_clips(out: Path, clips: Iterable[tuple[Clip, list[str]]]) -> Path:
    """Writes clips without loss, and metadata.jsonl with their captions; returns the folder."""
    import av

    out.mkdir(parents=True, exist_ok=True)
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as listed:
        for number, (clip, captions) in enumerate(clips):
            name = f"{number:05d}.mp4"
            height, width = clip.shape[1:3]
            with av.open(str(out / name), "w") as container:
                stream = container.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
                stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
                stream.codec_context.thread_count = 1
                for frame in clip:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode(None))
            listed.write(json.dumps({"file_name": name, "text": captions}) + "\n")
    return out


def _main() -> None:
    def write(
        out: Annotated[Path, typer.Option(help="Folder for the clips and metadata.jsonl.")],
        clips: Annotated[int, typer.Option(min=1, help="How many.")] = 6000,
        seed: Annotated[int, typer.Option(help="Of the scenes and of where the shapes go.")] = 2,
        held_out: Annotated[
            bool, typer.Option("--held-out", help="Of the combinations that the bundled model was never taught.")
        ] = False,
    ) -> None:
        """Write clips of the little world with their captions, as `reelbatch train` takes them."""
        write_folder(out, clips, split()[held_out], seed)
        typer.echo(f"{clips} clips in {out}")

    typer.run(write)


if __name__ == "__main__":
    _main()
