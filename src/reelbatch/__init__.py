"""reelbatch: many HunyuanVideo videos in one run, each as if made alone.

from reelbatch import Engine, VideoRequest

engine = Engine.from_pretrained("demo")
requests = VideoRequest(prompt="a large red circle moving left on a black background", seed=0).copies(4)
for video in engine.generate(requests):
    video.save(f"out/{video.request.id}.mp4")
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
    from .repairs.repair import repair, restore
    from .request import VideoRequest
    from .video import Video

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "HunyuanVideoTransformer3DModel",
    "Video",
    "VideoRequest",
    "__version__",
    "repair",
    "restore",
]

# What libraries log while they are imported (torchao's GPU kernels and deprecations; an image processor of transformers
# that Diffusers' pipelines import, and no video needs) is not for those who make videos. A level that is set stays.
_TALKATIVE = ("torchao", "diffusers.quantizers.torchao", "torch.utils._pytree", "transformers.utils.import_utils")
for _logger in map(logging.getLogger, _TALKATIVE):
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.ERROR)

# Loaded when first used: the engine brings torch and diffusers, which `reelbatch --help` must not wait for.
_HOMES = {
    "Engine": ".engine.engine",
    "HunyuanVideoTransformer3DModel": ".models.hunyuan_video.transformer",
    "Video": ".video",
    "VideoRequest": ".request",
    "repair": ".repairs.repair",
    "restore": ".repairs.repair",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
