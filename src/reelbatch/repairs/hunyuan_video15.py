"""HunyuanVideo 1.5 of Diffusers, repaired: every sample of a batch is the one that it would have been alone,
to rounding.

The faults are those of Diffusers 0.42.1, in models/transformers/transformer_hunyuan_video15.py,
models/autoencoders/autoencoder_kl_hunyuanvideo15.py and pipelines/hunyuan_video1_5/.

Text and image tokens of a sample reach the blocks as `[valid | padding]`, padded to the longest of the batch. What a
block takes for its `attention_mask` is then no mask but the samples' numbers of valid tokens, Python integers
counted once a forward. No valid token ever attends to padding, so what becomes of padding is of no account.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15IndividualTokenRefiner,
    HunyuanVideo15IndividualTokenRefinerBlock,
    HunyuanVideo15TokenRefiner,
    HunyuanVideo15TransformerBlock,
)
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import is_compiled_module
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reelbatch.models.hunyuan_video15.vae import attention_blocks
from reelbatch.ragged import Lengths
from reelbatch.repairs.fix import CannotRepair, Fix, Undo, require_source
from reelbatch.repairs.hunyuan_video15_pipeline import (
    FrameCausalAttnBlock,
    PromptMajorI2V,
    PromptMajorT2V,
    repair_pipeline,
    repair_vae,
)
from reelbatch.repairs.reclass import reclass, stands_in

TRANSFORMER_SOURCE = (
    (HunyuanVideo15Transformer3DModel, "forward", "6a119831862d5f463cc7b762d6321605401492c10a74f9cf8adf72dc1f9d343e"),
    (HunyuanVideo15TransformerBlock, "forward", "dc6d07e7f1c452e38dc69c512fa43e218cb30459a58a23d24ae0ae3e95e2fcf9"),
    (HunyuanVideo15AttnProcessor2_0, "__call__", "7bb9b09c8f4ac8c812029e5958ec0b53117cdb0a20fa3687edd89b8dc4460d09"),
    (HunyuanVideo15TokenRefiner, "forward", "9a5fde1f5d518b64e721eea488cf27b406d179caff9321580e520b970b9b036a"),
    (
        HunyuanVideo15IndividualTokenRefiner,
        "forward",
        "d2ffc04d3bb319865290085f252ec56c22a2ec134aaeaaca2bc667caa2e50c52",
    ),
    (
        HunyuanVideo15IndividualTokenRefinerBlock,
        "forward",
        "3cb78827898fb2e1f9bfa58f01c244fba94c59cee4273e4585fb5c760e9a49a3",
    ),
    (Attention, "forward", "e6822ac3500626c7318b56f135752693a1222976154cbcc8c2e6b5f840d82b6b"),
    (AttnProcessor2_0, "__call__", "bf23ea5ae40404272695b752532af4cef782d7626168f17e9f0d6652a941dd67"),
)


def faults(pipe: Any) -> list[Fix]:
    """The faults of this pipeline that are not repaired yet: of its transformer, its VAE, and of the pipeline itself.

    Args:
        pipe: a `HunyuanVideo15Pipeline` or `HunyuanVideo15ImageToVideoPipeline`. A component may be None.
    """
    transformer, vae = _original(getattr(pipe, "transformer", None)), _original(getattr(pipe, "vae", None))
    fixes = []
    if isinstance(transformer, HunyuanVideo15Transformer3DModel) and not isinstance(transformer, PerSampleTransformer):
        fixes.append(
            Fix(
                fault="The transformer decides once for the whole batch whether there is an image, so a text-to-video "
                "sample changes beside an image-to-video one; it raises where num_videos_per_prompt is above 1; and "
                "it builds a mask of tokens × tokens in every layer, which keeps the fast attention kernels away.",
                cure="Each sample has its own image decided and attends, unmasked, to its own valid tokens alone; "
                "image embeddings are repeated for the videos of a prompt.",
                part=transformer,
                apply=partial(_repair_transformer, transformer),
            )
        )
    if isinstance(vae, AutoencoderKLHunyuanVideo15) and not all(
        isinstance(block, FrameCausalAttnBlock) for block in attention_blocks(vae)
    ):
        fixes.append(
            Fix(
                fault="The VAE raises on encoding or decoding more than one video at a time, and builds a mask of "
                "tokens × tokens row by row in Python.",
                cure="The VAE's attention goes frame by frame over the frames so far, for any batch and with no mask.",
                part=vae,
                apply=partial(repair_vae, vae),
            )
        )
    for pipeline, repaired in (
        (HunyuanVideo15Pipeline, PromptMajorT2V),
        (HunyuanVideo15ImageToVideoPipeline, PromptMajorI2V),
    ):
        if isinstance(pipe, pipeline) and not isinstance(pipe, repaired):
            fixes.append(
                Fix(
                    fault="With several prompts and num_videos_per_prompt above 1, videos get the text mask of another "
                    "prompt; one negative prompt for several prompts raises.",
                    cure="Masks are repeated in the order of the embeddings, and one negative prompt serves them all.",
                    part=pipe,
                    apply=partial(repair_pipeline, pipe, pipeline, repaired),
                )
            )
    return fixes


def _original(module: Any) -> Any:
    """The module itself, where `torch.compile` has wrapped it."""
    return module._orig_mod if is_compiled_module(module) else module


# The transformer


@stands_in
class PerSampleTransformer(HunyuanVideo15Transformer3DModel):
    """`HunyuanVideo15Transformer3DModel` that decides everything for each sample by itself, and masks nothing."""

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Float[Tensor, "batch channels frames height width"],
        timestep: Tensor,
        encoder_hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        encoder_hidden_states_2: Float[Tensor, "batch tokens_2 dim_2"] | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        image_embeds: Float[Tensor, "batch_or_prompts tokens_3 dim_3"] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """As the repaired class's, for each sample what it would be alone.

        Args:
            image_embeds: those of a text-to-video sample are all zero. With fewer rows than there are samples, each
                row serves as many samples, one after the other.
        """
        if encoder_hidden_states_2 is None or encoder_attention_mask_2 is None or image_embeds is None:
            raise ValueError(
                "HunyuanVideo 1.5 needs encoder_hidden_states_2, encoder_attention_mask_2 and image_embeds (all zero "
                "for text-to-video)"
            )
        batch, frames, height, width = (hidden_states.shape[i] for i in (0, 2, 3, 4))
        patch_t, patch = self.config.patch_size_t, self.config.patch_size

        rotary = self.rope(hidden_states)
        temb = self.time_embed(timestep, timestep_r=timestep_r)
        hidden_states = self.x_embedder(hidden_states)
        tokens, lengths = self._condition(
            timestep,
            (encoder_hidden_states, encoder_attention_mask.bool()),
            (encoder_hidden_states_2, encoder_attention_mask_2.bool()),
            image_embeds.repeat_interleave(batch // image_embeds.shape[0], dim=0),
        )

        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in self.transformer_blocks:
            run = partial(self._gradient_checkpointing_func, block) if checkpointing else block
            hidden_states, tokens = run(hidden_states, tokens, temb, lengths, rotary)

        hidden_states = self.proj_out(self.norm_out(hidden_states, temb))
        hidden_states = hidden_states.unflatten(1, (frames // patch_t, height // patch, width // patch))
        hidden_states = hidden_states.unflatten(-1, (-1, patch_t, patch, patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        sample = hidden_states.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _condition(
        self, timestep: Tensor, text: tuple[Tensor, Tensor], glyphs: tuple[Tensor, Tensor], image_embeds: Tensor
    ) -> tuple[Float[Tensor, "batch longest dim"], Lengths]:
        """Tokens `[image | glyphs | text | padding]` of every sample, and how many of them are valid.

        `text` and `glyphs` are embeddings with their masks, [B, N, D] and [B, N].
        """
        has_image = (image_embeds != 0).flatten(1).any(dim=1)
        counts = torch.stack([text[1].sum(1), glyphs[1].sum(1), has_image.to(text[1].device)]).tolist()
        text_lengths, glyph_lengths = tuple(counts[0]), tuple(counts[1])
        image_lengths = tuple(image_embeds.shape[1] * present for present in counts[2])

        text_kind, glyph_kind, image_kind = self.cond_type_embed(torch.arange(3, device=text[0].device))
        parts = (
            self.image_embedder(image_embeds) + image_kind,
            self.context_embedder_2(_valid_first(*glyphs, max(glyph_lengths))) + glyph_kind,
            self.context_embedder(_valid_first(*text, max(text_lengths)), timestep, text_lengths) + text_kind,
        )
        lengths = list(zip(image_lengths, glyph_lengths, text_lengths, strict=True))
        samples = [
            torch.cat([rows[:n] for rows, n in zip(of_sample, of_kind, strict=True)])
            for *of_sample, of_kind in zip(*parts, lengths, strict=True)
        ]
        return pad_sequence(samples, batch_first=True), tuple(map(sum, lengths))


def _valid_first(
    tokens: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"], longest: int
) -> Float[Tensor, "batch longest dim"]:
    """The valid tokens of each sample, in their order, then padding; at least one row, so that no module sees none."""
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : max(longest, 1), None]
    return torch.take_along_dim(tokens, order.to(tokens.device), dim=1)


@stands_in
class PerSampleTokenRefiner(HunyuanVideo15TokenRefiner):
    """`HunyuanVideo15TokenRefiner` that can take the numbers of valid tokens in place of a mask."""

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        timestep: Tensor,
        attention_mask: Lengths | Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attention_mask, tuple):
            return super().forward(hidden_states, timestep, attention_mask)
        means = [rows[:n].float().mean(dim=0) for rows, n in zip(hidden_states, attention_mask, strict=True)]
        temb = self.time_text_embed(timestep, torch.stack(means).to(hidden_states.dtype))
        return self.token_refiner(self.proj_in(hidden_states), temb, attention_mask)


@stands_in
class PerSampleIndividualTokenRefiner(HunyuanVideo15IndividualTokenRefiner):
    """`HunyuanVideo15IndividualTokenRefiner` that can take the numbers of valid tokens in place of a mask."""

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        temb: Tensor,
        attention_mask: Lengths | Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attention_mask, tuple):
            return super().forward(hidden_states, temb, attention_mask)
        for block in self.refiner_blocks:
            hidden_states = block(hidden_states, temb, attention_mask)
        return hidden_states


@stands_in
class ValidTokensAttnProcessor(HunyuanVideo15AttnProcessor2_0):
    """Joint attention of each sample over its video tokens and its valid text and image tokens."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens dim"] | None = None,
        attention_mask: Lengths | Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(attention_mask, tuple):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        video = hidden_states.shape[1]
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (attn.norm_q(query), attn.norm_k(key))
        )
        text_query, text_key, text_value = (
            project(encoder_hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            text_query = attn.norm_added_q(text_query)
        if attn.norm_added_k is not None:
            text_key = attn.norm_added_k(text_key)
        attended = _attend_valid(
            partial(dispatch_attention_fn, backend=self._attention_backend, parallel_config=self._parallel_config),
            torch.cat([query, text_query], dim=1),
            torch.cat([key, text_key], dim=1),
            torch.cat([value, text_value], dim=1),
            tuple(video + n for n in attention_mask),
        )
        projection, dropout = attn.to_out
        return dropout(projection(attended[:, :video])), attn.to_add_out(attended[:, video:])


@stands_in
class ValidTokensRefinerAttnProcessor(AttnProcessor2_0):
    """Self-attention of each prompt over its own valid tokens."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Lengths | Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attention_mask, tuple):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        projection, dropout = attn.to_out
        return dropout(projection(_attend_valid(_attention, query, key, value, attention_mask)))


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention for [B, N, H, D]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _attend_valid(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Float[Tensor, "batch tokens heads dim"],
    key: Float[Tensor, "batch tokens heads dim"],
    value: Float[Tensor, "batch tokens heads dim"],
    lengths: Lengths,
) -> Float[Tensor, "batch tokens heads*dim"]:
    """Each sample's first `lengths[i]` rows attend to themselves, unmasked; the rows after them become zero."""
    tokens = query.shape[1]
    if all(n == tokens for n in lengths):
        return attend(query, key, value).flatten(2)
    rows = [attend(*(x[i : i + 1, :n] for x in (query, key, value))).flatten(2)[0] for i, n in enumerate(lengths)]
    return torch.stack([F.pad(part, (0, 0, 0, tokens - len(part))) for part in rows])


def _repair_transformer(transformer: HunyuanVideo15Transformer3DModel) -> Undo:
    require_source(TRANSFORMER_SOURCE)
    refiner = transformer.context_embedder.token_refiner
    with ExitStack() as done:
        done.callback(reclass(transformer, PerSampleTransformer))
        done.callback(reclass(transformer.context_embedder, PerSampleTokenRefiner))
        done.callback(reclass(refiner, PerSampleIndividualTokenRefiner))
        for block in transformer.transformer_blocks:
            done.callback(_exchange_processor(block.attn, HunyuanVideo15AttnProcessor2_0, ValidTokensAttnProcessor))
        for block in refiner.refiner_blocks:
            done.callback(_exchange_processor(block.attn, AttnProcessor2_0, ValidTokensRefinerAttnProcessor))
        return done.pop_all().close


def _exchange_processor(attn: Attention, expected: type, repaired: type) -> Undo:
    """Give `attn` a `repaired` processor with the settings (such as the attention backend) of the one it had."""
    before = attn.processor
    if type(before) is not expected:
        raise CannotRepair(
            f"found the attention processor {type(before).__qualname__} where {expected.__name__} was expected"
        )
    processor = repaired()
    vars(processor).update(vars(before))
    attn.set_processor(processor)
    return partial(attn.set_processor, before)
