"""The VAE and the pipelines of HunyuanVideo 1.5 of Diffusers, repaired."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial, wraps
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
from reelbatch.repairs.alone import Isolated, isolated, one_a_prompt
from reelbatch.repairs.fix import Undo, require_source
from reelbatch.repairs.reclass import reclass, stands_in
from reelbatch.repairs.step_cache import refuse_step_cache

VAE_SOURCE = (
    (HunyuanVideo15AttnBlock, "forward", "17696850c92a2a8c61692e44bdcd2fe3b6dc7d1e96513dc3d31d9cea5195b647"),
    (
        HunyuanVideo15AttnBlock,
        "prepare_causal_attention_mask",
        "c5b15964ad957b87cfbc89dc6575835ab6ac47e0e8f41b180e0c3d2df1703997",
    ),
)
ENCODE_PROMPT = "7c7dab5aa17c64949f39d4f9ebd1195d98f3126c526a92e92266865e11044e75"
PIPELINE_SOURCE = (
    (HunyuanVideo15Pipeline, "__call__", "bde234466700fe2df31e124150644b2983fd78eed1fcf3d49ee56eb9f46a42dc"),
    (HunyuanVideo15Pipeline, "encode_prompt", ENCODE_PROMPT),
    (
        HunyuanVideo15ImageToVideoPipeline,
        "__call__",
        "fd64a99cd1e163bb44e7c7a7603e8f04bdeb9967f3f98f419c3f1f2503f445ce",
    ),
    (HunyuanVideo15ImageToVideoPipeline, "encode_prompt", ENCODE_PROMPT),
)


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


class BatchedPipeline(Isolated):
    """What both pipelines have for every prompt of a batch to be treated as it would be alone.

    Masks are laid out as embeddings are: for all videos of the first prompt, then of the second.
    """

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

        Raises:
            ValueError: for a list of another length.
        """
        embeddings = {
            "prompt_embeds": prompt_embeds,
            "prompt_embeds_mask": prompt_embeds_mask,
            "prompt_embeds_2": prompt_embeds_2,
            "prompt_embeds_mask_2": prompt_embeds_mask_2,
        }
        given = {name: value for name, value in embeddings.items() if value is not None}
        texts = one_a_prompt("prompt", prompt or "", batch_size)
        encode = partial(super().encode_prompt, device=device, dtype=dtype)  # type: ignore[misc]

        def read(prompts: list[int]) -> tuple[Tensor, ...]:
            rows = {name: value[prompts] for name, value in given.items()}
            return encode([texts[i] for i in prompts], batch_size=len(prompts), **rows)

        if self.isolation == "packed":
            encoded: Iterable[Tensor] = read(list(range(batch_size)))
        else:  # equal texts are read once
            reads = list(range(batch_size)) if given else [texts.index(text) for text in texts]
            alone = {i: read([i]) for i in dict.fromkeys(reads)}
            encoded = map(torch.cat, zip(*(alone[i] for i in reads), strict=True))
        states, mask, glyphs, glyph_mask = (x.repeat_interleave(num_videos_per_prompt, dim=0) for x in encoded)
        return states, mask, glyphs, glyph_mask


def _isolated_call(pipeline: Any) -> Any:
    @wraps(pipeline.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_step_cache(self.transformer)
        with isolated(self, self.isolation):
            return pipeline.__call__(self, *args, **kwargs)

    return call


@stands_in
class TextToVideo(BatchedPipeline, HunyuanVideo15Pipeline):
    """`HunyuanVideo15Pipeline` that treats every prompt of a batch as it would alone."""

    __call__ = _isolated_call(HunyuanVideo15Pipeline)


@stands_in
class ImageToVideo(BatchedPipeline, HunyuanVideo15ImageToVideoPipeline):
    """`HunyuanVideo15ImageToVideoPipeline` that treats every prompt of a batch as it would alone."""

    __call__ = _isolated_call(HunyuanVideo15ImageToVideoPipeline)


PIPELINES = {HunyuanVideo15Pipeline: TextToVideo, HunyuanVideo15ImageToVideoPipeline: ImageToVideo}


def repair_pipeline(pipe: Any, pipeline: type, repaired: type) -> Undo:
    require_source(source for source in PIPELINE_SOURCE if source[0] is pipeline)
    return reclass(pipe, repaired)
