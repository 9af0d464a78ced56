"""Tokenizers of the real models' kinds over a handful of words: byte-level BPE as in Llama 3 and Qwen 2.5, CLIP's BPE.

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

from reelbatch.models.hunyuan_video15.text import DEFAULT_TEMPLATE

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen's own gives for texts with a system message."""
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def llama_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Llama 3's splitting rule and begin-of-text token, with `words` and those of the prompt template as tokens."""
    tokenizer = _word_tokenizer(words, LLAMA3_SPLIT, LLAMA_SPECIAL, DEFAULT_PROMPT_TEMPLATE["template"])
    begin = LLAMA_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token="<|eot_id|>", pad_token="<|pad|>", padding_side="right"
    )


def qwen_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Qwen 2.5's splitting rule and chat template, with `words` and those of the prompt template as tokens."""
    tokenizer = _word_tokenizer(words, QWEN_SPLIT, QWEN_SPECIAL, DEFAULT_TEMPLATE.template)
    end = QWEN_SPECIAL[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        padding_side="right",
        chat_template=QWEN_CHAT,
    )


def _word_tokenizer(words: Sequence[str], rule: str, special: Sequence[str], template: str) -> Tokenizer:
    split = pre_tokenizers.Split(Regex(rule), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    texts = [*re.split(r"<\|\w+\|>", template), " " + " ".join(words), *words]
    pieces = [piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)]
    tokens = dict.fromkeys([*BYTES, *pieces])
    # ignore_merges, as in Llama 3's own file: a piece that is in the vocabulary is one token, any other falls to bytes
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


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
