"""Whom the tests meet: Diffusers' classes, ours under their names, or Diffusers' pipelines after `reelbatch.repair`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import diffusers

SUBSTITUTES = {
    "HunyuanVideoTransformer3DModel": "reelbatch",
    "HunyuanVideo15Transformer3DModel": "reelbatch.models.hunyuan_video15",
}
"""Diffusers' class names, and the module that holds ours."""

PIPELINES = ("HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
"""The pipelines that `reelbatch.repair` is for."""

originals: dict[type, type] = {}
"""Of each class of ours that stands in for Diffusers': the one that it replaced."""

repairing = True


def choose(side: str) -> None:
    """Make the imports that follow meet this side.

    Raises:
        ValueError: if there is no side of this name.
    """
    if side == "ours":
        substitute()
    elif side == "repaired":
        repair_when_constructed()
    elif side != "diffusers":
        raise ValueError(f"REELBATCH_JUDGE is {side!r}; it is one of: diffusers, ours, repaired.")


def substitute() -> None:
    """Our classes under Diffusers' names, wherever a test module or a pipeline looks them up."""
    for name, module in SUBSTITUTES.items():
        ours, theirs = getattr(importlib.import_module(module), name), getattr(diffusers, name)
        originals[ours] = theirs
        for place in (diffusers, diffusers.models, diffusers.models.transformers, inspect.getmodule(theirs)):
            setattr(place, name, ours)


def repair_when_constructed() -> None:
    repair = importlib.import_module("reelbatch").repair
    for name in PIPELINES:
        pipeline = getattr(diffusers, name)
        pipeline.__init__ = _then_repair(pipeline.__init__, repair)


def _then_repair(construct: Callable[..., None], repair: Callable[[Any], Any]) -> Callable[..., None]:
    @functools.wraps(construct)  # Diffusers reads the signature to know the components
    def construct_and_repair(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if repairing:
            repair(self)

    return construct_and_repair


def as_in_diffusers(pipeline_class: type, components: dict[str, Any]) -> Any:
    """The pipeline of these components with nothing of ours in it, with the same weights."""
    global repairing
    own = dict(components)
    for name, component in components.items():
        if original := originals.get(type(component)):
            own[name] = original.from_config(component.config)
            own[name].load_state_dict(component.state_dict())
    repairing = False
    try:
        return pipeline_class(**own)
    finally:
        repairing = True
