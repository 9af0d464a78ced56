"""The bundled model's text encoders: a Llama trained to write captions, a CLIP to classify what they ask for."""

from __future__ import annotations

import random
import re

import torch
import torch.nn.functional as F
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from reelbatch.demo import shapes

TEXT_DIM = 64
POOLED_DIM = 64
BATCH = 32


def vocabulary() -> list[str]:
    """Every word of every caption."""
    captions = (shapes.caption(scene, w) for scene in shapes.scenes() for w in range(len(shapes.WORDINGS)))
    return sorted({word for caption in captions for word in re.findall(r"\w+|,", caption)})


def build_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=POOLED_DIM,
            intermediate_size=2 * POOLED_DIM,
            projection_dim=POOLED_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _some_captions(rng: random.Random) -> tuple[list[shapes.Scene], list[str]]:
    scenes = rng.choices(shapes.scenes(), k=BATCH)
    return scenes, [shapes.caption(scene, rng.randrange(len(shapes.WORDINGS))) for scene in scenes]


def train_llama(llama: LlamaModel, tokenizer: PreTrainedTokenizerFast, steps: int = 300, seed: int = 0) -> float:
    """Next-token prediction on captions in the prompt template; returns the last loss (nats a token)."""
    rng, template = random.Random(seed), DEFAULT_PROMPT_TEMPLATE["template"]
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    value = torch.zeros(())
    llama.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        texts = [template.format(caption) for caption in _some_captions(rng)[1]]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        states = llama(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        logits = F.linear(states[:, :-1], llama.embed_tokens.weight)
        targets = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
        value = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    llama.eval()
    return value.item()


def train_clip(clip: CLIPTextModel, tokenizer: CLIPTokenizer, steps: int = 300, seed: int = 0) -> float:
    """The pooled vector learns to give the attributes away, each to a linear read-out; returns the last accuracy."""
    rng = random.Random(seed)
    names = {
        "color": list(shapes.COLORS),
        "shape": list(shapes.SHAPES),
        "size": list(shapes.SIZES),
        "motion": list(shapes.MOTIONS),
        "background": list(shapes.BACKGROUNDS),
    }
    heads = nn.ModuleDict({attribute: nn.Linear(POOLED_DIM, len(values)) for attribute, values in names.items()})
    optimizer = torch.optim.AdamW([*clip.parameters(), *heads.parameters()], lr=1e-3)
    accuracy = 0.0
    clip.train()
    for _ in range(steps):
        scenes, captions = _some_captions(rng)
        pooled = clip(**tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt")).pooler_output
        value, right = torch.zeros(()), []
        for attribute, values in names.items():
            logits = heads[attribute](pooled)
            targets = torch.tensor([values.index(getattr(scene, attribute)) for scene in scenes])
            value = value + F.cross_entropy(logits, targets)
            right.append((logits.argmax(1) == targets).float().mean())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        accuracy = torch.stack(right).mean().item()
    clip.eval()
    return accuracy
