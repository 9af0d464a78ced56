"""The VAE and the pipelines of HunyuanVideo 1.5 of Diffusers, repaired."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
)
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock
from torch import Tensor

from reelbatch.models.hunyuan_video15 import vae as video15
from reelbatch.repairs.fix import Undo, require_source
from reelbatch.repairs.reclass import reclass, stands_in

VAE_SOURCE = (
    (HunyuanVideo15AttnBlock, "forward", "17696850c92a2a8c61692e44bdcd2fe3b6dc7d1e96513dc3d31d9cea5195b647"),
    (
        HunyuanVideo15AttnBlock,
        "prepare_causal_attention_mask",
        "c5b15964ad957b87cfbc89dc6575835ab6ac47e0e8f41b180e0c3d2df1703997",
    ),
)
ENCODE_PROMPT = "7c7dab5aa17c64949f39d4f9ebd1195d98f3126c526a92e92266865e11044e75"


@stands_in
class FrameCausalAttnBlock(HunyuanVideo15AttnBlock):
    """`HunyuanVideo15AttnBlock` without its mask, for any batch."""

    forward = video15.FrameCausalAttnBlock.forward


def repair_vae(vae: AutoencoderKLHunyuanVideo15) -> Undo:
    require_source(VAE_SOURCE)
    with ExitStack() as done:
        for block in video15.attention_blocks(vae):
            done.callback(reclass(block, FrameCausalAttnBlock))
        return done.pop_all().close


class PromptMajor:
    """`encode_prompt` that lays masks out as it does embeddings: all videos of the first prompt, then of the second."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 1,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        prompt_embeds_2: Tensor | None = None,
        prompt_embeds_mask_2: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings [B, N, D] and mask [B, N], then those of the glyphs; B is prompts × videos per prompt.

        Args:
            prompt: one string serves all `batch_size` prompts.
        """
        if isinstance(prompt, str):
            prompt = [prompt] * batch_size
        given = prompt_embeds, prompt_embeds_mask, prompt_embeds_2, prompt_embeds_mask_2
        encoded = super().encode_prompt(prompt, device, dtype, batch_size, 1, *given)  # type: ignore[misc]
        return tuple(x.repeat_interleave(num_videos_per_prompt, dim=0) for x in encoded)


@stands_in
class PromptMajorT2V(PromptMajor, HunyuanVideo15Pipeline):
    """`HunyuanVideo15Pipeline` with the repaired `encode_prompt`."""


@stands_in
class PromptMajorI2V(PromptMajor, HunyuanVideo15ImageToVideoPipeline):
    """`HunyuanVideo15ImageToVideoPipeline` with the repaired `encode_prompt`."""


def repair_pipeline(pipe: Any, pipeline: type, repaired: type) -> Undo:
    require_source([(pipeline, "encode_prompt", ENCODE_PROMPT)])
    return reclass(pipe, repaired)
