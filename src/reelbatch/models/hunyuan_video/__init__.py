"""HunyuanVideo (13B): transformer, text towers, VAE."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_FOR_DIFFUSERS = {"HunyuanVideoTransformer3DModel": ".transformer", "ModelMixin": "diffusers"}
"""What Diffusers looks up here for a model_index.json that names this module: the class, and the kind it is of."""


def __getattr__(name: str) -> Any:
    if name not in _FOR_DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FOR_DIFFUSERS[name], __name__), name)
