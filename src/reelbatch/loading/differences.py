"""What a file adds to whole weights: differences as ComfyUI stores them, and the products of LyCORIS's LoHa and LoKr.

    diff, diff_b    a weight's difference, and a bias's
    LoHa            (w1_a @ w1_b) ∘ (w2_a @ w2_b) · alpha / rank           arXiv 2108.06098
    LoKr            w1 ⊗ w2 · alpha / rank, either of the two a product    arXiv 2309.14859

As LyCORIS has them (lycoris/modules/loha.py, lokr.py), for linear layers. A LoKr of two whole matrices has no scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
FACTORS = ("diff", "diff_b", *LOHA, *LOKR)
"""What a layer's weights are called, after its name."""
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Difference:
    """A tensor that is added to a parameter. It is computed when it is asked for: all of a model's would take several
    times the file's memory.

    Attributes:
        shape: known before anything is computed.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def tensor(self) -> Tensor:
        return self.make()

    def rows(self, begin: int, end: int) -> Difference:
        return replace(self, shape=(end - begin, *self.shape[1:]), make=lambda: self.make()[begin:end])

    def swap_halves(self) -> Difference:
        return replace(self, make=lambda: torch.cat(self.make().chunk(2)[::-1]))


def difference_of(layer: str, parts: Mapping[str, Tensor], alpha: float | None) -> Difference:
    """What the weights of one layer add to it.

    Args:
        parts: by their names in `FACTORS`.
        alpha: of the layer; None is the rank.

    Raises:
        ValueError: for weights that are not finite, or are not those of one of the kinds.
    """
    for name, tensor in parts.items():
        if not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{layer}.{name} holds NaN or infinity")
    if parts.keys() == {"diff"}:
        whole = parts["diff"]
        return Difference(tuple(whole.shape), lambda: whole)
    if parts.keys() == set(LOHA):
        return _loha(layer, [parts[name] for name in LOHA], alpha)
    if parts.keys() <= set(LOKR):
        return _lokr(layer, parts, alpha)
    raise ValueError(f"{layer} has {', '.join(sorted(parts))}, which are not the weights of one LoHa, LoKr or diff")


def _product(layer: str, one: Tensor, other: Tensor) -> tuple[int, int, int]:
    """Rows, columns and rank of a product of two matrices."""
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[0] or one.shape[1] == 0:
        raise ValueError(
            f"{layer}: matrices of {list(one.shape)} and {list(other.shape)} have no product; only linear layers "
            "are read"
        )
    return one.shape[0], other.shape[1], one.shape[1]


def _most(*tensors: Tensor) -> float:
    return math.prod(float(tensor.float().abs().max()) if tensor.numel() else 0.0 for tensor in tensors)


def _loha(layer: str, parts: list[Tensor], alpha: float | None) -> Difference:
    w1_a, w1_b, w2_a, w2_b = parts
    rows, columns, rank = _product(layer, w1_a, w1_b)
    if (rows, columns) != (shape := _product(layer, w2_a, w2_b))[:2]:
        raise ValueError(f"{layer}: the two products of its LoHa are of {[rows, columns]} and {list(shape[:2])}")
    scale = 1.0 if alpha is None else alpha / rank
    _check_size(layer, _most(*parts) * rank * shape[2] * abs(scale))
    return Difference((rows, columns), lambda: (w1_a.float() @ w1_b.float()) * (w2_a.float() @ w2_b.float()) * scale)


def _lokr(layer: str, parts: Mapping[str, Tensor], alpha: float | None) -> Difference:
    sides: list[tuple[list[Tensor], tuple[int, int]]] = []
    rank, size = None, 1.0
    for name in ("lokr_w1", "lokr_w2"):
        whole = parts.get(name)
        pair = [parts[part] for part in (f"{name}_a", f"{name}_b") if part in parts]
        if (whole is None) == (not pair) or len(pair) == 1 or (whole is not None and whole.ndim != 2):
            raise ValueError(f"{layer} has {', '.join(sorted(parts))}, which are not the weights of a LoKr")
        if whole is not None:
            sides.append(([whole], (whole.shape[0], whole.shape[1])))
        else:
            rows, columns, rank = _product(layer, *pair)
            sides.append((pair, (rows, columns)))
            size *= rank
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    (first, (rows, columns)), (second, (more_rows, more_columns)) = sides
    _check_size(layer, _most(*first, *second) * size * abs(scale))

    def make() -> Tensor:
        one, other = (_whole(factors) for factors in (first, second))
        return torch.kron(one, other) * scale

    return Difference((rows * more_rows, columns * more_columns), make)


def _whole(factors: list[Tensor]) -> Tensor:
    return factors[0].float() if len(factors) == 1 else factors[0].float() @ factors[1].float()


def _check_size(layer: str, bound: float) -> None:
    if not bound < LARGEST:
        raise ValueError(f"{layer}: its matrices' product can be as large as {bound:.3g}, which is no number here")
