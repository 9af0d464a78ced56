"""Attention backends: which kernel computes a sample's attention, and why.

Each backend says for what it cannot do why it cannot; `choose` takes the one that was named, or the best that can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from reelbatch import ragged
from reelbatch.attention import flex, varlen
from reelbatch.attention.rules import RuleMask
from reelbatch.attention.setting import HALF, Heads, Mask, Rows, Setting
from reelbatch.ragged import Lengths
from reelbatch.tracing import cached


@dataclass(frozen=True)
class Backend:
    """A kernel, or a plan of kernel calls, that computes attention.

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
        # PyTorch would take another kernel for strided heads; the one that was named refuses them
        query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
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


def _flash_refuses(setting: Setting) -> str | None:
    if setting.value_dim != setting.head_dim:
        return f"the flash kernel takes {setting.one_head_size}"
    if setting.device == "cpu":
        return "the flash kernel has no gradient for a mask" if setting.learned_mask else None
    if setting.dtype not in HALF:
        return f"the flash kernel takes float16 and bfloat16 on CUDA, and this is {setting.dtype}"
    if setting.kind in ("dense", "rules"):
        return "the flash kernel takes no mask on CUDA"
    if setting.below_ampere:
        return f"the flash kernel {setting.needs_ampere}"
    if setting.head_dim is not None and setting.head_dim > 256:
        return f"the flash kernel takes head sizes up to 256, and this is {setting.head_dim}"
    return None


def _cudnn_refuses(setting: Setting) -> str | None:
    if setting.device != "cuda":
        return f"the cudnn kernel runs on CUDA alone, and this is {setting.device}"
    if setting.dtype not in HALF:
        return f"the cuDNN kernel takes float16 and bfloat16, and this is {setting.dtype}"
    if setting.below_ampere:
        return f"the cuDNN kernel {setting.needs_ampere}"
    if setting.learned_mask:
        return "the cuDNN kernel has no gradient for a mask"
    return _refuses_head_sizes("cuDNN", setting, multiple=8)


def _efficient_refuses(setting: Setting) -> str | None:
    if setting.device != "cuda":
        return f"the efficient kernel runs on CUDA alone, and this is {setting.device}"
    if setting.dtype not in (*HALF, torch.float32):
        return f"the efficient kernel takes float16, bfloat16 and float32, and this is {setting.dtype}"
    if setting.dtype == torch.bfloat16 and setting.below_ampere:
        return f"the efficient kernel for bfloat16 {setting.needs_ampere}"
    return _refuses_head_sizes("efficient", setting, multiple=8 if setting.dtype in HALF else 4)


def _refuses_head_sizes(kernel: str, setting: Setting, multiple: int) -> str | None:
    for size in (setting.head_dim, setting.value_dim):
        if size is not None and size % multiple:
            return f"the {kernel} kernel takes head sizes that are multiples of {multiple}, and this is {size}"
    return None


# --------------------------------------------------------------------------------------------------
# Choosing

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", "PyTorch chooses the kernel for each sample", lambda setting: None, _sdpa(None)),
        *(
            Backend(name, f"scaled dot product attention, {name} kernel", refuses, _sdpa(kernel))
            for name, kernel, refuses in (
                ("flash", SDPBackend.FLASH_ATTENTION, _flash_refuses),
                ("cudnn", SDPBackend.CUDNN_ATTENTION, _cudnn_refuses),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION, _efficient_refuses),
                ("math", SDPBackend.MATH, lambda setting: None),
            )
        ),
        Backend("varlen", "flash attention, a pack in one call", varlen.refuses, varlen.attend, varlen.attend_all),
        Backend("flex", "FlexAttention: rules compiled to block masks", flex.refuses, flex.attend),
    )
}
AUTO = "auto"


class Choice(NamedTuple):
    backend: Backend
    why: str


@cached(maxsize=256)
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
            return Choice(BACKENDS[named], "named in the call")
        can = [backend.name for backend in BACKENDS.values() if backend.refuses(setting) is None]
        raise AttentionBackendError(f"Attention backend {named!r}: {reason}. These can: {', '.join(can)}, or 'auto'.")
    if setting.kind == "rules" and setting.device == "cuda":
        reason = BACKENDS["flex"].refuses(setting)
        if reason is None:
            return Choice(BACKENDS["flex"], "rules on CUDA: blocks that are masked are not computed")
        return Choice(BACKENDS["sdpa"], f"rules on CUDA: dense calls over what each block may see, as {reason}")
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
    return _attend_one(query, key, value, mask, choose(Setting.of(query, key, value, mask), backend).backend)


def _attend_one(query: Heads, key: Heads, value: Heads, mask: Mask, chosen: Backend) -> Heads:
    if not query.shape[2] or not key.shape[2]:  # fused kernels refuse no tokens; sums over none are zeros
        return query @ key.mT @ value
    return chosen.attend(query, key, value, mask)


def attend(
    query: Rows, key: Rows, value: Rows, lengths: Lengths, masks: Sequence[Mask] | None, backend: str
) -> Float[Tensor, "tokens heads*head_dim"]:
    """Attention of each sample over its own rows; `masks` has one a sample, or is None if nobody has one."""
    setting = Setting.of(query, key, value, None, len(lengths))
    if masks is None or all(mask is None for mask in masks):
        chosen = choose(setting, backend).backend
        if chosen.attend_all is not None:
            return chosen.attend_all(query, key, value, lengths).flatten(1)
        masks = (None,) * len(lengths)
    out = []
    samples = zip(*(ragged.split(rows, lengths) for rows in (query, key, value)), strict=True)
    for parts, mask in zip(samples, masks, strict=True):
        # [n, heads, dim] -> [1, heads, n, dim], the layout that PyTorch's kernels take, by strides alone
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        one = setting._replace(samples=1) if mask is None else Setting.of(q, k, v, mask)
        attended = _attend_one(q, k, v, mask, choose(one, backend).backend)
        out.append(attended.squeeze(0).transpose(0, 1).flatten(1))
    return ragged.join(out)
