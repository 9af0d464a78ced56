"""FlexAttention: rules compiled to block masks, for shapes in buckets.

A kernel is compiled for each shape, which takes seconds. A sample is therefore laid into the next larger bucket of
rows (`rules.bucket`), eight to an octave of lengths, and the rows beyond it are masked: whole blocks of them are not
computed, and the sample's own rows do not see the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from reelbatch.attention.rules import RuleMask, bucket, unrestricted
from reelbatch.attention.setting import HALF, Heads, Mask, Setting
from reelbatch.tracing import tracing

COMPILERS = ("g++", "clang++", "c++")
COMPILED = 1024
"""Kernels that one process compiles at most: buckets times sets of rules, head counts and dtypes. PyTorch's own limit
is 8."""


@cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: past the limit it raises; it would otherwise run uncompiled, with scores of tokens × tokens
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def attend(query: Heads, key: Heads, value: Heads, mask: Mask) -> Heads:
    """Attention of one sample under its rules, or unrestricted."""
    queries, keys = query.shape[2], key.shape[2]
    block_mask = mask.block_mask if isinstance(mask, RuleMask) else unrestricted(queries, keys, query.device)
    query, key, value = (_lay_into_bucket(part) for part in (query, key, value))
    if tracing():  # which compiles nothing; a kernel in one piece takes as much
        return scaled_dot_product_attention(query, key, value)[:, :, :queries]
    with torch._dynamo.config.patch(recompile_limit=COMPILED, accumulated_recompile_limit=COMPILED):
        return _compiled()(query, key, value, block_mask=block_mask)[:, :, :queries]


def _lay_into_bucket(rows: Heads) -> Heads:
    """The rows and zeros after them; contiguous also where there are none, as strides are compiled in too."""
    return pad(rows, (0, 0, 0, bucket(rows.shape[2]) - rows.shape[2])).contiguous()


def refuses(setting: Setting) -> str | None:
    """Why FlexAttention cannot compute in a setting; None if it can."""
    if setting.kind in ("dense", "keys"):
        return "FlexAttention here takes rules, not mask tensors"
    if setting.dtype not in (*HALF, torch.float32):
        return f"FlexAttention takes float16, bfloat16 and float32, and this is {setting.dtype}"
    if setting.device == "cpu":
        if setting.training:
            return "FlexAttention has no backward pass on the CPU"
        if not any(shutil.which(name) for name in COMPILERS):
            return "FlexAttention on the CPU is compiled, and there is no C++ compiler (g++ or clang++) on the PATH"
    return None
