"""Diffusers' `HunyuanVideoPipeline`, repaired: every video of a batch is the one that it would have been alone.

The transformer's modules become ours where they stand, around their own parameters: our names of parameters are those
of Diffusers, so only the classes change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, Literal

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.models import attention_processor, normalization
from diffusers.models.transformers import transformer_hunyuan_video as theirs
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from reelbatch.attention import AUTO
from reelbatch.models import layers
from reelbatch.models.hunyuan_video import transformer as ours
from reelbatch.models.linear import FewRowsLinear
from reelbatch.models.packed import DIFFUSERS_BACKENDS
from reelbatch.repairs.fix import CannotRepair, Fix, Undo, require_source
from reelbatch.repairs.reclass import reclass, reclass_all, stands_in
from reelbatch.repairs.step_cache import refuse_step_cache


class _NoProcessors:
    """What Diffusers offers on its attention processors, of which a repaired transformer has none in use."""

    def set_attn_processor(self, processor: Any) -> None:
        raise NotImplementedError(
            "A repaired transformer computes its attention itself, so a processor would have no effect. Choose a "
            "kernel with set_attention_backend, or call reelbatch.restore(pipe) first."
        )

    def fuse_qkv_projections(self) -> None:
        raise NotImplementedError(
            "A repaired transformer has no fused projections: call reelbatch.restore(pipe) first."
        )


def _stand_in(our: type, their: type, *bases: type) -> type:
    return stands_in(type(their.__name__, (*bases, our, their), {}))


Transformer = _stand_in(ours.HunyuanVideoTransformer3DModel, theirs.HunyuanVideoTransformer3DModel, _NoProcessors)
for _names in ("_repeated_blocks", "_no_split_modules"):  # blocks go by the names of the classes they stand in for
    setattr(Transformer, _names, getattr(theirs.HunyuanVideoTransformer3DModel, _names))

STAND_INS: dict[type, type] = {
    their: _stand_in(our, their)
    for their, our in (
        (theirs.HunyuanVideoPatchEmbed, layers.PatchEmbed),
        (theirs.HunyuanVideoConditionEmbedding, ours.ConditionEmbedding),
        (theirs.HunyuanVideoTokenRefiner, layers.TokenRefiner),
        (theirs.HunyuanVideoIndividualTokenRefiner, layers.Refiner),
        (theirs.HunyuanVideoIndividualTokenRefinerBlock, layers.RefinerBlock),
        (theirs.HunyuanVideoAdaNorm, layers.Modulation),
        (theirs.HunyuanVideoTransformerBlock, layers.DualStreamBlock),
        (theirs.HunyuanVideoSingleTransformerBlock, ours.SingleStreamBlock),
        (normalization.AdaLayerNormZero, layers.Modulation),
        (normalization.AdaLayerNormZeroSingle, layers.Modulation),
        (normalization.AdaLayerNormContinuous, layers.Modulation),
    )
} | {theirs.HunyuanVideoTransformer3DModel: Transformer}
REFINER_ATTENTION = _stand_in(layers.RefinerAttention, attention_processor.Attention)
JOINT_ATTENTION = _stand_in(layers.JointAttention, attention_processor.Attention)

PROCESSORS = {
    JOINT_ATTENTION: theirs.HunyuanVideoAttnProcessor2_0,
    REFINER_ATTENTION: attention_processor.AttnProcessor2_0,
}

# What the repair was written for: the source of these methods, by SHA-256, in Diffusers 0.42.1
SOURCE = (
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
    (normalization.AdaLayerNormZero, "forward", "93374820c014f8127713d1ba0a6be6bba27e7040238781fd56e42e87bb5366cb"),
    (
        normalization.AdaLayerNormZeroSingle,
        "forward",
        "d48dfb2b1e75e64f48dbe314db50f716acbd81946ad08387b858d08f47bba077",
    ),
    (
        normalization.AdaLayerNormContinuous,
        "forward",
        "da3e50ebcd024fc2040e7e4afc211c8717142198b743486e507c0770fa4b2909",
    ),
    (
        theirs.HunyuanVideoTransformer3DModel,
        "forward",
        "f158d8daf9d3db90a26a19a8dbe63cc421082d6e6941324ac0b631be2b4e9437",
    ),
    (attention_processor.Attention, "forward", "e6822ac3500626c7318b56f135752693a1222976154cbcc8c2e6b5f840d82b6b"),
    (
        theirs.HunyuanVideoAttnProcessor2_0,
        "__call__",
        "9d2e9a44e1dc2bf7a88436d8127cca41c8f29e71b578bb3a64b4dba9aff2babe",
    ),
    (
        attention_processor.AttnProcessor2_0,
        "__call__",
        "bf23ea5ae40404272695b752532af4cef782d7626168f17e9f0d6652a941dd67",
    ),
)
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
    transformer = pipe.transformer
    if transformer is not None and is_compiled_module(transformer):
        transformer = transformer._orig_mod
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
    require_source(SOURCE)
    if type(transformer) is not theirs.HunyuanVideoTransformer3DModel:
        raise CannotRepair(
            f"the transformer is a {_class_name(transformer)}; the repair is for HunyuanVideoTransformer3DModel. "
            "Nothing was changed."
        )
    if transformer.config.image_condition_type is not None:
        raise CannotRepair(
            f"the transformer has image_condition_type {transformer.config.image_condition_type!r}; the repair is for "
            "text-to-video. Nothing was changed."
        )
    backend = _attention_backend(transformer)
    modules = _stand_ins_of(transformer)
    _refuse_processors(modules)
    undo = reclass_all((module, new_class) for _, module, new_class in modules)
    vars(transformer)["attention_backend"] = backend
    return partial(_restore_transformer, transformer, undo)


def _restore_transformer(transformer: Any, undo: Undo) -> None:
    undo()
    vars(transformer).pop("attention_backend", None)


def _stand_ins_of(transformer: nn.Module) -> list[tuple[str, nn.Module, type]]:
    """Name, module and new class of every module whose class changes."""
    stand_ins: list[tuple[str, nn.Module, type]] = []
    for name, module in transformer.named_modules():
        their = next((kind for kind in (*STAND_INS, attention_processor.Attention) if isinstance(module, kind)), None)
        if their is None:
            continue
        if type(module) is not their:
            raise CannotRepair(f"{name} is a {_class_name(module)}, not a {their.__name__}. Nothing was changed.")
        if their is attention_processor.Attention:
            attention = REFINER_ATTENTION if name.startswith("context_embedder.") else JOINT_ATTENTION
            stand_ins.append((name, module, attention))
        else:
            stand_ins.append((name, module, STAND_INS[their]))
            product = getattr(module, "linear", None)
            if issubclass(STAND_INS[their], layers.Modulation) and type(product) is nn.Linear:
                stand_ins.append((f"{name}.linear", product, FewRowsLinear))
    return stand_ins


def _class_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _refuse_processors(modules: Sequence[tuple[str, nn.Module, type]]) -> None:
    """Refuse attention that another processor computes than the one that Diffusers gives it."""
    for attention, expected in PROCESSORS.items():
        others = {
            name: _class_name(module.processor)
            for name, module, new_class in modules
            if new_class is attention and type(module.processor) is not expected
        }
        if others:
            raise CannotRepair(
                f"found the attention processor {' and '.join(sorted(set(others.values())))} where "
                f"{expected.__name__} was expected. Put Diffusers' own back first, with {expected.__name__} of "
                f"{expected.__module__}: for name in {list(others)}: "
                f"pipe.transformer.get_submodule(name).set_processor({expected.__name__}()). Nothing was changed."
            )


def _attention_backend(transformer: nn.Module) -> str:
    """Ours for the backend that was set on the attention processors."""
    for module in transformer.modules():
        chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if chosen is not None:
            name = str(getattr(chosen, "value", chosen))
            if name not in DIFFUSERS_BACKENDS:
                raise CannotRepair(
                    f"the attention backend {name!r} is set, which the repair does not have: call "
                    "pipe.transformer.reset_attention_backend() first. Nothing was changed."
                )
            return DIFFUSERS_BACKENDS[name]
    return AUTO


# --------------------------------------------------------------------------------------------------
# The pipeline


@stands_in
class BatchedPipeline(HunyuanVideoPipeline):
    """`HunyuanVideoPipeline` that treats every prompt of a batch as it would alone."""

    isolation: Literal["exact", "packed"] = "exact"
    """Whether the shapes of every computation are those that a video has alone, or those of the batch."""

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
        """One row a text; in exact isolation each text is read alone, and once."""
        if texts is None:
            raise ValueError("prompt_embeds were given without pooled_prompt_embeds: give both, or neither.")
        if isinstance(texts, str) or self.isolation == "packed":
            return encode(texts)
        rows = {text: encode(text) for text in dict.fromkeys(texts)}
        return [torch.cat(parts) for parts in zip(*(rows[text] for text in texts), strict=True)]

    @wraps(HunyuanVideoPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_step_cache(self.transformer)
        call = inspect.signature(HunyuanVideoPipeline.__call__).bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        prompt, embeds = given["prompt"], given["prompt_embeds"]
        prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
        for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
            given[name] = _one_a_prompt(name, given[name], prompts)
        given["guidance_scale"] = _one_a_video(given["guidance_scale"], prompts, given["num_videos_per_prompt"])
        with ExitStack() as during:
            during.enter_context(_set(self.transformer, "isolation", self.isolation))
            if self.isolation == "exact":
                during.enter_context(_set(self.vae, "use_slicing", True))  # decodes one video at a time
            return super().__call__(*call.args[1:], **call.kwargs)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute's value for a while; an owner that has no such attribute is left alone."""
    owner = getattr(owner, "_orig_mod", owner)
    if not hasattr(owner, name):
        yield
        return
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(before)


def _one_a_prompt(name: str, texts: Any, prompts: int) -> Any:
    if isinstance(texts, str):
        return [texts] * prompts
    if isinstance(texts, list) and len(texts) != prompts:
        raise ValueError(f"{name} has {len(texts)} texts for {prompts} prompts: give one, or one a prompt.")
    return texts


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
