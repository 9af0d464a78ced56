"""The published models: which of them weights can be, and what their folders say besides the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from reelbatch.loading.assembly import SKYREELS_TEXT
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.parameter_names import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, ParameterNames
from reelbatch.models.hunyuan_video15.variants import VARIANTS


@dataclass(frozen=True)
class Kind:
    """A published model.

    Attributes:
        name: for `--as`. about: in words. pipeline: the class that model_index.json names.
        condition: channels of an image beside the noisy latents: none, as many (`image`), or one more (`image+mask`).
        embedded: whether it has an embedding of a guidance scale; None is either. meanflow: as in its configuration.
        transformer: what its configuration says that weights do not tell.
        shift: of the schedule; None is 7, or that of the model that gives the rest.
        guidance: scale of the guider, for models that have one.
        profile: what `reelbatch.json` says of it.
    """

    name: str
    about: str
    names: ParameterNames
    pipeline: str
    condition: str = "none"
    embedded: bool | None = None
    meanflow: bool = False
    transformer: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    shift: float | None = None
    guidance: float | None = None
    profile: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def _variants() -> tuple[Kind, ...]:
    kinds = []
    for variant in VARIANTS:
        for name in variant.name.split(", "):
            task = "i2v" if "i2v" in name else "t2v"
            kinds.append(
                Kind(
                    name,
                    f"HunyuanVideo 1.5, {name.replace('_', ' ')}",
                    HUNYUAN_VIDEO_15,
                    "HunyuanVideo15ImageToVideoPipeline" if task == "i2v" else "HunyuanVideo15Pipeline",
                    condition="image+mask",
                    meanflow=variant.meanflow,
                    transformer={"target_size": variant.target_size, "task_type": task},
                    shift=variant.shift,
                    guidance=variant.guidance,
                )
            )
    return tuple(kinds)


KINDS: Sequence[Kind] = (
    Kind(
        "t2v",
        "HunyuanVideo, text to video",
        HUNYUAN_VIDEO,
        "HunyuanVideoPipeline",
    ),
    Kind(
        "i2v",
        "HunyuanVideo-I2V, which is given the first frame (token replace)",
        HUNYUAN_VIDEO,
        "HunyuanVideoImageToVideoPipeline",
        embedded=True,
        transformer={"image_condition_type": "token_replace"},
    ),
    Kind(
        "i2v-33ch",
        "HunyuanVideo-I2V, first release (latent concat)",
        HUNYUAN_VIDEO,
        "HunyuanVideoImageToVideoPipeline",
        condition="image+mask",
        embedded=False,
        transformer={"image_condition_type": "latent_concat"},
    ),
    Kind("skyreels-t2v", "SkyReels V1, text to video", HUNYUAN_VIDEO, "HunyuanVideoPipeline", profile=SKYREELS_TEXT),
    Kind(
        "skyreels-i2v",
        "SkyReels V1, image to video",
        HUNYUAN_VIDEO,
        "HunyuanSkyreelsImageToVideoPipeline",
        condition="image",
    ),
    *_variants(),
)
FOLDERS = {"hunyuan-video-t2v-720p": "t2v", "hunyuan-video-i2v-720p": "i2v"}
"""Folders of Tencent's layout of 1.0, whose names are a part of it."""


def possible(names: ParameterNames, config: Mapping[str, Any], path: object) -> list[Kind]:
    """The published models whose weights have these names and shapes.

    Args:
        config: what the shapes say.

    Raises:
        ModelFolderError: where there is none.
    """
    channels, out = config["in_channels"], config["out_channels"]
    condition = {out: "none", 2 * out: "image", 2 * out + 1: "image+mask"}.get(channels)
    kinds = [
        kind
        for kind in KINDS
        if kind.names is names
        and kind.condition == condition
        and kind.embedded in (None, config.get("guidance_embeds"))
        and kind.meanflow == config.get("use_meanflow", False)
    ]
    if not kinds:
        upscaler = names is HUNYUAN_VIDEO_15 and channels == 3 * out + 2
        why = "the upscaler, which is not run here" if upscaler else "no published model that is known here"
        raise ModelFolderError(f"{path}: is {names.model} with {channels} channels in and {out} out: {why}")
    return kinds


def choose(names: ParameterNames, config: Mapping[str, Any], asked: str | None, hint: str | None, path: object) -> Kind:
    """Which published model weights are of.

    Args:
        config: what their shapes say. asked: with `--as`. hint: what the layout says that they are in.

    Raises:
        ModelFolderError: where they are of none, or may be of several and nothing says which; and for a name of none.
    """
    known = {kind.name: kind for kind in KINDS}
    if asked is not None and asked not in known:
        raise ModelFolderError(f"--as {asked}: no such model; there are {', '.join(known)}")
    kinds = possible(names, config, path)
    for wanted, said in ((asked, f"--as {asked}"), (hint, f"the folder's name ({hint})")):
        if wanted is None or (wanted is hint and wanted not in known):
            continue
        if match := [kind for kind in kinds if kind.name == wanted]:
            return match[0]
        raise ModelFolderError(
            f"{path}: is {names.model}, and cannot be {wanted} as {said} says; it can be {_listed(kinds)}"
        )
    if len(kinds) > 1:
        raise ModelFolderError(
            f"{path}: is {names.model}, and its weights do not tell which model it is. Say so with --as NAME, one of: "
            f"{_listed(kinds)}"
        )
    return kinds[0]


def _listed(kinds: Sequence[Kind]) -> str:
    return "; ".join(f"{kind.name} ({kind.about})" for kind in kinds)
