"""Diffusers' `HunyuanVideoPipeline`, repaired: every video of a batch is the one that it would have been alone.

The transformer's modules become ours where they stand (`network`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.models import normalization
from diffusers.models.transformers import transformer_hunyuan_video as theirs
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from reelbatch.models import layers
from reelbatch.models.hunyuan_video import transformer as ours
from reelbatch.repairs.alone import Isolated, encode_texts, isolated, one_a_prompt
from reelbatch.repairs.fix import CannotRepair, Fix, Undo, require_source
from reelbatch.repairs.network import (
    ATTENTION_SOURCE,
    MODULATION_SOURCE,
    MODULATIONS,
    Network,
    Sources,
    original,
    stand_in,
    transformer_stand_in,
)
from reelbatch.repairs.reclass import reclass, stands_in
from reelbatch.repairs.step_cache import refuse_step_cache

Transformer = transformer_stand_in(ours.HunyuanVideoTransformer3DModel, theirs.HunyuanVideoTransformer3DModel)
STAND_INS: dict[type, type] = {
    their: stand_in(our, their)
    for their, our in (
        (theirs.HunyuanVideoPatchEmbed, layers.PatchEmbed),
        (theirs.HunyuanVideoConditionEmbedding, ours.ConditionEmbedding),
        (theirs.HunyuanVideoTokenRefiner, layers.TokenRefiner),
        (theirs.HunyuanVideoIndividualTokenRefiner, layers.Refiner),
        (theirs.HunyuanVideoIndividualTokenRefinerBlock, layers.RefinerBlock),
        (theirs.HunyuanVideoAdaNorm, layers.Modulation),
        (theirs.HunyuanVideoTransformerBlock, layers.DualStreamBlock),
        (theirs.HunyuanVideoSingleTransformerBlock, ours.SingleStreamBlock),
        (normalization.AdaLayerNormZeroSingle, layers.Modulation),
    )
} | {**MODULATIONS, theirs.HunyuanVideoTransformer3DModel: Transformer}

# What the repair was written for: the source of these methods, by SHA-256, in Diffusers 0.42.1
SOURCE: Sources = (
    (theirs.HunyuanVideoPatchEmbed, "forward", "df04ad880922c13693914c740f32bf021bb8cd643b3405afd4d25d91d641311c"),
    (
        theirs.HunyuanVideoConditionEmbedding,
        "forward",
        "25adbc61174aa711297f50649a001bdb5cb9dd7f7ef0eabb22d1027a2071f46f",
    ),
    (theirs.HunyuanVideoTokenRefiner, "forward", "9a5fde1f5d518b64e721eea488cf27b406d179caff9321580e520b970b9b036a"),
    (
        theirs.HunyuanVideoIndividualTokenRefiner,
        "forward",
        "0cbea25e50d80f1e2420eb9e150c3275c535ac7b02f4a16a1b94fadc3fd53bb3",
    ),
    (
        theirs.HunyuanVideoIndividualTokenRefinerBlock,
        "forward",
        "3cb78827898fb2e1f9bfa58f01c244fba94c59cee4273e4585fb5c760e9a49a3",
    ),
    (theirs.HunyuanVideoAdaNorm, "forward", "c07d65e929233cc077e975b8c37d5b7a43b0ba43c9fb35ce28e8463019238da8"),
    (
        theirs.HunyuanVideoTransformerBlock,
        "forward",
        "dc6d07e7f1c452e38dc69c512fa43e218cb30459a58a23d24ae0ae3e95e2fcf9",
    ),
    (
        theirs.HunyuanVideoSingleTransformerBlock,
        "forward",
        "3e921434984e3891860e632e553633cc51b55bdfd5974340aa082d5914cecb00",
    ),
    (
        normalization.AdaLayerNormZeroSingle,
        "forward",
        "d48dfb2b1e75e64f48dbe314db50f716acbd81946ad08387b858d08f47bba077",
    ),
    (
        theirs.HunyuanVideoTransformer3DModel,
        "forward",
        "f158d8daf9d3db90a26a19a8dbe63cc421082d6e6941324ac0b631be2b4e9437",
    ),
    (
        theirs.HunyuanVideoAttnProcessor2_0,
        "__call__",
        "9d2e9a44e1dc2bf7a88436d8127cca41c8f29e71b578bb3a64b4dba9aff2babe",
    ),
    *MODULATION_SOURCE,
    *ATTENTION_SOURCE,
)
NETWORK = Network(theirs.HunyuanVideoTransformer3DModel, STAND_INS, theirs.HunyuanVideoAttnProcessor2_0, SOURCE)
PIPELINE_SOURCE = (
    (HunyuanVideoPipeline, "__call__", "eb448431e314aaf848cd108249c51af3ccd3718c2c5620c1d732217606ab7b2f"),
    (HunyuanVideoPipeline, "encode_prompt", "899556b9f93d3b4c29d5a2d7f049fe16c18fbe96acf6edea2c1d3552c8753203"),
    (
        HunyuanVideoPipeline,
        "_get_llama_prompt_embeds",
        "71b8c9bbe29580e4ec5dd1f1f68c6ea199eb7507ebab77971ddd3711dbb39f80",
    ),
    (
        HunyuanVideoPipeline,
        "_get_clip_prompt_embeds",
        "c48e732da44735c6000cec726fffba15577fb944069a24d999c6cec7d62a990a",
    ),
)


def faults(pipe: Any) -> list[Fix]:
    """The faults of this pipeline that are not repaired yet.

    Args:
        pipe: a `HunyuanVideoPipeline`; its transformer may be None.
    """
    fixes = []
    transformer = original(pipe.transformer)
    if transformer is not None and not isinstance(transformer, ours.HunyuanVideoTransformer3DModel):
        fixes.append(
            Fix(
                fault="The transformer computes padded text in all its blocks, always passes an attention mask, which "
                "keeps the flash kernel away, and counts real text tokens from the left, so a left-padded mask lets "
                "padding in.",
                cure="Each sample runs with its own text tokens alone, read by position, and no mask.",
                part=transformer,
                apply=partial(_repair_transformer, transformer),
            )
        )
    if not isinstance(pipe, BatchedPipeline):
        fixes.append(
            Fix(
                fault="prompt_2 is ignored; prompt_embeds fail with num_videos_per_prompt above 1, or without their "
                "mask; a list of guidance scales is refused; one negative prompt for several prompts fails; texts are "
                "encoded and videos decoded in one batch, whose size changes their last bits.",
                cure="CLIP reads prompt_2; embeddings that are given are repeated for the videos of a prompt; "
                "guidance_scale takes one scale a prompt or a video; one negative prompt serves all prompts; in exact "
                "isolation each text is encoded, and each video decoded, alone.",
                part=pipe,
                apply=partial(_repair_pipeline, pipe),
            )
        )
    return fixes


# --------------------------------------------------------------------------------------------------
# The transformer


def _repair_transformer(transformer: Any) -> Undo:
    condition_type = getattr(getattr(transformer, "config", None), "image_condition_type", None)
    if condition_type is not None:
        raise CannotRepair(
            f"the transformer has image_condition_type {condition_type!r}; the repair is for text-to-video. "
            "Nothing was changed."
        )
    return NETWORK.repair(transformer)


# --------------------------------------------------------------------------------------------------
# The pipeline


@stands_in
class BatchedPipeline(Isolated, HunyuanVideoPipeline):
    """`HunyuanVideoPipeline` that treats every prompt of a batch as it would alone."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        prompt_template: dict[str, Any] = DEFAULT_PROMPT_TEMPLATE,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_sequence_length: int = 256,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text states `[videos, tokens, dim]`, pooled CLIP text `[videos, dim]` and the states' mask.

        Args:
            prompt_2: what CLIP reads; None is `prompt`.
            prompt_embeds, pooled_prompt_embeds, prompt_attention_mask: one row a prompt, repeated for its videos.
        """
        to = {"device": device, "dtype": dtype}

        def llama(texts: str | list[str]) -> tuple[Tensor, ...]:
            return self._get_llama_prompt_embeds(texts, prompt_template, max_sequence_length=max_sequence_length, **to)

        def clip(texts: str | list[str]) -> tuple[Tensor, ...]:
            return (self._get_clip_prompt_embeds(texts, **to),)

        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode(llama, prompt)
        elif prompt_attention_mask is None:
            prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], device=prompt_embeds.device)
        if pooled_prompt_embeds is None:
            (pooled_prompt_embeds,) = self._encode(clip, prompt if prompt_2 is None else prompt_2)
        states, pooled, mask = (
            rows.repeat_interleave(num_videos_per_prompt, dim=0)
            for rows in (prompt_embeds, pooled_prompt_embeds, prompt_attention_mask)
        )
        return states, pooled, mask

    def _encode(self, encode: Callable[[Any], tuple[Tensor, ...]], texts: str | list[str] | None) -> Sequence[Tensor]:
        if texts is None:
            raise ValueError("prompt_embeds were given without pooled_prompt_embeds: give both, or neither.")
        return encode_texts(encode, texts, self.isolation)

    @wraps(HunyuanVideoPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_step_cache(self.transformer)
        call = inspect.signature(HunyuanVideoPipeline.__call__).bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        prompt, embeds = given["prompt"], given["prompt_embeds"]
        prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
        for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
            given[name] = one_a_prompt(name, given[name], prompts)
        given["guidance_scale"] = _one_a_video(given["guidance_scale"], prompts, given["num_videos_per_prompt"])
        with isolated(self, self.isolation):
            return super().__call__(*call.args[1:], **call.kwargs)


def _one_a_video(scale: float | Sequence[float] | Tensor, prompts: int, copies: int) -> float | list[float]:
    """A guidance scale, or one for each video: those of the first prompt, then of the second."""
    scales = scale.tolist() if isinstance(scale, Tensor | np.ndarray | np.generic) else scale
    if isinstance(scales, int | float):
        return scales
    if len(scales) == prompts * copies:
        return list(scales)
    if len(scales) != prompts:
        raise ValueError(
            f"guidance_scale has {len(scales)} scales for {prompts} prompts of {copies} videos each: give one, "
            f"{prompts} (one a prompt) or {prompts * copies} (one a video)."
        )
    return [each for each in scales for _ in range(copies)]


def _repair_pipeline(pipe: HunyuanVideoPipeline) -> Undo:
    require_source(PIPELINE_SOURCE)
    return reclass(pipe, BatchedPipeline)
