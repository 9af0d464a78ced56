"""Attention backends: which kernel computes a sample's attention, and why.

Each backend says for what it cannot do why it cannot; `choose` takes the one that was named, or the best that can.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from reelbatch import ragged
from reelbatch.attention.masks import DenseMask
from reelbatch.attention.rules import RuleMask
from reelbatch.ragged import Lengths

Mask = DenseMask | RuleMask | None
"""What one sample's attention is restricted to, made ready; None is unrestricted."""
Rows = Float[Tensor, "tokens heads head_dim"]
Heads = Float[Tensor, "1 heads tokens head_dim"]
Kind = Literal["none", "keys", "dense", "rules"]


def kind_of(mask: Mask) -> Kind:
    if mask is None:
        return "none"
    if isinstance(mask, RuleMask):
        return "rules"
    return "dense" if mask.keys is None else "keys"


class Setting(NamedTuple):
    """What a choice depends on."""

    device: str
    dtype: torch.dtype
    kind: Kind
    samples: int = 1
    training: bool = False


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Attributes:
        refuses: why it cannot compute in a setting; None if it can.
        attend: one sample's attention, `[1, heads, tokens, head_dim]` each.
        attend_all: set where samples laid end to end are computed in one call, unmasked.
    """

    name: str
    what: str
    refuses: Callable[[Setting], str | None]
    attend: Callable[[Heads, Heads, Heads, Mask], Heads]
    attend_all: Callable[[Rows, Rows, Rows, Lengths], Rows] | None = None


class AttentionBackendError(ValueError):
    """The backend that was named cannot do what is asked."""


# --------------------------------------------------------------------------------------------------
# PyTorch's scaled dot product attention


def _sdpa(kernel: SDPBackend | None) -> Callable[[Heads, Heads, Heads, Mask], Heads]:
    def kernel_call(query: Tensor, key: Tensor, value: Tensor, scores: Tensor | None = None) -> Tensor:
        if kernel is None:
            return scaled_dot_product_attention(query, key, value, attn_mask=scores)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(query, key, value, attn_mask=scores)

    def attend(query: Heads, key: Heads, value: Heads, mask: Mask) -> Heads:
        if mask is None:
            return kernel_call(query, key, value)
        if isinstance(mask, RuleMask):
            return _by_calls(kernel_call, query, key, value, mask)
        if mask.keys is not None:
            return kernel_call(query, key.index_select(2, mask.keys), value.index_select(2, mask.keys))
        # [heads or 1, queries or 1, keys]; some kernels want the queries written out
        scores = mask.scores_in(query.dtype).expand(-1, query.shape[2], -1)[None]
        out = kernel_call(query, key, value, scores)
        return out if mask.empty is None else out.masked_fill(mask.empty, 0.0)

    return attend


def _by_calls(kernel_call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: RuleMask) -> Tensor:
    """Every call of the rules' plan, each over the keys that its queries may see."""
    out = torch.empty_like(query)
    for call in mask.calls:
        queries, keys = (
            (call.heads,) if span.blocks is None else (call.heads[:, None], mask.places(span))
            for span in (call.queries, call.keys)
        )
        q, k, v = query[0][queries][None], key[0][keys][None], value[0][keys][None]
        out[0][queries] = kernel_call(q, k, v, mask.allowed(call))[0]
    return out


def _sdpa_refuses(kernel: str) -> Callable[[Setting], str | None]:
    def refuses(setting: Setting) -> str | None:
        if kernel in ("cudnn", "efficient") and setting.device != "cuda":
            return f"the {kernel} kernel runs on CUDA alone, and this is {setting.device}"
        if kernel == "flash" and setting.device == "cuda":
            if setting.dtype not in (torch.float16, torch.bfloat16):
                return f"the flash kernel takes float16 and bfloat16 on CUDA, and this is {setting.dtype}"
            if setting.kind in ("dense", "rules"):
                return "the flash kernel takes no mask on CUDA"
        if kernel == "cudnn" and setting.dtype not in (torch.float16, torch.bfloat16):
            return f"the cuDNN kernel takes float16 and bfloat16, and this is {setting.dtype}"
        return None

    return refuses


# --------------------------------------------------------------------------------------------------
# Flash attention over variable lengths: all samples of a pack in one call


@lru_cache(maxsize=64)
def _boundaries(lengths: Lengths, device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _varlen_all(query: Rows, key: Rows, value: Rows, lengths: Lengths) -> Rows:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = _boundaries(lengths, query.device), max(lengths)
    # how many splits the kernel takes on its own depends on the longest of a pack's samples; one does not
    single: dict[str, Any] = {"num_splits": 1} if "num_splits" in signature(varlen_attn).parameters else {}
    return cast(Tensor, varlen_attn(query, key, value, starts, starts, longest, longest, **single))


def _varlen_one(query: Heads, key: Heads, value: Heads, mask: Mask) -> Heads:
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return _varlen_all(q, k, v, (query.shape[2],)).transpose(0, 1)[None]


def _varlen_refuses(setting: Setting) -> str | None:
    if setting.device != "cuda":
        return f"varlen_attn runs on CUDA alone, and this is {setting.device}"
    if setting.dtype not in (torch.float16, torch.bfloat16):
        return f"varlen_attn takes float16 and bfloat16, and this is {setting.dtype}"
    if setting.kind != "none":
        return "varlen_attn takes no mask"
    if not _has_varlen():
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


@cache
def _has_varlen() -> bool:
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    return True


# --------------------------------------------------------------------------------------------------
# FlexAttention

FLEX_SHAPES = 128
"""Pairs of rules and shape that one process compiles at most."""


@cache
def _compiled_flex() -> Callable[..., Any]:
    # fullgraph: past the limit of shapes it raises; it would otherwise run uncompiled, with scores of tokens × tokens
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(query: Heads, key: Heads, value: Heads, mask: Mask) -> Heads:
    block_mask = mask.block_mask if isinstance(mask, RuleMask) else None
    with torch._dynamo.config.patch(recompile_limit=FLEX_SHAPES):
        return _compiled_flex()(query, key, value, block_mask=block_mask)


def _flex_refuses(setting: Setting) -> str | None:
    if setting.kind in ("dense", "keys"):
        return "FlexAttention here takes rules, not mask tensors"
    if setting.device == "cpu":
        if setting.training:
            return "FlexAttention has no backward pass on the CPU"
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return "FlexAttention on the CPU is compiled, and there is no C++ compiler (g++ or clang++) on the PATH"
    return None


# --------------------------------------------------------------------------------------------------
# Choosing

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", "PyTorch chooses the kernel for each sample", lambda setting: None, _sdpa(None)),
        *(
            Backend(name, f"scaled dot product attention, {name} kernel", _sdpa_refuses(name), _sdpa(kernel))
            for name, kernel in (
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION),
                ("math", SDPBackend.MATH),
            )
        ),
        Backend("varlen", "flash attention, a pack in one call", _varlen_refuses, _varlen_one, _varlen_all),
        Backend("flex", "FlexAttention: rules compiled to block masks", _flex_refuses, _flex),
    )
}
AUTO = "auto"


class Choice(NamedTuple):
    backend: Backend
    why: str


@lru_cache(maxsize=256)
def choose(setting: Setting, named: str = AUTO) -> Choice:
    """The backend for a setting.

    Args:
        named: a name in `BACKENDS`, or "auto".

    Raises:
        AttentionBackendError: if the one that was named cannot, with the reason and those that can.
    """
    if named != AUTO:
        check_backend(named)
        reason = BACKENDS[named].refuses(setting)
        if reason is None:
            return Choice(BACKENDS[named], "named by you")
        can = [backend.name for backend in BACKENDS.values() if backend.refuses(setting) is None]
        raise AttentionBackendError(f"Attention backend {named!r}: {reason}. These can: {', '.join(can)}, or 'auto'.")
    if setting.kind == "rules" and setting.device == "cuda":
        return Choice(BACKENDS["flex"], "rules on CUDA: blocks that are masked are not computed")
    if setting.kind == "rules":
        return Choice(
            BACKENDS["sdpa"], "rules on the CPU: dense calls over what each block may see; nothing to compile"
        )
    if setting.samples > 1 and BACKENDS["varlen"].refuses(setting) is None:
        return Choice(BACKENDS["varlen"], "several samples in a pack on CUDA: one call")
    if setting.kind == "dense":
        return Choice(BACKENDS["sdpa"], "a mask tensor: PyTorch takes the best kernel that has masks")
    return Choice(BACKENDS["sdpa"], "no mask tensor: PyTorch takes the best kernel, flash where there is one")


def check_backend(named: str) -> None:
    if named != AUTO and named not in BACKENDS:
        raise AttentionBackendError(f"No attention backend {named!r}; there are {', '.join(BACKENDS)}, and 'auto'.")


def attend_one(query: Heads, key: Heads, value: Heads, mask: Mask, backend: str) -> Heads:
    """One sample's attention."""
    return choose(_setting(query, key, value, kind_of(mask), 1), backend).backend.attend(query, key, value, mask)


def attend(
    query: Rows, key: Rows, value: Rows, lengths: Lengths, masks: Sequence[Mask] | None, backend: str
) -> Float[Tensor, "tokens heads*head_dim"]:
    """Attention of each sample over its own rows; `masks` has one a sample, or is None if nobody has one."""
    if masks is None or all(mask is None for mask in masks):
        chosen = choose(_setting(query, key, value, "none", len(lengths)), backend).backend
        if chosen.attend_all is not None:
            return chosen.attend_all(query, key, value, lengths).flatten(1)
        masks = (None,) * len(lengths)
    out = []
    samples = zip(*(ragged.split(rows, lengths) for rows in (query, key, value)), strict=True)
    for parts, mask in zip(samples, masks, strict=True):
        # [n, heads, dim] -> [1, heads, n, dim], the layout that PyTorch's kernels take, by strides alone
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        out.append(attend_one(q, k, v, mask, backend).squeeze(0).transpose(0, 1).flatten(1))
    return ragged.join(out)


def _setting(query: Tensor, key: Tensor, value: Tensor, kind: Kind, samples: int) -> Setting:
    training = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return Setting(query.device.type, query.dtype, kind, samples, training)
