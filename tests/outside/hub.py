"""Local stand-ins for the tiny tokenizers and models that Diffusers' HunyuanVideo tests take from the hub.

They are of the same kinds and widths, with other vocabularies and weights, so that no test needs a network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
)

import reelbatch.demo
from reelbatch.demo.tokenizers import llama_tokenizer

BUNDLED = Path(reelbatch.demo.__file__).parent / "model"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama(**_: Any) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast.from_pretrained(BUNDLED / "tokenizer")


def clip(**_: Any) -> PreTrainedTokenizerBase:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer_2")


def hunyuan_video_tokenizer(subfolder: str = "", **_: Any) -> PreTrainedTokenizerBase:
    return clip() if subfolder == "tokenizer_2" else llama()


def hunyuan_video_text_encoder(subfolder: str = "", **_: Any) -> PreTrainedModel:
    """As wide as the tests' transformer expects: 16 for Llama, 8 for CLIP."""
    torch.manual_seed(0)
    shared = {"intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000}
    if subfolder == "text_encoder_2":
        return CLIPTextModel(CLIPTextConfig(hidden_size=8, projection_dim=32, eos_token_id=2, **shared)).eval()
    return LlamaModel(LlamaConfig(hidden_size=16, pad_token_id=1, **shared)).eval()


def qwen(**_: Any) -> PreTrainedTokenizerBase:
    """Byte-level, with Qwen's chat markup."""
    tokenizer = llama_tokenizer(["system", "user", "assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def siglip_processor(**kwargs: Any) -> SiglipImageProcessor:
    return SiglipImageProcessor(size=kwargs.get("size", {"height": 30, "width": 30}))


def siglip_model(**_: Any) -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, image_size=30, patch_size=2
    )
    return SiglipVisionModel(config).eval()


def t5_config(**_: Any) -> PretrainedConfig:
    return T5Config(
        d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=5, vocab_size=1103, relative_attention_num_buckets=8
    )


Factory = Callable[..., Any]

TOKENIZERS: dict[str, Factory] = {
    "finetrainers/dummy-hunyaunvideo": llama,
    "hf-internal-testing/tiny-random-clip": clip,
    "hf-internal-testing/tiny-random-hunyuanvideo": hunyuan_video_tokenizer,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": qwen,
}
MODELS: dict[str, Factory] = {
    "hf-internal-testing/tiny-random-hunyuanvideo": hunyuan_video_text_encoder,
    "hf-internal-testing/tiny-random-SiglipVisionModel": siglip_model,
}
PROCESSORS: dict[str, Factory] = {"hf-internal-testing/tiny-random-SiglipVisionModel": siglip_processor}
CONFIGS: dict[str, Factory] = {"hf-internal-testing/tiny-random-t5": t5_config}


def stay_local() -> None:
    """`from_pretrained` of the names above makes the stand-in; of any other name, it does what it did."""
    for loader, factories in (
        (PreTrainedTokenizerBase, TOKENIZERS),
        (PreTrainedModel, MODELS),
        (SiglipImageProcessor, PROCESSORS),
        (AutoConfig, CONFIGS),
    ):
        redirect(loader, factories)


def redirect(loader: type, factories: dict[str, Factory]) -> None:
    load = loader.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        if factory := factories.get(str(name)):
            return factory(**kwargs)
        return load(cls, name, *args, **kwargs)

    loader.from_pretrained = classmethod(from_pretrained)
