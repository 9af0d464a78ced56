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


@dataclass
class Planner:
    """First come, first served, within a batch limit, a token budget and what has been seen to fit.

    Nobody overtakes: when the next in line does not fit, those behind it wait too, so a large video is never starved by
    small ones. Whoever runs, runs at every step until it is done.

    Attributes:
        max_batch_size: samples that share a step.
        max_batch_tokens: rows of all samples that share a step, or None for no limit. A sample that is larger than the
            whole budget runs alone.
        forward_tokens: rows that go into one forward at most, since more ran out of memory in this run; None before.
    """

    max_batch_size: int
    max_batch_tokens: int | None = None
    forward_tokens: int | None = None

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
    def halves(samples: list[S]) -> tuple[list[S], list[S]]:
        middle = (len(samples) + 1) // 2
        return samples[:middle], samples[middle:]

    def limit_forward(self, halves: Sequence[Sequence[Sized]]) -> None:
        """These halves ran out of memory together, and so many rows do not meet again in this run."""
        self.forward_tokens = max(sum(sample.tokens for sample in half) for half in halves)

    def groups(self, running: Sequence[S]) -> list[list[S]]:
        """The samples of a step, in as many forwards as memory asks for. When samples leave, fewer do again."""
        groups: list[list[S]] = []
        for sample in running:
            together = sum(s.tokens for s in groups[-1]) + sample.tokens if groups else None
            if together is not None and (self.forward_tokens is None or together <= self.forward_tokens):
                groups[-1].append(sample)
            else:
                groups.append([sample])
        return groups

    @staticmethod
    def packs(running: Sequence[S], isolation: Isolation) -> list[list[S]]:
        """Who shares a matrix product: nobody (`exact`), or all (`packed`)."""
        return [[sample] for sample in running] if isolation == "exact" else [list(running)]
