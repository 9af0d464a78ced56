"""Prompt to conditioning: Llama hidden states and a pooled CLIP vector, each prompt alone and at its true length.

The reference is `HunyuanVideoPipeline.encode_prompt` of Diffusers. There every prompt is padded to 256 tokens; here
nothing is padded. Both encoders are causal, so a token's states do not depend on what would follow it, and the states
are the reference's to rounding.
"""

from __future__ import annotations

import string
import warnings
from dataclasses import dataclass

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, DynamicCache, LlamaModel, PreTrainedTokenizerFast

from reelbatch.models.linear import pad_linears
from reelbatch.request import shown
from reelbatch.tracing import cached

HIDDEN_STATE = -3
"""Which of Llama's hidden states conditions the video: the output of the last layer but two, without the final norm."""

CLIP_MAX_TOKENS = 77
MAX_TEMPLATE_LENGTH = 20_000
"""Characters. HunyuanVideo's own template has about 500."""


class PromptCutWarning(UserWarning):
    """A prompt was longer than its encoder reads; the message quotes what was left out."""


@dataclass(frozen=True)
class PromptTemplate:
    """The text put around a prompt before Llama reads it.

    Attributes:
        template: a format string with one `{}`, where the prompt goes.
        crop_start: how many tokens at the front (the instructions, with begin-of-text) are dropped from the states.
            None: the template's own token count less two (the placeholder and one closing token), as in the reference.
    """

    template: str
    crop_start: int | None = None

    def __post_init__(self) -> None:
        name = f"prompt template {shown(self.template)}"
        if len(self.template) > MAX_TEMPLATE_LENGTH:
            raise ValueError(f"{name} has {len(self.template)} characters; {MAX_TEMPLATE_LENGTH} are read at most")
        try:
            pieces = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"{name} is not a format string: {error}") from None
        # a width, as in {:>999999999}, would be written out
        if [piece[1:] for piece in pieces if piece[1] is not None] != [("", "", None)]:
            raise ValueError(f"{name} must hold exactly one {{}}, the place of the prompt")
        if self.crop_start is not None and not 0 <= self.crop_start <= MAX_TEMPLATE_LENGTH:
            raise ValueError(
                f"prompt template's crop_start is {shown(self.crop_start)}; it counts tokens, so it is a number from 0 "
                f"to {MAX_TEMPLATE_LENGTH}"
            )

    @property
    def suffix(self) -> str:
        """What follows the prompt."""
        return self.template.rpartition("{}")[2]


DEFAULT_TEMPLATE = PromptTemplate(**DEFAULT_PROMPT_TEMPLATE)


@dataclass(frozen=True)
class TextStates:
    """What the transformer is given of one prompt. Shared between equal prompts: do not write into it.

    Attributes:
        text: Llama's states of the prompt's tokens, at their true length (template prefix cropped, no padding).
        pooled: CLIP's pooled output.
    """

    text: Float[Tensor, "tokens text_embed_dim"]
    pooled: Float[Tensor, " pooled_dim"]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TextStates:
        """On a device, in a dtype."""
        return TextStates(self.text.to(device, dtype), self.pooled.to(device, dtype))


class TextEncoder:
    """Encodes one prompt at a time (batch 1), so that a prompt's states never depend on another prompt.

    The template's prefix goes through Llama once; its keys and values are then reused. Equal prompts are encoded once
    while they are among the last `cache_size` different ones.

    Args:
        llama: the first text encoder, for the token states; `tokenizer` is its own.
        clip: the second, for the pooled vector; `tokenizer_2` is its own.
        template: put around every prompt that Llama reads.
        max_tokens: how many tokens after the crop are read at most; the rest of the prompt is cut, with a warning.
        cache_size: how many different prompts are kept.

    Raises:
        ValueError: if `template` and `tokenizer` do not fit each other (the crop would take the prompt as well).
    """

    def __init__(
        self,
        llama: LlamaModel,
        tokenizer: PreTrainedTokenizerFast,
        clip: CLIPTextModel,
        tokenizer_2: PreTrainedTokenizerFast,
        template: PromptTemplate = DEFAULT_TEMPLATE,
        max_tokens: int = 256,
        cache_size: int = 128,
    ) -> None:
        pad_linears(llama)  # a prompt of few tokens behind the cached prefix is a small product
        pad_linears(clip)
        self.llama, self.tokenizer = llama, tokenizer
        self.clip, self.tokenizer_2 = clip, tokenizer_2
        self.template, self.max_tokens = template, max_tokens

        crop_start = template.crop_start
        if crop_start is None:
            crop_start = max(len(tokenizer(template.template).input_ids) - 2, 0)
        empty = tokenizer(template.template.format("")).input_ids
        if crop_start > len(empty):
            raise ValueError(
                f"the prompt template is {len(empty)} tokens long for this tokenizer, but crop_start is {crop_start}: "
                "the crop would take the prompt as well. Give the template and crop_start that this model was made with"
            )
        self.crop_start = crop_start
        self._prefix_ids: list[int] = empty[:crop_start]
        self._prefix = cached(1)(self._prefix_keys_values)
        self._text = cached(cache_size)(self._encode_llama)
        self._pooled = cached(cache_size)(self._encode_clip)

    def encode(self, prompt: str, prompt_2: str | None = None) -> TextStates:
        """TextStates for `prompt`; CLIP reads `prompt_2` instead where one is given (the reference ignores it).

        Warns with a PromptCutWarning when words had to be cut.

        Raises:
            ValueError: if no token is left to condition on: an empty prompt in a template without a suffix.
        """
        return TextStates(self._text(prompt), self._pooled(prompt if prompt_2 is None else prompt_2))

    def forget(self, prefix: bool = False) -> None:
        """Drops what is kept of prompts encoded so far; with `prefix`, of the template's beginning as well."""
        if prefix:
            self._prefix.cache_clear()
        self._text.cache_clear()
        self._pooled.cache_clear()

    @torch.no_grad()
    def _encode_llama(self, prompt: str) -> Tensor:
        text, crop = self.template.template.format(prompt), self.crop_start
        ids, cut = _tokenize(self.tokenizer, text, crop + self.max_tokens)
        _warn_if_cut("prompt", self.max_tokens, cut.removesuffix(self.template.suffix))
        if len(ids) == crop:
            raise ValueError(
                f"the prompt {prompt!r} gives no token at all with the prompt template {self.template.template!r}"
            )
        # Text and template are tokenised as one: where the prompt's first letters merge into the prefix's last token,
        # the cached prefix does not hold and the whole is run. This depends on the prompt only.
        if crop and ids[:crop] == self._prefix_ids:
            return self._llama_states(ids[crop:], DynamicCache(self._prefix()))
        return self._llama_states(ids)[crop:].clone()

    def _llama_states(self, ids: list[int], cache: DynamicCache | None = None) -> Tensor:
        output = self.llama(
            input_ids=torch.tensor([ids], device=self.llama.device),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        return output.hidden_states[HIDDEN_STATE][0]

    def _prefix_keys_values(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values of each layer for the template's beginning, `[1, heads, tokens, head_dim]`; never changed."""
        cache = DynamicCache(config=self.llama.config)
        self._llama_states(self._prefix_ids, cache)
        return tuple((layer.keys, layer.values) for layer in cache.layers)

    @torch.no_grad()
    def _encode_clip(self, prompt: str) -> Tensor:
        limit = min(CLIP_MAX_TOKENS, self.clip.config.max_position_embeddings)
        ids, cut = _tokenize(self.tokenizer_2, prompt, limit)
        _warn_if_cut("prompt for CLIP, which sets the overall look,", limit, cut)
        return self.clip(input_ids=torch.tensor([ids], device=self.clip.device)).pooler_output[0].clone()


def _tokenize(tokenizer: PreTrainedTokenizerFast, text: str, max_length: int) -> tuple[list[int], str]:
    """Token ids of `text`, at most `max_length` with special tokens, and the end of the text that did not fit."""
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) <= max_length:
        return ids, ""
    kept = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    end = max((end for _, end in kept.offset_mapping), default=0)  # added special tokens have the offsets (0, 0)
    return kept.input_ids, text[end:]


def _warn_if_cut(what: str, limit: int, cut: str) -> None:
    if cut := cut.strip():
        warnings.warn(
            f"The {what} is longer than the {limit} tokens that are read; this part was cut: {cut!r}",
            PromptCutWarning,
            stacklevel=4,
        )
