"""HunyuanVideo 1.5, image to video, in Diffusers' own test mixin: Diffusers has no tests of this pipeline.

They are those of its text-to-video pipeline with an image. Run by `judge.py`, in Diffusers' source tree.
"""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from tests.pipelines.hunyuan_video1_5 import test_hunyuan_1_5 as text_to_video
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel


class HunyuanVideo15ImageToVideoPipelineFastTests(text_to_video.HunyuanVideo15PipelineFastTests):
    pipeline_class = HunyuanVideo15ImageToVideoPipeline
    params = text_to_video.HunyuanVideo15PipelineFastTests.params - {"height", "width"} | {"image"}
    batch_params = frozenset(["prompt", "negative_prompt"])  # one image serves them all

    def get_dummy_components(self, num_layers: int = 1) -> dict[str, Any]:
        components = super().get_dummy_components(num_layers)
        torch.manual_seed(0)
        config = SiglipVisionConfig(
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        components["image_encoder"] = SiglipVisionModel(config).eval()
        components["feature_extractor"] = SiglipImageProcessor(size={"height": 16, "width": 16})
        return components

    def get_dummy_inputs(self, device: str, seed: int = 0) -> dict[str, Any]:
        inputs = super().get_dummy_inputs(device, seed)
        del inputs["height"], inputs["width"]
        return inputs | {"image": PIL.Image.linear_gradient("L").resize((16, 16)).convert("RGB")}

    def test_inference(self) -> None:
        """What numbers it gives, only Diffusers' own classes say: see `test_video_is_that_of_diffusers`."""
        pipeline = self.pipeline_class(**self.get_dummy_components())
        pipeline.set_progress_bar_config(disable=True)
        video = pipeline(**self.get_dummy_inputs("cpu")).frames[0]
        assert video.shape == (9, 3, 16, 16)
        assert video.isfinite().all()
