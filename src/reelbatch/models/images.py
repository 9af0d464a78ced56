"""What the families share of images: the size of a video that begins with one, and the image as its first frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import PIL.Image
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """An image that is opened where it is not encoded yet. Two are equal where the identity is.

    Attributes:
        open: gives the pixels; must be the same for the same identity.
        identity: of its content.
    """

    open: Callable[[], PIL.Image.Image]
    identity: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def nearest_size(height: int, width: int, target_size: int, stride: int) -> tuple[int, int]:
    """Height and width of the video whose first frame an image of such a shape is to be.

    The reference's buckets: multiples of `stride` with about as many pixels as a square of `target_size`, at most 4
    times as long as wide. Of them the one whose ratio of height to width is nearest to the image's, among those that
    are no further from square than the image.
    """
    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=stride)
    chosen: tuple[int, int] = processor.calculate_default_height_width(height, width, target_size)
    return chosen


def fit(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """The image resized (Lanczos) until it covers the frame, and cropped to it around its middle, as the reference
    does."""
    return HunyuanVideo15ImageProcessor().resize(image.convert("RGB"), height=height, width=width, resize_mode="crop")


_PIXELS = HunyuanVideo15ImageProcessor(do_resize=False, do_convert_rgb=True)


def pixels_of(image: PIL.Image.Image) -> Float[Tensor, "3 height width"]:
    """As a VAE takes them: fp32, from -1 to 1."""
    values: Tensor = _PIXELS.preprocess(image, height=image.height, width=image.width)[0]
    return values
