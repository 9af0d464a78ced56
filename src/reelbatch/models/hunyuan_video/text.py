"""Prompt to conditioning: Llama hidden states and a pooled CLIP vector, each prompt alone and at its true length.

The reference is `HunyuanVideoPipeline.encode_prompt` of Diffusers. There every prompt is padded to 256 tokens; here
nothing is padded. Both encoders are causal, so a token's states do not depend on what would follow it, and the states
are the reference's to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerFast

from reelbatch.models.linear import pad_linears
from reelbatch.models.prompts import PromptCutWarning, PromptStates, PromptTemplate, tokenize, warn_if_cut
from reelbatch.request import VideoRequest
from reelbatch.tracing import cached

__all__ = ["DEFAULT_TEMPLATE", "PromptCutWarning", "PromptTemplate", "TextEncoder", "TextStates"]

CLIP_MAX_TOKENS = 77
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

    Equal prompts are encoded once while they are among the last `cache_size` different ones.

    Args:
        llama: the first text encoder, for the token states; `tokenizer` is its own.
        clip: the second, for the pooled vector; `tokenizer_2` is its own.
        template: put around every prompt that Llama reads. Without a `crop_start`, its own token count less two (the
            placeholder and one closing token) is cropped, as in the reference.
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
        self.llama, self.tokenizer = llama, tokenizer
        self.clip, self.tokenizer_2 = clip, tokenizer_2
        self.template, self.max_tokens = template, max_tokens
        crop_start = template.crop_start
        if crop_start is None:
            crop_start = max(len(tokenizer(template.template).input_ids) - 2, 0)
        self.crop_start = crop_start
        self.states = PromptStates(llama, tokenizer, template, crop_start, max_tokens, cache_size)
        self._pooled = PooledText(clip, tokenizer_2, cache_size)

    def encode(self, prompt: str, prompt_2: str | None = None) -> TextStates:
        """TextStates for `prompt`; CLIP reads `prompt_2` instead where one is given (the reference ignores it).

        Warns with a PromptCutWarning when words had to be cut.

        Raises:
            ValueError: if no token is left to condition on: an empty prompt in a template without a suffix.
        """
        return TextStates(self.states(prompt), self._pooled(prompt if prompt_2 is None else prompt_2))

    def of_request(self, request: VideoRequest) -> list[TextStates]:
        """Of the prompt and, with guidance, of the negative prompt."""
        prompts = [self.encode(request.prompt, request.prompt_2)]
        if request.uses_cfg:
            prompts.append(self.encode(request.negative_prompt or ""))
        return prompts

    def most_tokens(self, request: VideoRequest) -> tuple[int, ...]:
        """The most that each of a request's prompts takes."""
        return (self.max_tokens,) * (2 if request.uses_cfg else 1)

    def forget(self, prefix: bool = False) -> None:
        """Drops what is kept of prompts encoded so far; with `prefix`, of the template's beginning as well."""
        self.states.forget(prefix)
        self._pooled.forget()


class PooledText:
    """CLIP's pooled vectors of the last prompts, each encoded by itself.

    Args:
        clip: the text model. tokenizer: is its own. cache_size: how many different prompts are kept.
    """

    def __init__(self, clip: CLIPTextModel, tokenizer: PreTrainedTokenizerFast, cache_size: int) -> None:
        pad_linears(clip)
        self.clip, self.tokenizer = clip, tokenizer
        self._kept = cached(cache_size)(self._encode)

    def __call__(self, prompt: str) -> Float[Tensor, " pooled_dim"]:
        """Warns with a PromptCutWarning when words had to be cut."""
        return self._kept(prompt)

    def forget(self) -> None:
        """Drops what is kept."""
        self._kept.cache_clear()

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        limit = min(CLIP_MAX_TOKENS, self.clip.config.max_position_embeddings)
        ids, cut = tokenize(self.tokenizer, prompt, limit)
        warn_if_cut("prompt for CLIP, which sets the overall look,", limit, cut)
        pooled: Tensor = self.clip(input_ids=torch.tensor([ids], device=self.clip.device)).pooler_output[0].clone()
        return pooled
