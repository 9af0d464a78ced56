"""Tokenizers of the real model's kinds over a handful of words: byte-level BPE by Llama 3's rules, and CLIP's BPE.

Words of the vocabulary are one token each; any other text is spelled in bytes, so nothing is ever unknown to them.
HunyuanVideo's own prompt template takes 95 tokens, as with the real tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def llama_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Llama 3's splitting rule and begin-of-text token, with `words` and those of the prompt template as tokens."""
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    texts = [*re.split(r"<\|\w+\|>", DEFAULT_PROMPT_TEMPLATE["template"]), " " + " ".join(words), *words]
    pieces = [piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)]
    tokens = dict.fromkeys([*BYTES, *pieces])
    # ignore_merges, as in Llama 3's own file: a piece that is in the vocabulary is one token, any other falls to bytes
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(LLAMA_SPECIAL))
    begin = LLAMA_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token="<|eot_id|>", pad_token="<|pad|>", padding_side="right"
    )


def clip_tokenizer(words: Sequence[str], folder: Path) -> CLIPTokenizer:
    """From the vocab.json and merges.txt that are written into `folder`, as CLIP's own is."""
    merges: dict[tuple[str, str], None] = {}
    vocabulary = dict.fromkeys([*BYTES, *(letter + "</w>" for letter in BYTES)])
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            merges[left, right] = None
            left += right
            vocabulary[left] = None
    vocabulary.update(dict.fromkeys(["<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
