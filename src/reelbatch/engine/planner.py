"""Planner: which samples share the next step. It knows sizes and order, nothing of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

Isolation = Literal["exact", "packed"]


class Sized(Protocol):
    @property
    def tokens(self) -> int:
        """Rows that one step puts through the transformer."""
        ...


S = TypeVar("S", bound=Sized)


@dataclass(frozen=True)
class Planner:
    """First come, first served, within a batch limit and a token budget.

    Nobody overtakes: when the next in line does not fit, those behind it wait too, so a large video is never starved by
    small ones. Whoever runs, runs at every step until it is done.

    Attributes:
        max_batch_size: samples that share a step.
        max_batch_tokens: rows of all samples that share a step, or None for no limit. A sample that is larger than the
            whole budget runs alone.
    """

    max_batch_size: int
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_batch_size", self.max_batch_size), ("max_batch_tokens", self.max_batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")

    def admits(self, tokens: int, running: Sequence[Sized]) -> bool:
        """Whether a sample of so many tokens may join those that run."""
        if not running:
            return True
        if len(running) >= self.max_batch_size:
            return False
        return self.max_batch_tokens is None or tokens + sum(s.tokens for s in running) <= self.max_batch_tokens

    @staticmethod
    def packs(running: Sequence[S], isolation: Isolation) -> list[list[S]]:
        """Who shares a matrix product: nobody (`exact`), or all (`packed`)."""
        return [[sample] for sample in running] if isolation == "exact" else [list(running)]
