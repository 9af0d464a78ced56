"""The published variants of HunyuanVideo 1.5: what each is for, and its defaults.

All have one network; a folder says which it is by `guider/` (the scale of guidance), `scheduler/` (the shift) and the
transformer's `target_size` and `use_meanflow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from reelbatch.models.images import nearest_size
from reelbatch.request import RequestDefaults, VideoRequest

FRAMES, FPS = 121, 24
"""Diffusers' and Tencent's own."""
WIDE = (9, 16)
"""Height to width of a video without an image, as in Diffusers' pipeline."""
STRIDE = 16
"""Sizes are multiples of it, in pixels."""


class Variant(NamedTuple):
    """Attributes:
    target_size: pixels on a side of the square with as many pixels as its videos.
    guidance: scale of classifier-free guidance; 1 for models that were distilled to need none.
    shift: of the schedule.
    steps: that its makers recommend.
    meanflow: whether it was distilled to few steps.
    """

    name: str
    target_size: int
    guidance: float
    shift: float
    steps: int = 50
    meanflow: bool = False


VARIANTS = (
    Variant("480p_t2v, 480p_i2v", 640, 6.0, 5.0),
    Variant("720p_t2v", 960, 6.0, 9.0),
    Variant("720p_i2v", 960, 6.0, 7.0),
    Variant("480p_t2v_distilled, 480p_i2v_distilled", 640, 1.0, 5.0),
    Variant("720p_t2v_distilled", 960, 1.0, 9.0),
    Variant("720p_i2v_distilled", 960, 1.0, 7.0),
    Variant("480p_i2v_step_distilled", 640, 1.0, 7.0, steps=12, meanflow=True),
)
"""Source: `PIPELINE_CONFIGS` of Tencent's hyvideo/commons, and the table of its README (which recommends 8 or 12 steps
for the last)."""


def variant_of(config: Mapping[str, Any], guidance: float, shift: float) -> Variant:
    """The published variant with these settings; for others, one that is named "custom".

    Args:
        config: the transformer's. guidance: the guider's scale. shift: the scheduler's.
    """
    target_size, meanflow = int(config.get("target_size", 640)), bool(config.get("use_meanflow", False))
    asked = Variant("custom", target_size, guidance, shift, 12 if meanflow else 50, meanflow)
    return next((variant for variant in VARIANTS if variant[1:] == asked[1:]), asked)


def defaults_of(variant: Variant) -> RequestDefaults:
    """What its requests get that leave something open."""
    height, width = nearest_size(*WIDE, variant.target_size, STRIDE)
    return RequestDefaults(height, width, FRAMES, variant.steps, variant.guidance, FPS)


def advice(variant: Variant, request: VideoRequest) -> str | None:
    """What a person should know who asks a distilled model for what it was distilled not to need."""
    texts = []
    if variant.guidance == 1 and request.uses_cfg:
        texts.append(
            f"it was distilled to need no classifier-free guidance, and {request.true_cfg:g} is asked for: steps take "
            "twice as long; leave guidance open"
        )
    if variant.meanflow and (request.steps or 0) > 2 * variant.steps:
        texts.append(f"it was distilled to 8 or {variant.steps} steps, and {request.steps} are asked for")
    if variant.guidance == 1 and not variant.meanflow and (request.steps or 50) < 50:
        texts.append(f"its makers say that it must have 50 steps, and {request.steps} are asked for")
    return f"This model is {variant.name}: {'; '.join(texts)}." if texts else None


class GuiderError(ValueError):
    """A guider that is not known here; the message says which are."""


def guidance_of(guider: Mapping[str, Any]) -> float:
    """The scale of classifier-free guidance that a `guider_config.json` asks for; 1 is none.

    Raises:
        GuiderError: for another guider than `ClassifierFreeGuidance` (one with a state from step to step, or with hooks
            on the transformer's layers, cannot be shared by the samples of a batch), and for settings of it that change
            what a step does.
    """
    name = guider.get("_class_name", "ClassifierFreeGuidance")
    if name != "ClassifierFreeGuidance":
        raise GuiderError(
            f"is of class {name}; only ClassifierFreeGuidance is run. Guiders that keep a state from step to step, or "
            "change the transformer's layers, cannot be shared by the videos of a batch"
        )
    usual = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
    others = [f"{key} {guider[key]}" for key, value in usual.items() if guider.get(key, value) != value]
    if others:
        raise GuiderError(f"sets {', '.join(others)}; only {', '.join(f'{k} {v}' for k, v in usual.items())} are run")
    return float(guider.get("guidance_scale", 7.5)) if guider.get("enabled", True) else 1.0
