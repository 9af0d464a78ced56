"""Attention over ragged rows: every sample attends to itself, and to nothing else."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reelbatch import ragged
from reelbatch.ragged import Lengths


def ragged_attention(
    query: Float[Tensor, "tokens heads dim"],
    key: Float[Tensor, "tokens heads dim"],
    value: Float[Tensor, "tokens heads dim"],
    lengths: Lengths,
) -> Float[Tensor, "tokens heads*dim"]:
    """Softmax attention of each sample over its own rows, one unmasked kernel call a sample.

    No mask is built and no sample is padded, so the flash kernels stay reachable and the memory used grows with the
    number of tokens, not with its square.

    Args:
        query, key, value: `[sum(lengths), heads, head dim]`, the samples laid end to end.
        lengths: tokens of each sample. A sample of no tokens is allowed.
    """
    parts = zip(*(ragged.split(rows, lengths) for rows in (query, key, value)), strict=True)
    return ragged.join([_self_attention(*part) for part in parts])


def _self_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # [n, heads, dim] -> [1, heads, n, dim], the layout that PyTorch's kernels take, by strides alone
    query, key, value = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    return scaled_dot_product_attention(query, key, value).squeeze(0).transpose(0, 1).flatten(1)
