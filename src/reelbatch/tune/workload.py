"""What is measured: videos of one shape, or the mix of a prompt file, and how they are put into batches."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from reelbatch.loading.inspection import ModelInfo
from reelbatch.memory.estimate import any_image
from reelbatch.request import VideoRequest
from reelbatch.tune.quality import Scene

MIX = 8
"""Requests of a prompt file that stand for all of it."""

PROMPTS = (
    "a red fox trots through fresh snow at the edge of a pine forest, morning light",
    "a tram crosses a wet street at night, neon signs mirrored in the puddles, slow pan",
    "a potter's hands shape a tall clay vase on a turning wheel, close-up",
    "waves break on black rocks",
    "an old man feeds pigeons in a sunny square while children run past, handheld camera, shallow depth of field",
    "steam rises from a bowl of noodles",
    "a sailing boat leans into the wind on a green sea under heavy clouds, seen from a drone that circles it slowly",
    "time lapse of a city skyline from dusk to night",
)


@dataclass(frozen=True)
class Workload:
    """Requests to measure with.

    Attributes:
        shapes: the class that a profile is stored under.
        requests: every default filled in; batches take them in turn and begin again at the end.
        period: requests that together are the whole mix; 1 if all are of one shape.
        scenes: what each request should show, where that can be read back; none where it cannot.
    """

    name: str
    shapes: str
    requests: tuple[VideoRequest, ...]
    period: int
    scenes: tuple[Scene, ...] = ()

    def waves(self, batch: int) -> list[list[VideoRequest]]:
        """Batches of `batch` requests that together hold the whole mix at least once."""
        count = -(-self.period // batch)
        return [self.take(batch, start=wave * batch) for wave in range(count)]

    def take(self, count: int, start: int = 0) -> list[VideoRequest]:
        """`count` requests in turn, each with an id of its own."""
        size = len(self.requests)
        return [self.requests[i % size].model_copy(update={"id": str(i)}) for i in range(start, start + count)]

    @property
    def steps(self) -> int:
        """Denoising steps of the request that has most."""
        return max(steps_of(request) for request in self.requests)


def steps_of(request: VideoRequest) -> int:
    return cast(int, request.steps)


def shortened(request: VideoRequest, steps: int) -> VideoRequest:
    """The same request, of so many steps at most."""
    return request.model_copy(update={"steps": min(steps, steps_of(request))})


def shape_of(request: VideoRequest) -> str:
    """Width × height × frames of one request, and whether it runs two branches."""
    return f"{request.width}×{request.height}×{request.frames}" + (" cfg" if request.uses_cfg else "")


def shape_class(requests: Iterable[VideoRequest]) -> str:
    """The shapes that occur, whatever their shares: what a profile is stored under."""
    return " + ".join(sorted({shape_of(request) for request in requests}))


def frames_of(request: VideoRequest) -> str:
    """What decoding depends on: guidance branches share one video."""
    return shape_of(request).removesuffix(" cfg")


def frame_bytes(request: VideoRequest) -> int:
    """Bytes of a video's frames, uint8 RGB."""
    return 3 * math.prod(request.size)


def parse_shape(text: str) -> dict[str, int]:
    """`WIDTHxHEIGHTxFRAMES` as request fields. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×*]\s*(\d+)\s*[x×*]\s*(\d+)\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--shape {text!r}: expected WIDTHxHEIGHTxFRAMES in pixels and frames, as in 1280x720x129")
    return dict(zip(("width", "height", "frames"), map(int, match.groups()), strict=True))


def of_shape(
    info: ModelInfo,
    fields: Mapping[str, Any],
    largest_batch: int,
    captions: Callable[[int], Sequence[tuple[Scene, str]]] | None = None,
) -> Workload:
    """Videos of one shape, each of another prompt and seed.

    Args:
        fields: of VideoRequest; what is left out is the model's.
        captions: gives so many prompts for a model that knows few words, with what each should show.

    Raises:
        RequestError: for a shape that the model cannot make.
    """
    count = max(largest_batch, MIX)
    known = captions(count) if captions else ()
    prompts = [caption for _, caption in known] or [
        PROMPTS[i] if i < len(PROMPTS) else f"{PROMPTS[i % len(PROMPTS)]}, take {i}" for i in range(count)
    ]
    requests = tuple(
        VideoRequest(prompt=prompt, seed=seed, **any_image(info.limits) | dict(fields)).for_model(info.limits)
        for seed, prompt in enumerate(prompts)
    )
    scenes = tuple(scene for scene, _ in known)
    return Workload(_description(requests), shape_class(requests), requests, 1, scenes)


def of_mix(requests: Sequence[VideoRequest], name: str) -> Workload:
    """A prompt file's requests: eight of them, evenly spread over the file and with its largest, stand for all."""
    size, count = len(requests), min(len(requests), MIX)
    places = [int((i + 0.5) * size / count) for i in range(count)]
    largest = max(range(size), key=lambda i: requests[i].pixels)
    if all(requests[place].pixels < requests[largest].pixels for place in places):
        places[min(range(count), key=lambda i: abs(places[i] - largest))] = largest
    chosen = tuple(requests[place] for place in sorted(places))
    mixed = len({(shape_of(request), request.steps) for request in requests}) > 1
    return Workload(
        f"{name}: {size} videos of {_description(requests)}", shape_class(requests), chosen, count if mixed else 1
    )


def _description(requests: Sequence[VideoRequest]) -> str:
    first = requests[0]
    steps = sorted({steps_of(request) for request in requests})
    length = f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"
    kinds = sorted({shape_of(request) for request in requests})
    if len(kinds) > 1:
        return f"{len(kinds)} shapes ({', '.join(kinds[:4])}{', …' if len(kinds) > 4 else ''}), {length}"
    frames = f"{first.frames} frame{'' if first.frames == 1 else 's'}"
    return f"{first.width}×{first.height}, {frames}, {length}" + (", true CFG" if first.uses_cfg else "")
