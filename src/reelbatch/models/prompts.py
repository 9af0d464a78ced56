"""Prompts to the states of a causal language model, each prompt alone, at its true length, behind a template.

Such a model's states of a token do not depend on what would follow it, so what the reference pads goes unpadded here,
and the template's beginning goes through the model once: its keys and values are then reused.
"""

from __future__ import annotations

import string
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from reelbatch.models.linear import pad_linears
from reelbatch.tracing import cached
from reelbatch.wording import shown

HIDDEN_STATE = -3
"""Which of the hidden states conditions the video: the output of the last layer but two, without the final norm."""
MAX_TEMPLATE_LENGTH = 20_000
"""Characters. HunyuanVideo's own template has about 500."""


class PromptCutWarning(UserWarning):
    """A prompt was longer than its encoder reads; the message quotes what was left out."""


@dataclass(frozen=True)
class PromptTemplate:
    """The text put around a prompt before the language model reads it.

    Attributes:
        template: a format string with one `{}`, where the prompt goes.
        crop_start: how many tokens at the front (the instructions, with begin-of-text) are dropped from the states.
            None: what the model's family has the tokenizer count.
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
    def prefix(self) -> str:
        """What goes before the prompt."""
        return self.template.rpartition("{}")[0].format()

    @property
    def suffix(self) -> str:
        """What follows the prompt."""
        return self.template.rpartition("{}")[2].format()


class PromptStates:
    """States of the last prompts, each encoded by itself.

    Args:
        model: gives all hidden states of token ids. tokenizer: is its own.
        template: put around every prompt.
        crop_start: tokens at the front that are dropped from the states.
        max_tokens: how many tokens after the crop are read at most; the rest of the prompt is cut, with a warning.
        cache_size: how many different prompts are kept.

    Raises:
        ValueError: if `template` and `tokenizer` do not fit each other (the crop would take the prompt as well).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        crop_start: int,
        max_tokens: int,
        cache_size: int,
    ) -> None:
        pad_linears(model)  # a prompt of few tokens behind the cached prefix is a small product
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.crop_start, self.max_tokens = crop_start, max_tokens
        self.prefix_ids = expect_tokens(tokenizer, template, crop_start)
        self._prefix = cached(1)(self._prefix_keys_values)
        self._kept = cached(cache_size)(self._encode)

    def __call__(self, prompt: str) -> Float[Tensor, "tokens hidden"]:
        """States of the prompt and of the template's end. Shared between equal prompts: do not write into them.

        Warns with a PromptCutWarning when words had to be cut.

        Raises:
            ValueError: if no token is left to condition on: an empty prompt in a template without a suffix.
        """
        return self._kept(prompt)

    def forget(self, prefix: bool = False) -> None:
        """Drops what is kept of prompts encoded so far; with `prefix`, of the template's beginning as well."""
        if prefix:
            self._prefix.cache_clear()
        self._kept.cache_clear()

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        text, crop = self.template.template.format(prompt), self.crop_start
        ids, cut = tokenize(self.tokenizer, text, crop + self.max_tokens)
        warn_if_cut("prompt", self.max_tokens, cut.removesuffix(self.template.suffix))
        if len(ids) == crop:
            raise ValueError(
                f"the prompt {prompt!r} gives no token at all with the prompt template {self.template.template!r}"
            )
        # Text and template are tokenised as one: where the prompt's first letters merge into the prefix's last token,
        # the cached prefix does not hold and the whole is run. This depends on the prompt only.
        if crop and ids[:crop] == self.prefix_ids:
            return self._states(ids[crop:], DynamicCache(self._prefix()))
        return self._states(ids)[crop:].clone()

    def _states(self, ids: list[int], cache: DynamicCache | None = None) -> Tensor:
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        states: Tensor = output.hidden_states[HIDDEN_STATE][0]
        return states

    def _prefix_keys_values(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values of each layer for the template's beginning, `[1, heads, tokens, head_dim]`; never changed."""
        cache = DynamicCache(config=self.model.config)
        self._states(self.prefix_ids, cache)
        return tuple((layer.keys, layer.values) for layer in cache.layers)


def expect_tokens(tokenizer: Any, template: PromptTemplate, crop_start: int) -> list[int]:
    """The token ids of a template that are cropped from every prompt.

    Raises:
        ValueError: if the template is shorter than that.
    """
    empty: list[int] = tokenizer(template.template.format("")).input_ids
    if crop_start > len(empty):
        raise ValueError(
            f"the prompt template is {len(empty)} tokens long for this tokenizer, but crop_start is {crop_start}: the "
            "crop would take the prompt as well. Give the template and crop_start that this model was made with"
        )
    return empty[:crop_start]


def tokenize(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], str]:
    """Token ids of `text`, at most `max_length` with special tokens, and the end of the text that did not fit."""
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) <= max_length:
        return ids, ""
    if not tokenizer.is_fast:  # knows no offsets; ids are those of the whole text, less special tokens at its end
        kept = tokenizer(text, truncation=True, max_length=max_length).input_ids
        same = next((i for i, pair in enumerate(zip(ids, kept, strict=False)) if pair[0] != pair[1]), len(kept))
        return kept, tokenizer.decode(ids[same:], skip_special_tokens=True)
    kept = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    end = max((end for _, end in kept.offset_mapping), default=0)  # added special tokens have the offsets (0, 0)
    return kept.input_ids, text[end:]


def warn_if_cut(what: str, limit: int, cut: str) -> None:
    """Warns with a PromptCutWarning if something was cut that can be seen."""
    if cut := cut.strip():
        warnings.warn(
            f"The {what} is longer than the {limit} tokens that are read; this part was cut: {cut!r}",
            PromptCutWarning,
            stacklevel=4,
        )
