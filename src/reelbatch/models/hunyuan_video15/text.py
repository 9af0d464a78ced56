"""Prompt to conditioning: Qwen's hidden states and ByT5's states of quoted words, each alone and at its true length.

The reference is `HunyuanVideo15Pipeline.encode_prompt` of Diffusers, which pads every prompt to 1,000 tokens and every
glyph text to 256 and masks the padding; the states are the same to rounding. Qwen is causal. ByT5 is not: a glyph text
goes through it by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLTextModel, T5EncoderModel

from reelbatch.models.linear import pad_linears
from reelbatch.models.prompts import PromptStates, PromptTemplate, tokenize, warn_if_cut
from reelbatch.tracing import cached

MAX_TOKENS, MAX_GLYPH_TOKENS = 1000, 256
SYSTEM_MESSAGE = (
    "You are a helpful assistant. Describe the video by detailing the following aspects: "
    "        1. The main content and theme of the video. "
    "        2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    "        3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
    "        4. background environment, light, style and atmosphere. "
    "        5. camera angles, movements, and transitions used in the video."
)
"""The runs of spaces are tokens that the model was trained with (the reference's line continuations)."""
DEFAULT_TEMPLATE = PromptTemplate(
    f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen's chat template with the reference's system message."""
QUOTED = re.compile(r"\"(.*?)\"|“(.*?)”")
"""Words that the video is to show, in either pair of quotation marks; they do not run over the end of a line."""


@dataclass(frozen=True)
class TextStates:
    """What the transformer is given of one prompt. Shared between equal prompts: do not write into it.

    Attributes:
        text: Qwen's states of the prompt's tokens and the template's end, at their true length.
        glyphs: ByT5's states of the quoted words; None where there are none.
    """

    text: Float[Tensor, "tokens text_embed_dim"]
    glyphs: Float[Tensor, "glyph_tokens text_embed_2_dim"] | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TextStates:
        """On a device, in a dtype."""
        return TextStates(self.text.to(device, dtype), None if self.glyphs is None else self.glyphs.to(device, dtype))


def glyph_text(prompt: str) -> str | None:
    """What ByT5 reads of a prompt: `Text "A". Text "B". ` for the different quoted words, in order; None for none."""
    words = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(prompt))
    return "".join(f'Text "{word}". ' for word in words) or None


class TextEncoder:
    """Encodes one prompt at a time (batch 1), so that a prompt's states never depend on another prompt.

    Equal prompts and equal glyph texts are encoded once while they are among the last `cache_size` different ones.

    Args:
        qwen: the language model of Qwen2.5-VL; `tokenizer` is its own.
        byt5: ByT5 as trained for glyphs (Glyph-ByT5), not a plain ByT5; `tokenizer_2` is its own.
        template: put around every prompt that Qwen reads. Without a `crop_start`, all tokens before the prompt are
            cropped, as Tencent's code does (108 with the published tokenizer).
        max_tokens, max_glyph_tokens: how many tokens are read at most (of Qwen, after the crop); the rest is cut, with
            a warning.
        cache_size: how many different prompts are kept.

    Raises:
        ValueError: if `template` and `tokenizer` do not fit each other (the crop would take the prompt as well).
    """

    def __init__(
        self,
        qwen: Qwen2_5_VLTextModel,
        tokenizer: PreTrainedTokenizerBase,
        byt5: T5EncoderModel,
        tokenizer_2: PreTrainedTokenizerBase,
        template: PromptTemplate = DEFAULT_TEMPLATE,
        max_tokens: int = MAX_TOKENS,
        max_glyph_tokens: int = MAX_GLYPH_TOKENS,
        cache_size: int = 128,
    ) -> None:
        pad_linears(byt5)
        self.qwen, self.tokenizer = qwen, tokenizer
        self.byt5, self.tokenizer_2 = byt5, tokenizer_2
        self.template, self.max_tokens, self.max_glyph_tokens = template, max_tokens, max_glyph_tokens
        crop_start = template.crop_start
        if crop_start is None:
            crop_start = len(tokenizer(template.prefix).input_ids)
        self.crop_start = crop_start
        self.states = PromptStates(qwen, tokenizer, template, crop_start, max_tokens, cache_size)
        self._glyphs = cached(cache_size)(self._encode_glyphs)

    def encode(self, prompt: str) -> TextStates:
        """States of a prompt; an empty one is read as a space.

        Warns with a PromptCutWarning when words had to be cut.
        """
        glyphs = glyph_text(prompt)
        return TextStates(self.states(prompt or " "), None if glyphs is None else self._glyphs(glyphs))

    def forget(self, prefix: bool = False) -> None:
        """Drops what is kept of prompts encoded so far; with `prefix`, of the template's beginning as well."""
        self.states.forget(prefix)
        self._glyphs.cache_clear()

    @torch.no_grad()
    def _encode_glyphs(self, text: str) -> Tensor:
        ids, cut = tokenize(self.tokenizer_2, text, self.max_glyph_tokens)
        warn_if_cut("text in quotation marks, which the video is to show,", self.max_glyph_tokens, cut)
        states: Tensor = self.byt5(input_ids=torch.tensor([ids], device=self.byt5.device)).last_hidden_state[0].clone()
        return states
