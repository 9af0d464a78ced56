"""Which family a model folder is of: by the class of pipeline in its model_index.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reelbatch.loading import hunyuan_video, hunyuan_video15, hunyuan_video_image
from reelbatch.loading.layout import Layout
from reelbatch.outside_json import read_object

LAYOUTS: Mapping[str, Layout] = {
    "HunyuanVideoPipeline": hunyuan_video.LAYOUT,
    "HunyuanVideoImageToVideoPipeline": hunyuan_video_image.HUNYUAN,
    "HunyuanSkyreelsImageToVideoPipeline": hunyuan_video_image.SKYREELS,
    "HunyuanVideo15Pipeline": hunyuan_video15.TEXT,
    "HunyuanVideo15ImageToVideoPipeline": hunyuan_video15.IMAGE,
}
COMPONENTS = tuple(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.classes))
"""Components that a folder of any family may have."""


def components_of(folder: Path) -> tuple[str, ...]:
    """Those of a folder's family; HunyuanVideo's where it says none."""
    try:
        name = read_object(folder / "model_index.json").get("_class_name")
    except (OSError, ValueError):
        name = None
    return tuple(LAYOUTS.get(str(name), hunyuan_video.LAYOUT).classes)
