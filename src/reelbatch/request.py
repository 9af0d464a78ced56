"""VideoRequest: what a person asks for, checked once, at the door.

`VideoRequest(...)` checks what holds for every model. `request.for_model(limits)` fills what was left open with the
model's own defaults and checks what depends on the model: the stride of sizes and lengths.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import ErrorDetails

from reelbatch.image import ImageSource
from reelbatch.wording import SHOWN_LETTERS, shown

SEED_LIMIT = 2**64  # torch.Generator.manual_seed takes 64 bits
MAX_SIDE = 16384  # what an H.264 encoder takes
MAX_FRAMES = 100_001  # more than an hour; what a machine can hold is less
MAX_STEPS = 1000  # the scheduler's training timesteps
MAX_FPS = 240
MAX_ID_LENGTH = 200
SHOWN_UNKNOWN = 20  # fields that there are not, each with what was likely meant
TILE_SIDES = (64, 1024)  # pixels; a quarter of a tile overlaps the next, and both are whole latents
TILE_STRIDE = 32
LATER_FIELDS = ("vae_tiling", "image")
"""Fields that earlier versions did not have: left out of what is written and hashed where they say nothing."""


class Problem(NamedTuple):
    """What is wrong with one field (`None`: with the request as a whole), in words for a person."""

    field: str | None
    message: str


class RequestWarning(UserWarning):
    """A request that can be made, and is likely not what the model is for."""


class RequestError(ValueError):
    """A request that cannot be made. `problems` holds every fault, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problem.message for problem in self.problems))


@dataclass(frozen=True)
class RequestDefaults:
    """What a model makes when the request leaves it open. Sizes in pixels."""

    height: int = 720
    width: int = 1280
    frames: int = 129
    steps: int = 50
    guidance: float = 6.0
    fps: int = 24


@dataclass(frozen=True)
class ModelLimits:
    """What a model can make.

    Attributes:
        spatial_stride: height and width are multiples of it, in pixels (the VAE's 8 times the transformer's patch).
        temporal_stride: the number of frames is a multiple of it, plus 1 (the VAE's 4 times the temporal patch).
        attention_rules: gives the names of the rules that a request may ask for; None: they are not checked here.
        image_size: gives the height and width of a video whose first frame is an image of a height and width; None:
            the model takes no images. image_required: whether it takes no request without one.
        guidance: whether a request's guidance is embedded, or is the scale of classifier-free guidance, which is then
            on by itself.
        tile_stride: the sides of the VAE's tiles are multiples of it, in pixels.
        advice: what a person should know of a request that can be made, before it is.
    """

    spatial_stride: int = 16
    temporal_stride: int = 4
    defaults: RequestDefaults = RequestDefaults()
    attention_rules: Callable[[], Sequence[str]] | None = None
    image_size: Callable[[int, int], tuple[int, int]] | None = None
    image_required: bool = False
    guidance: Literal["embedded", "classifier-free"] = "embedded"
    tile_stride: int = TILE_STRIDE
    advice: Callable[[VideoRequest], str | None] | None = None


def _whole(low: int, high: int | None = None) -> BeforeValidator:
    """Whole numbers from `low` to `high`. Neither True nor 20.0 nor "20" is one: each hides a mistake."""
    span = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"

    def check(value: Any) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            near = ""
            if isinstance(value, float) and math.isfinite(value):
                near = _nearest(_clamp(math.floor(value), low, high), _clamp(math.ceil(value), low, high))
            raise ValueError(f"must be {span}{near}") from None
        if number != _clamp(number, low, high):
            raise ValueError(f"must be {span}{_nearest(_clamp(number, low, high))}")
        return number

    return BeforeValidator(check)


def _real(accepts: Callable[[float], bool], span: str, nearest: str) -> BeforeValidator:
    """Finite numbers that `accepts`."""

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"must be {span}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"must be {span}, and finite")
        if not accepts(number):
            raise ValueError(f"must be {span}; nearest: {nearest}")
        return number

    return BeforeValidator(check)


def _clamp(number: int, low: int, high: int | None) -> int:
    return max(low, number if high is None else min(number, high))


def _nearest(*values: int) -> str:
    return "; nearest: " + " or ".join(str(value) for value in sorted(set(values)))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    for position, character in enumerate(value):
        if character == "\0":
            raise ValueError(f"must not hold the character NUL, and character {position + 1} is one")
        if "\ud800" <= character <= "\udfff":
            raise ValueError(f"must be valid Unicode, but character {position + 1} is half of a pair ({character!a})")
    return value


def _said(value: object) -> str:
    text = _text(value)
    if not text.strip():
        raise ValueError("must say something, and is empty")
    return text


def _identifier(value: object) -> str:
    text = _said(value)
    if len(text) > MAX_ID_LENGTH or not text.isprintable():
        raise ValueError(f"must be printable text of at most {MAX_ID_LENGTH} characters")
    return text


def _tile_side(value: Any) -> int:
    """0, or pixels that a tile can have."""
    low, high = TILE_SIDES
    try:
        if isinstance(value, bool):
            raise TypeError
        side = operator.index(value)
    except TypeError:
        side = -1
    if side and (side % TILE_STRIDE or not low <= side <= high):
        raise ValueError(f"must be 0 (whole) or a multiple of {TILE_STRIDE} from {low} to {high}; nearest: 0 or 256")
    return side


def _tags(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError('must be a list of texts, as in ["cats", "night"]')
    return tuple(_said(tag) for tag in (value if isinstance(value, list | tuple) else sorted(map(str, value))))


def _image(value: Any) -> ImageSource | None:
    return None if value is None else ImageSource.read(value)


def _image_record(image: ImageSource | None) -> dict[str, str] | None:
    return None if image is None else image.record


Text = Annotated[str, BeforeValidator(_text)]
Prompt = Annotated[str, BeforeValidator(_said)]
Side = Annotated[int, _whole(1, MAX_SIDE)]


class VideoRequest(BaseModel):
    """One video to be made. Frozen; raises `RequestError` naming each bad field, its value and the nearest good ones.

    `None` in height, width, frames, steps, guidance, flow_shift or fps means the model's own default.

    prompt: what the video shows. prompt_2: a separate prompt for CLIP; without it, CLIP reads `prompt`.
    negative_prompt, true_cfg: with a negative prompt (`""` will do) and true_cfg above 1, every step runs a second,
        unconditional branch (classifier-free guidance).
    image: the video's first frame, as the path or the bytes of an image file, for models that take one. Without height
        and width, the video gets the size nearest to it that the model has; with them, it is cropped around its middle.
    seed: of the noise, 64 bits; drawn at random when not given, so that it is always recorded.
    height, width: in pixels. frames: multiple of 4, plus 1. steps: denoising steps. fps: frames a second of the file.
    guidance: the embedded guidance scale. flow_shift: the timestep shift of the flow-matching schedule.
    attention_rule: name of a rule of which tokens each head attends to (`reelbatch.attention.register_rule`);
        None is all.
    vae_tiling: side in pixels of the tiles that the VAE decodes in, 0 for none; None is the model's own rule, which
        looks at height and width alone.
    id: names the request within a run; drawn at random when not given. tags: yours, kept in the sidecar.
    name: what the video's file is called after, in the prompt's place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt
    prompt_2: Text | None = None
    negative_prompt: Text | None = None
    image: Annotated[ImageSource | None, BeforeValidator(_image), PlainSerializer(_image_record)] = None
    seed: Annotated[int, _whole(0, SEED_LIMIT - 1)] = Field(default_factory=lambda: secrets.randbits(32))
    height: Side | None = None
    width: Side | None = None
    frames: Annotated[int, _whole(1, MAX_FRAMES)] | None = None
    steps: Annotated[int, _whole(1, MAX_STEPS)] | None = None
    guidance: Annotated[float, _real(lambda x: x >= 0, "a number, 0 or more", "0")] | None = None
    true_cfg: Annotated[float, _real(lambda x: x >= 1, "a number, 1 (off) or more", "1")] = 1.0
    flow_shift: Annotated[float, _real(lambda x: x > 0, "a number above 0", "1")] | None = None
    attention_rule: Prompt | None = None
    vae_tiling: Annotated[int, BeforeValidator(_tile_side)] | None = None
    fps: Annotated[int, _whole(1, MAX_FPS)] | None = None
    id: Annotated[str, BeforeValidator(_identifier)] = Field(default_factory=lambda: secrets.token_hex(6))
    tags: Annotated[tuple[str, ...], BeforeValidator(_tags)] = ()
    name: Prompt | None = None

    if not TYPE_CHECKING:  # type checkers read the signature from the fields

        def __init__(self, /, **fields: Any) -> None:
            known = {name: value for name, value in fields.items() if name in FIELDS}
            problems: list[Problem] = []
            try:
                super().__init__(**known)
            except ValidationError as error:
                problems += (_problem(details) for details in error.errors())
            except RecursionError:
                problems.append(Problem(None, "holds a value that is nested too deeply"))
            if problems := problems + unknown_fields(fields, FIELDS):
                raise RequestError(problems) from None

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return {name: value for name, value in fields.items() if value is not None or name not in LATER_FIELDS}

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and frames; what is still open counts as 1."""
        return self.height or 1, self.width or 1, self.frames or 1

    @property
    def pixels(self) -> int:
        """Pixels that a step works on, in all guidance branches."""
        return math.prod(self.size) * (2 if self.uses_cfg else 1)

    @property
    def work(self) -> int:
        """How much work it is, next to others: pixels times steps."""
        return self.pixels * (self.steps or 1)

    @property
    def uses_cfg(self) -> bool:
        """Whether each step runs a second, unconditional branch."""
        return self.true_cfg > 1 and self.negative_prompt is not None

    def copies(self, count: int) -> list[VideoRequest]:
        """`count` requests that differ in seed (seed, seed + 1, …, within 64 bits) and id ("<id>-0", "<id>-1", …)."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise RequestError(
                [Problem("copies", f"copies={shown(count)} must be a whole number, 1 or more; nearest: 1")]
            )
        room = MAX_ID_LENGTH - len(f"-{count - 1}")
        stem = self.id if len(self.id) <= room else f"{self.id[: room - 9]}~{secrets.token_hex(4)}"
        return [
            self.model_copy(update={"seed": (self.seed + index) % SEED_LIMIT, "id": f"{stem}-{index}"})
            for index in range(count)
        ]

    def for_model(self, limits: ModelLimits) -> VideoRequest:
        """This request with the model's defaults filled in (flow_shift stays open: it is the scheduler's).

        Raises `RequestError` for a size or a length that the model cannot make.
        """
        defaults = limits.defaults
        height, width = defaults.height, defaults.width
        if self.image is not None and limits.image_size is not None and self.height is None and self.width is None:
            height, width = limits.image_size(self.image.height, self.image.width)
        filled = {
            "height": height if self.height is None else self.height,
            "width": width if self.width is None else self.width,
            "frames": defaults.frames if self.frames is None else self.frames,
        }
        rest = {"steps": defaults.steps, "guidance": defaults.guidance, "fps": defaults.fps}
        problems = [_off_grid(side, filled[side], limits.spatial_stride, 0) for side in ("height", "width")]
        problems.append(_off_grid("frames", filled["frames"], limits.temporal_stride, 1))
        problems.append(_off_grid("vae_tiling", self.vae_tiling or 0, limits.tile_stride, 0))
        problems.append(_unknown_rule(self.attention_rule, limits))
        if self.image is not None and limits.image_size is None:
            problems.append(Problem("image", "image: this model makes videos from text alone, and takes none"))
        if self.image is None and limits.image_required:
            problems.append(Problem("image", "image is missing: this model's videos begin with one; give its path"))
        if any(problems):
            raise RequestError(problem for problem in problems if problem)
        update = filled | {name: value for name, value in rest.items() if getattr(self, name) is None}
        request = self.model_copy(update=update)
        if limits.guidance == "classifier-free":
            request = request._guided()
        if limits.advice is not None and (advice := limits.advice(request)):
            warnings.warn(advice, RequestWarning, stacklevel=2)
        return request

    def _guided(self) -> VideoRequest:
        """For models whose guidance is classifier-free: its scale is `true_cfg` where that is above 1, else `guidance`;
        the negative prompt is empty where there is none."""
        scale = self.true_cfg if self.true_cfg > 1 else max(self.guidance or 1.0, 1.0)
        negative = "" if scale > 1 and self.negative_prompt is None else self.negative_prompt
        return self.model_copy(update={"guidance": scale, "true_cfg": scale, "negative_prompt": negative})


FIELDS: tuple[str, ...] = tuple(VideoRequest.model_fields)
NAMES_ONLY = frozenset({"id", "tags", "name"})
"""Fields that change no frame."""


def did_you_mean(name: str, known: Iterable[str] = FIELDS) -> str:
    """The end of a message about an unknown field: the field that was likely meant, or all there are."""
    known = list(known)
    close = difflib.get_close_matches(name[:SHOWN_LETTERS].lower().replace("-", "_"), known, n=1)
    return f"did you mean {close[0]}?" if close else f"the fields are {', '.join(known)}"


def unknown_fields(names: Iterable[str], known: Sequence[str]) -> list[Problem]:
    """A problem for each name that is no field; of very many, for the first ones and how many more there are."""
    unknown = [name for name in names if name not in known]
    problems = []
    for name in unknown[:SHOWN_UNKNOWN]:
        field = name.encode("utf-8", "backslashreplace").decode()
        field = field if len(field) <= SHOWN_LETTERS else f"{field[: SHOWN_LETTERS - 3]}..."
        problems.append(Problem(name, f"{field}: no such field; {did_you_mean(field, known)}"))
    if more := len(unknown) - SHOWN_UNKNOWN:
        problems += [Problem(None, f"and {more} more fields that there are not")] if more > 0 else []
    return problems


def _off_grid(field: str, value: int, stride: int, offset: int) -> Problem | None:
    """What is wrong with a value that is no multiple of `stride`, plus `offset`; None if nothing is."""
    if (value - offset) % stride == 0:
        return None
    below = value - (value - offset) % stride
    near = _nearest(*(candidate for candidate in (below, below + stride) if candidate > 0))
    multiples = f"{stride}·k + {offset} ({offset}, {offset + stride}, {offset + 2 * stride}, …)"
    rule = multiples if offset else f"a multiple of {stride}"
    return Problem(field, f"{field}={value} must be {rule} for this model{near}")


def _unknown_rule(name: str | None, limits: ModelLimits) -> Problem | None:
    if name is None or limits.attention_rules is None or name in (known := limits.attention_rules()):
        return None
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"registered are {', '.join(known)}"
    return Problem("attention_rule", f"attention_rule={name!r} is not registered; {hint}")


def _problem(details: ErrorDetails) -> Problem:
    """pydantic's error, in words for a person."""
    field = str(details["loc"][0])
    if details["type"] == "missing":
        return Problem(field, f"{field} is missing")
    reason = str(details.get("ctx", {}).get("error", details["msg"]))
    return Problem(field, f"{field}={shown(details['input'])} {reason}")
