"""Flash attention over variable lengths: all samples of a pack in one call."""

from __future__ import annotations

from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from reelbatch.attention.setting import AMPERE, HALF, Heads, Mask, Rows, Setting, compute_capability
from reelbatch.device import is_out_of_memory
from reelbatch.ragged import Lengths
from reelbatch.tracing import cached


class Support(NamedTuple):
    """How `varlen_attn` can be called on a kind of device.

    Attributes:
        options: keywords of every call.
        refused: why it cannot be called at all; None if it can.
        note: what is not as it should be, for `reelbatch doctor`.
    """

    options: dict[str, Any]
    refused: str | None = None
    note: str | None = None


def attend_all(query: Rows, key: Rows, value: Rows, lengths: Lengths) -> Rows:
    """Unmasked attention of samples laid end to end, in one call."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = _boundaries(lengths, query.device), max(lengths)
    if not longest:
        return value
    capability = compute_capability(query.device)
    options = {} if capability is None else support(capability).options
    return cast(Tensor, varlen_attn(query, key, value, starts, starts, longest, longest, **options))


def attend(query: Heads, key: Heads, value: Heads, mask: Mask) -> Heads:
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend_all(q, k, v, (query.shape[2],)).transpose(0, 1)[None]


def refuses(setting: Setting) -> str | None:
    """Why `varlen_attn` cannot compute in a setting; None if it can."""
    if setting.device != "cuda":
        return f"varlen_attn runs on CUDA alone, and this is {setting.device}"
    if setting.dtype not in HALF:
        return f"varlen_attn takes float16 and bfloat16, and this is {setting.dtype}"
    if setting.kind != "none":
        return "varlen_attn takes no mask"
    if setting.below_ampere:
        return f"varlen_attn {setting.needs_ampere}"
    if setting.head_dim is not None and (setting.head_dim % 8 or setting.head_dim > 256):
        return f"varlen_attn takes head sizes up to 256 that are multiples of 8, and this is {setting.head_dim}"
    if setting.value_dim != setting.head_dim:
        return f"varlen_attn takes {setting.one_head_size}"
    if not _is_there():
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    # a capability that is known is that of a device which is there
    return None if setting.capability is None else support(setting.capability).refused


def note(capability: tuple[int, int]) -> str | None:
    """What a user of a device of this compute capability should know; None if nothing."""
    return support(capability).note if _is_there() and capability >= AMPERE else None


@cached(maxsize=8)
def support(capability: tuple[int, int]) -> Support:
    """What `varlen_attn` takes on the CUDA devices of a compute capability; tried once a process, on 16 tokens.

    The number of splits that the kernel chooses by itself depends on the longest sample of a pack, and with it the
    sums of the others. With `num_splits=1` it does not. FlashAttention 2 has refused that argument in some builds (on
    ROCm it still does); there a call without it is right, as this version splits for single queries only.
    """
    from torch.nn.attention.varlen import varlen_attn

    def refusal(**options: Any) -> str | None:
        rows = torch.zeros(16, 1, 64, dtype=torch.float16, device=_device())
        starts = torch.tensor([0, 16], dtype=torch.int32, device=_device())
        try:
            with torch.no_grad():
                varlen_attn(rows, rows, rows, starts, starts, 16, 16, **options)
        except (RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return str(error).partition("\n")[0]
        return None

    refused = "this version of PyTorch has no such argument"
    if "num_splits" in signature(varlen_attn).parameters:
        single = {"num_splits": 1}
        reason = refusal(**single)
        if reason is None:
            return Support(single)
        refused = reason
    reason = refusal()
    if reason is not None:
        return Support({}, refused=f"varlen_attn does not run on this device: {reason}")
    return Support({}, note=f"without num_splits=1, which is refused here: {refused}")


def _device() -> torch.device:
    return torch.device("cuda")


@cached(maxsize=64)
def _boundaries(lengths: Lengths, device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@cache
def _is_there() -> bool:
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    return True
