"""Options that several commands share, each written once; a command takes a group of them as one parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from reelbatch.cli.common import ENGINE, OUTPUT, REQUEST

if TYPE_CHECKING:
    from reelbatch.engine.config import EngineConfig

Result = TypeVar("Result")

Model = Annotated[
    str,
    typer.Option(
        help="demo, a folder in the Diffusers layout, or a hub id; TRANSFORMER+BASE joins two.", rich_help_panel=ENGINE
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.", rich_help_panel=ENGINE)]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16, float16, int8 (8-bit weights), or transformer=…,vae=…,text=….",
        rich_help_panel=ENGINE,
    ),
]
AttentionOption = Annotated[
    str, typer.Option(help="Attention kernel: auto, or a name that `doctor` shows.", rich_help_panel=ENGINE)
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA file, as style.safetensors or style.safetensors:0.8; may be repeated.", rich_help_panel=ENGINE
    ),
]


FormatOption = Annotated[
    Literal["mp4", "gif", "webm", "png"],
    typer.Option(
        "--format",
        help="Of the files: mp4 (H.264), webm (VP9), gif (256 colours), or png: a folder of pictures, one a frame, "
        "without loss. The frames and their hash are the same.",
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True)
class RequestOptions:
    """What each video is, where a prompt file's line says nothing else."""

    copies: Annotated[
        int | None, typer.Option(help="Videos of each prompt, with seeds one after another.", rich_help_panel=REQUEST)
    ] = None
    prompt_2: Annotated[
        str | None,
        typer.Option("--prompt-2", help="A separate prompt for the second text encoder.", rich_help_panel=REQUEST),
    ] = None
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to keep away from; needs --true-cfg above 1.", rich_help_panel=REQUEST)
    ] = None
    image: Annotated[
        Path | None,
        typer.Option(
            help="An image file: the first frame, for models that take one. Without a size, the nearest that the model "
            "has.",
            rich_help_panel=REQUEST,
        ),
    ] = None
    seed: Annotated[
        str,
        typer.Option(
            help="Of the first video of a prompt; further ones count on. random: drawn once, and kept by the job.",
            metavar="INTEGER|random",
            rich_help_panel=REQUEST,
        ),
    ] = "0"
    height: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=REQUEST)] = None
    width: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=REQUEST)] = None
    frames: Annotated[int | None, typer.Option(help="4k + 1: 1, 5, 9, …", rich_help_panel=REQUEST)] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=REQUEST)] = None
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, embedded or classifier-free.", rich_help_panel=REQUEST)
    ] = None
    true_cfg: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.", rich_help_panel=REQUEST)
    ] = None
    flow_shift: Annotated[
        float | None, typer.Option(help="Timestep shift; the model's own if not given.", rich_help_panel=REQUEST)
    ] = None
    fps: Annotated[int | None, typer.Option(help="Frames a second of the file.", rich_help_panel=REQUEST)] = None
    attention_rule: Annotated[
        str | None,
        typer.Option(
            help="Which tokens a head attends to: own-frame, sliding-tile, spatial-temporal; all if not given.",
            rich_help_panel=REQUEST,
        ),
    ] = None
    vae_tiling: Annotated[
        str | None,
        typer.Option(
            help="auto, off, or pixels: the side of the tiles that the VAE decodes in. auto is the model's own rule, "
            "which goes by height and width alone.",
            rich_help_panel=REQUEST,
        ),
    ] = None
    tag: Annotated[
        list[str] | None, typer.Option(help="Kept in the sidecar; may be repeated.", rich_help_panel=REQUEST)
    ] = None

    @property
    def request_fields(self) -> dict[str, Any]:
        """Fields of `VideoRequest`, and `copies`, that were given. The seed is not among them, as it counts on.

        Raises:
            ValueError: for a --vae-tiling that is neither a word that is known nor a number.
        """
        given = {**vars(self), "tags": self.tag or None, "vae_tiling": parse_vae_tiling(self.vae_tiling)}
        return {name: value for name, value in given.items() if value is not None and name not in ("seed", "tag")}


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is opened and runs, and how often its state is saved."""

    model: Model = "demo"
    device: Device = "auto"
    dtype: Dtype = "auto"
    isolation: Annotated[
        Literal["exact", "packed"],
        typer.Option(
            help="exact: bit for bit the video alone. packed: equal to rounding, faster for small videos.",
            rich_help_panel=ENGINE,
        ),
    ] = "exact"
    attention: AttentionOption = "auto"
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Videos that share a step; if not given, what `tune` advised, else 8.", rich_help_panel=ENGINE
        ),
    ] = None
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Transformer rows that share a step, at most.", rich_help_panel=ENGINE)
    ] = None
    max_memory: Annotated[
        str | None,
        typer.Option(help="Memory that the run may hold, as 20GiB; videos wait for it.", rich_help_panel=ENGINE),
    ] = None
    lora: LoraOption = None
    offload: Annotated[
        Literal["none", "component", "block"] | None,
        typer.Option(
            help="Weights on the device: all; of the component at work; of the blocks at work. What `tune` advised, "
            "else none, if neither this nor --batch-size is given.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    keep_pixels: Annotated[
        bool,
        typer.Option(
            "--keep-pixels",
            help="A video fails rather than be decoded in a way that changes its pixels when memory runs out.",
            rich_help_panel=ENGINE,
        ),
    ] = False
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps after which the running videos' state is saved, for a crash to cost no more than these.",
            rich_help_panel=ENGINE,
        ),
    ] = None

    def config(self, **advised: Any) -> EngineConfig:
        """The engine's configuration.

        Args:
            advised: of `EngineConfig`, where no option says otherwise.

        Raises:
            ValueError: for an option that cannot be, saying what can.
        """
        from reelbatch.engine.config import EngineConfig
        from reelbatch.loading.lora import parse_lora

        given: dict[str, Any] = {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "isolation": self.isolation,
            "attention": self.attention,
            "max_batch_size": self.batch_size,
            "max_batch_tokens": self.batch_tokens,
            "max_memory": self.max_memory,
            "lora": [parse_lora(text) for text in self.lora or []],
            "offload": self.offload,
            "keep_pixels": self.keep_pixels,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return EngineConfig.of(**{**advised, **given, "decode_beside": None})


def parse_vae_tiling(text: str | None) -> int | None:
    """`vae_tiling` of a request: None for auto, 0 for off, else pixels, which the request checks.

    Raises:
        ValueError: for anything else.
    """
    if text is None or text.lower() == "auto":
        return None
    if text.lower() == "off":
        return 0
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--vae-tiling {text!r}: give auto, off, or the side of a tile in pixels, as 256") from None


def with_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """A command for typer in which each parameter that is a dataclass stands as that class's fields, one by one."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        own = groups.get(parameter.name)
        if own is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        kinds = get_type_hints(own, include_extras=True)
        parameters += [parameter.replace(name=f.name, default=f.default, annotation=kinds[f.name]) for f in fields(own)]

    @functools.wraps(command)
    def run(**given: Any) -> Result:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
