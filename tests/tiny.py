"""A complete HunyuanVideo model folder with random weights, made in about a second.

Same classes, same folder layout and same kind of tokenizers as the real model (byte-level BPE with Llama 3's
splitting rule and begin-of-text token; CLIP's BPE), so that Diffusers' own pipeline opens it and its default prompt
template of 95 tokens fits. Every weight is random and not zero, modulation layers and biases too: a test that compares
two paths would otherwise not see a part of the network that was left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from reelbatch.demo.tokenizers import clip_tokenizer, llama_tokenizer

WORD_LIST = (
    "a an and the of on in with two three small large red green blue yellow black white grey pink circle square star "
    "triangle cat dog horse robot moving running standing left right up down still slowly quickly background street "
    "sea night day rain cinematic blurry low quality"
)
WORDS = WORD_LIST.split()
"""Words that are one token each for both tokenizers; any other text is spelled in bytes."""


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Give every one-dimensional parameter (biases, norm scales) noise as well: by default they are all zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def transformer_config(patch_size: int = 2) -> dict:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "patch_size": patch_size,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }


def transformer(patch_size: int = 2, seed: int = 0, **changes) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(**{**transformer_config(patch_size), **changes})
    randomise(model, seed)
    return model.eval()


def vae(seed: int = 0, **changes) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(seed)
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **changes,
    }
    model = AutoencoderKLHunyuanVideo(**config)
    randomise(model, seed)
    return model.eval()


def llama_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 32) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )


def llama(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 32, seed: int = 0) -> LlamaModel:
    torch.manual_seed(seed)
    model = LlamaModel(llama_config(tokenizer, hidden_size))
    randomise(model, seed)
    return model.eval()


def clip(tokenizer: CLIPTokenizer, hidden_size: int = 24, seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=32,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,
    )
    model = CLIPTextModel(config)
    randomise(model, seed)
    return model.eval()


def pipeline(folder: Path, patch_size: int = 2, seed: int = 0) -> HunyuanVideoPipeline:
    """All components with random weights; `folder` is where CLIP's vocabulary files are written."""
    tokenizer, tokenizer_2 = llama_tokenizer(WORDS), clip_tokenizer(WORDS, folder)
    return HunyuanVideoPipeline(
        text_encoder=llama(tokenizer, seed=seed),
        tokenizer=tokenizer,
        transformer=transformer(patch_size, seed),
        vae=vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(tokenizer_2, seed=seed),
        tokenizer_2=tokenizer_2,
    )


def make_folder(folder: Path, patch_size: int = 2, seed: int = 0) -> Path:
    """Write a whole model folder (Diffusers layout, safetensors, fp32) and a `reelbatch.json` with small defaults."""
    pipeline(folder / "tokenizer_2", patch_size, seed).save_pretrained(folder)
    defaults = {"height": 32, "width": 32, "frames": 9, "steps": 3, "guidance": 6.0, "fps": 8}
    profile = {"about": "random weights, for tests", "defaults": defaults}
    (folder / "reelbatch.json").write_text(json.dumps(profile), encoding="utf-8")
    return folder
