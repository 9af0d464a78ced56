"""Attention masks: every shape that people hold, read without guessing.

A mask says for a query and a key whether the one may attend to the other. Boolean: True is "may attend". Floating
point: added to the scores, so that `-inf` is "may not". The last axis is always the keys, in full; the others may be 1,
which means "the same for all". With B samples, H heads, Q queries and K keys:

    axes   shape           the same for all
    K      [K]             samples, heads, queries
    BK     [B, K]          heads, queries
    QK     [Q, K]          samples, heads
    HQK    [H, Q, K]       samples
    BQK    [B, Q, K]       heads
    BHQK   [B, H, Q, K]    nothing; [B, 1, Q, K] is shared by the heads, [B, 1, 1, K] by the queries too

A shape that fits two of these with different meanings (`[2, Q, K]` with 2 samples and 2 heads) is refused until its
axes are named: `axes="BQK"`, or the `unsqueeze` that the error gives. A query that may attend to nothing gets zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FORMS = ("K", "BK", "QK", "HQK", "BQK", "BHQK")


class Sizes(NamedTuple):
    """The sizes of the attention that a mask is for."""

    batch: int
    heads: int
    queries: int
    keys: int

    def of(self, axes: str) -> tuple[int, ...]:
        return tuple(dict(zip("BHQK", self, strict=True))[axis] for axis in axes)


class MaskShapeError(ValueError):
    """A mask whose shape fits no form, or more than one."""


def canonical(mask: Tensor, sizes: Sizes, axes: str | None = None) -> Shaped[Tensor, "#B #H #Q K"]:
    """The mask as `[B or 1, H or 1, Q or 1, K]`, a view.

    Args:
        axes: one of `FORMS`, to say which axis is which; None finds out, and refuses where two readings differ.

    Raises:
        MaskShapeError: with the shapes, every accepted form in numbers, and the cure where one `unsqueeze` is enough.
        TypeError: if the mask is neither boolean nor floating point.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"The mask has dtype {mask.dtype}, which could be read in two ways. Give a boolean mask, True where a "
            "query may attend to a key (mask.bool()), or a floating point one that is added to the scores."
        )
    if axes is not None and axes not in FORMS:
        raise ValueError(f"axes={axes!r}; it must be one of {', '.join(FORMS)}.")
    readings = _readings(mask, sizes, FORMS if axes is None else (axes,))
    if len(readings) == 1:
        return next(iter(readings.values()))
    raise MaskShapeError(_message(mask, sizes, axes, readings))


def _readings(mask: Tensor, sizes: Sizes, forms: Iterable[str] = FORMS) -> dict[str, Tensor]:
    """The forms that a mask fits, each with its view; of forms that come to the same view, the first."""
    readings: dict[str, Tensor] = {}
    for form in forms:
        if _fits(mask, form, sizes):
            view = _four_axes(mask, form)
            if all(view.shape != other.shape for other in readings.values()):
                readings[form] = view
    return readings


def _fits(mask: Tensor, form: str, sizes: Sizes) -> bool:
    if mask.ndim != len(form) or mask.shape[-1] != sizes.keys:
        return False
    return all(size in (1, full) for size, full in zip(mask.shape, sizes.of(form), strict=True))


def _four_axes(mask: Tensor, form: str) -> Tensor:
    for position, axis in enumerate("BHQK"):
        if axis not in form:
            mask = mask.unsqueeze(position)
    return mask


def _message(mask: Tensor, sizes: Sizes, axes: str | None, readings: Iterable[str]) -> str:
    shape, (batch, heads, queries, keys) = list(mask.shape), sizes
    if readings:
        readable = " or ".join(f"{form} (mask{_unsqueezes(form)}, or axes={form!r})" for form in readings)
        return (
            f"A mask of shape {shape} can be read in two ways, for query [{batch}, {heads}, {queries}, D] and key "
            f"[{batch}, {heads}, {keys}, D]: as {readable}. Say which one is meant."
        )
    lines = [
        f"A mask of shape {shape} does not fit{f' as {axes}' if axes else ''}: the attention has {batch} samples, "
        f"{heads} heads, {queries} queries and {keys} keys (query [{batch}, {heads}, {queries}, D], key [{batch}, "
        f"{heads}, {keys}, D]). Accepted, where each axis but the last may also be 1:",
        *(f"    {form:<5} {list(sizes.of(form))}" for form in FORMS),
    ]
    cures = list(_cures(mask, sizes))
    if cures:
        lines.append("This would fit: " + ", or ".join(cures))
    return "\n".join(lines)


def _unsqueezes(form: str) -> str:
    missing = [position for position, axis in enumerate("BHQK") if axis not in form]
    return "".join(f".unsqueeze({position})" for position in missing)


def _cures(mask: Tensor, sizes: Sizes) -> Iterator[str]:
    """What makes the mask fit: other axes than those that were named, or one `unsqueeze`."""
    if named := _readings(mask, sizes):
        yield from (f"axes={form!r}" for form in named)
        return
    for position in range(mask.ndim + 1):
        readings = _readings(mask.unsqueeze(position), sizes)
        for form, view in readings.items():
            named_too = f" with axes={form!r}" if len(readings) > 1 else ""
            yield f"mask.unsqueeze({position}){named_too}, read as [B, H, Q, K] = {list(view.shape)}"


@dataclass(frozen=True, eq=False)
class DenseMask:
    """The mask of one sample, prepared once for all layers and steps.

    Attributes:
        scores: `[H or 1, Q or 1, K]`, boolean or additive; every query may attend to something in it.
        keys: set instead where the mask only leaves out keys, the same for all heads and queries: those that stay.
            Attention over them needs no mask at all.
        empty: `[H or 1, Q or 1, 1]`, queries that may attend to nothing and get zeros; None if there are none.
    """

    scores: Shaped[Tensor, "#heads #queries keys"]
    keys: Int[Tensor, " kept"] | None = None
    empty: Bool[Tensor, "#heads #queries 1"] | None = None

    def scores_in(self, dtype: torch.dtype) -> Shaped[Tensor, "#heads #queries keys"]:
        """Boolean scores as they are, others in a dtype, where finite ones stay finite."""
        if self.scores.dtype in (torch.bool, dtype):
            return self.scores

        def cast() -> Tensor:
            limit = torch.finfo(dtype).max
            if limit >= torch.finfo(self.scores.dtype).max:
                return self.scores.to(dtype)
            # half of it, as scores are added to
            return self.scores.clamp(-limit / 2, limit / 2).to(dtype).masked_fill(self.scores.isneginf(), float("-inf"))

        return once(self.scores, dtype, cast)


def prepare(mask: Shaped[Tensor, "#heads #queries keys"]) -> DenseMask | None:
    """One sample's mask, prepared; None if it masks nothing.

    Raises:
        ValueError: if an additive mask holds NaN or +inf.
    """
    allowed = mask
    if mask.is_floating_point():
        if mask.isnan().any() or mask.isposinf().any():
            raise ValueError(
                "The mask holds NaN or +inf. Additive masks hold finite numbers, and -inf for what is masked."
            )
        allowed = mask != float("-inf")
        if not mask.requires_grad and not mask.masked_fill(~allowed, 0.0).any():
            mask = allowed  # nothing but 0 and -inf
    if mask.dtype == torch.bool:
        if mask.all():
            return None
        if mask.shape[:2] == (1, 1) and mask.any():
            return DenseMask(mask, keys=mask.flatten().nonzero().flatten())
    empty = ~allowed.any(-1, keepdim=True)
    if not empty.any():
        return DenseMask(mask)
    return DenseMask(mask.masked_fill(empty, 1 if mask.dtype == torch.bool else 0.0), empty=empty)


def per_sample(mask: Tensor, sizes: Sizes, axes: str | None = None) -> tuple[DenseMask | None, ...]:
    """A batch's mask, checked and prepared for each sample, once a tensor (see `once`).

    Args:
        axes: as for `canonical`, which says what is raised.
    """

    def prepare_all() -> tuple[DenseMask | None, ...]:
        # detached, as a view would keep the mask alive and `once` would never forget it
        view = canonical(mask if mask.requires_grad else mask.detach(), sizes, axes)
        ready = [prepare(sample) for sample in view]
        return tuple(ready * sizes.batch if len(ready) == 1 else ready)

    return once(mask, (sizes, axes), prepare_all)


KEPT = 8
"""Results that are kept for one tensor."""
_RESULTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once(tensor: Tensor, key: Any, compute: Callable[[], Any]) -> Any:
    """The result of `compute`, kept under `key` as long as the tensor lives and is not changed.

    Reading a mask's values waits for its device, so it is done once, not in every layer of every step.
    """
    if tensor.is_inference() or tensor.requires_grad:  # the one counts no versions, the other's graph is used once
        return compute()
    version, kept = _RESULTS.get(tensor, (None, {}))
    if version != tensor._version:
        kept = {}
        _RESULTS[tensor] = (tensor._version, kept)
    if key not in kept:
        if len(kept) == KEPT:
            kept.clear()
        with torch.inference_mode(False):  # what is kept may serve training next
            kept[key] = compute()
    return kept[key]
