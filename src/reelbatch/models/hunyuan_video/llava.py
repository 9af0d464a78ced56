"""Prompt and image to conditioning: LLaVA's states of both, and CLIP's pooled vector of the prompt.

The reference is `HunyuanVideoImageToVideoPipeline.encode_prompt` of Diffusers. LLaVA's language model is causal, and
the image stands in the template before the prompt: the image's states depend on no prompt, and go through the network
once an image. Nothing is padded, and each prompt goes through it alone, with its own image.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import PIL.Image
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, DynamicCache, PreTrainedTokenizerFast

from reelbatch.models.hunyuan_video.text import PooledText, TextStates
from reelbatch.models.images import Source
from reelbatch.models.linear import pad_linears
from reelbatch.models.prompts import HIDDEN_STATE, PromptTemplate, expect_tokens, tokenize, warn_if_cut
from reelbatch.request import VideoRequest
from reelbatch.tracing import cached

DEFAULT_TEMPLATE = PromptTemplate(DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"])
HEADER_END, HEADER_TOKENS = "<|end_header_id|>", 4
"""The template ends with the assistant's header: four tokens, the last of which is this one. Their states are left out,
as in the reference."""
NEGATIVE_STRIDE = 2
"""Of the black image that the negative prompt is read with, every second state is taken, whatever the model takes of
the image itself, as in the reference."""
KEPT_PREFIXES, KEPT_IMAGES = 2, 16
"""Images whose keys and values are kept (a request's own and, with guidance, the black one), and whose states are."""


class LlavaModel(transformers.LlavaModel):
    """transformers' class, that reads a folder of the whole network without a warning of the head for next words,
    which it leaves out."""

    _group_offload_block_modules: ClassVar = ("language_model", "embed_tokens", "vision_tower", "encoder")
    """Parts whose weights may come by themselves: the two networks and their blocks, and the embedding, which is used
    before the language model is entered."""
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"lm_head\.weight$"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """It has the network and the name of transformers' class, by which names of weights are translated."""
        return False


class Prefix(NamedTuple):
    """The template up to the prompt, with an image in it, as LLaVA read it.

    Attributes:
        keys_values: of each layer, `[1, heads, tokens, head_dim]`; never changed.
        image: states of the image.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    image: Float[Tensor, "image_tokens dim"]


class ImagePromptStates:
    """LLaVA's states of prompts, each with its image and without any other.

    Args:
        llava: the network without its head for next words. tokenizer: is its own.
        processor: transformers' image processor that its vision tower was made with.
        template: put around every prompt; holds the image token once before the prompt.
        crop_start: tokens at the front, the image being one, that are dropped from the states.
        max_tokens: how many tokens after the crop are read at most; the rest of the prompt is cut, with a warning.
        cache_size: how many different pairs of a prompt and an image are kept.

    Raises:
        ValueError: if template, tokenizer and network do not fit each other.
    """

    def __init__(
        self,
        llava: LlavaModel,
        tokenizer: PreTrainedTokenizerFast,
        processor: Any,
        template: PromptTemplate,
        crop_start: int,
        max_tokens: int,
        cache_size: int,
    ) -> None:
        pad_linears(llava)
        self.llava, self.tokenizer, self.processor, self.template = llava, tokenizer, processor, template
        self.crop_start, self.max_tokens = crop_start, max_tokens
        self.image_token: int = llava.config.image_token_id
        self.header_end: int | None = tokenizer.convert_tokens_to_ids(HEADER_END)
        self.prefix_ids = expect_tokens(tokenizer, template, crop_start)
        if self.prefix_ids.count(self.image_token) != 1:
            raise ValueError(
                f"the first {crop_start} tokens of the prompt template hold the image token (id {self.image_token}) "
                f"{self.prefix_ids.count(self.image_token)} times for this tokenizer, and must hold it once. Give the "
                "template, crop_start and tokenizer that this model was made with"
            )
        self._prefix = cached(KEPT_PREFIXES)(self._read_prefix)
        self._image = cached(KEPT_IMAGES)(lambda image: self._prefix(image).image)
        self._kept = cached(cache_size)(self._encode)

    @property
    def image_tokens(self) -> int:
        """States that there are of any image."""
        vision = self.llava.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return int(patches + (self.llava.config.vision_feature_select_strategy == "full"))

    def __call__(self, prompt: str, image: Source) -> tuple[Float[Tensor, "image_tokens dim"], Tensor]:
        """States of the image, and those of the prompt, `[tokens, dim]`. Shared between equal prompts and images: do
        not write into them.

        Warns with a PromptCutWarning when words had to be cut.

        Raises:
            ValueError: for a prompt that spells the image token, and for one that leaves no token to condition on.
        """
        return self._image(image), self._kept(prompt, image)

    def forget(self, prefix: bool = False) -> None:
        """Drops what is kept of prompts and images; with `prefix`, of the template's beginning as well."""
        if prefix:
            self._prefix.cache_clear()
        self._image.cache_clear()
        self._kept.cache_clear()

    @torch.no_grad()
    def _encode(self, prompt: str, image: Source) -> Tensor:
        text, crop = self.template.template.format(prompt), self.crop_start
        ids, cut = tokenize(self.tokenizer, text, crop + self.max_tokens)
        warn_if_cut("prompt", self.max_tokens, cut.removesuffix(self.template.suffix))
        if ids.count(self.image_token) != 1:
            raise ValueError("the prompt spells this model's mark for an image, as in '<image>': write it otherwise")
        # Where the prompt's first letters merge into the prefix's last token, the kept prefix does not hold and the
        # whole is run. This depends on the prompt only.
        if ids[:crop] == self.prefix_ids:
            states = self._states(ids[crop:], DynamicCache(self._prefix(image).keys_values))
        else:
            states = self._states(ids, image=image)[crop - 1 + self.image_tokens :]
        end = self._header_end(ids) - crop
        kept = torch.cat([states[: max(end - HEADER_TOKENS, 0)], states[end:]])
        if not len(kept):
            raise ValueError(f"the prompt {prompt!r} leaves no token with the template {self.template.template!r}")
        return kept

    def _header_end(self, ids: list[int]) -> int:
        """The place after the assistant's header; where it was cut, the reference takes the last tokens for it."""
        ends = [place for place in range(self.crop_start, len(ids)) if ids[place] == self.header_end]
        return ends[-1] + 1 if ends else len(ids)

    def _read_prefix(self, image: Source) -> Prefix:
        cache = DynamicCache(config=self.llava.config.get_text_config())
        states = self._states(self.prefix_ids, cache, image)
        start = self.prefix_ids.index(self.image_token)
        keys_values = tuple((layer.keys, layer.values) for layer in cache.layers)
        return Prefix(keys_values, states[start : start + self.image_tokens].clone())

    @torch.no_grad()
    def _states(self, ids: list[int], cache: DynamicCache | None = None, image: Source | None = None) -> Tensor:
        """States of token ids, with one for each of the image's in the place of its token."""
        llava, pixels = self.llava, None
        if image is not None:
            inputs = self.processor.preprocess(images=image.open().convert("RGB"), return_tensors="pt")
            pixels = inputs["pixel_values"].to(llava.device, llava.dtype)
            place = ids.index(self.image_token)
            ids = [*ids[:place], *[self.image_token] * self.image_tokens, *ids[place + 1 :]]
        output = llava(
            input_ids=torch.tensor([ids], device=llava.device),
            pixel_values=pixels,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        states: Tensor = output.hidden_states[HIDDEN_STATE][0]
        return states


class ImageTextEncoder:
    """Encodes the prompts of a request, each with its image: `[every so manieth state of the image | prompt]`.

    Args:
        llava, tokenizer, processor, template, max_tokens, cache_size: as of `ImagePromptStates`; `crop_start` is the
            template's, or counts the tokens before the prompt.
        clip: for the pooled vector; `tokenizer_2` is its own.
        stride: every so manieth state of the image is taken.
    """

    def __init__(
        self,
        llava: LlavaModel,
        tokenizer: PreTrainedTokenizerFast,
        processor: Any,
        clip: CLIPTextModel,
        tokenizer_2: PreTrainedTokenizerFast,
        stride: int,
        template: PromptTemplate = DEFAULT_TEMPLATE,
        max_tokens: int = 256,
        cache_size: int = 64,
    ) -> None:
        self.llama, self.clip, self.template = llava, clip, template
        self.stride, self.max_tokens = stride, max_tokens
        crop_start = template.crop_start
        if crop_start is None:
            crop_start = len(tokenizer(template.prefix).input_ids)
        self.states = ImagePromptStates(llava, tokenizer, processor, template, crop_start, max_tokens, cache_size)
        self._pooled = PooledText(clip, tokenizer_2, cache_size)

    def encode(self, prompt: str, image: Source, stride: int, prompt_2: str | None = None) -> TextStates:
        """TextStates for a prompt and an image; CLIP reads `prompt_2` instead where one is given."""
        seen, text = self.states(prompt, image)
        pooled = self._pooled(prompt if prompt_2 is None else prompt_2)
        return TextStates(torch.cat([seen[::stride], text]), pooled)

    def of_request(self, request: VideoRequest) -> list[TextStates]:
        """Of the prompt with the request's image and, with guidance, of the negative prompt with a black one.

        Raises:
            ValueError: without an image.
        """
        if request.image is None:
            raise ValueError("this model begins its videos with an image, and the request gives none")
        image = Source(request.image.open, request.image.sha256)
        states = [self.encode(request.prompt, image, self.stride, request.prompt_2)]
        if request.uses_cfg:
            states.append(self.encode(request.negative_prompt or "", BLACK, NEGATIVE_STRIDE))
        return states

    def most_tokens(self, request: VideoRequest) -> tuple[int, ...]:
        """The most that each of a request's prompts takes, with its image."""
        strides = (self.stride, NEGATIVE_STRIDE) if request.uses_cfg else (self.stride,)
        return tuple(-(-self.states.image_tokens // stride) + self.max_tokens for stride in strides)

    def forget(self, prefix: bool = False) -> None:
        """Drops what is kept of prompts and images; with `prefix`, of the template's beginning as well."""
        self.states.forget(prefix)
        self._pooled.forget()


BLACK = Source(lambda: PIL.Image.new("RGB", (64, 64)), "black")
"""As an image processor makes the same of any black image, its size does not matter."""
