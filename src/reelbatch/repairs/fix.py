"""What a repair is made of: a fault, its cure, and the check that Diffusers is still the one it was written for."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import diffusers

Undo = Callable[[], None]


class CannotRepair(ValueError):
    """The repair does not fit this pipeline or this version of Diffusers. Nothing has been changed."""


@dataclass(frozen=True)
class Fix:
    """One fault of a loaded pipeline and its cure.

    Args:
        fault: what is wrong, one sentence for the user.
        cure: what the repair does about it, one sentence.
        part: what is changed: the pipeline itself, or one of its models, which other pipelines may share.
        apply: cures it in place, and returns what undoes that. Raises `CannotRepair`, with nothing changed, where
            Diffusers' source or the loaded modules are not those that the cure was written for.
    """

    fault: str
    cure: str
    part: Any
    apply: Callable[[], Undo]


def source_digest(function: Any) -> str:
    """The SHA-256 of the source of `function` (of what it wraps, if it is decorated); "" where there is no source."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):
        return ""


def same_source(function: Any, digest: str) -> bool:
    """Whether the source of `function` has this SHA-256."""
    return source_digest(function) == digest


def require_source(digests: Iterable[tuple[type, str, str]]) -> None:
    """Refuse to go on where a method is not the one that a cure was written for.

    Args:
        digests: (class, name of its method, SHA-256 of the method's source). Methods are looked up now, so that one
            that somebody has put in a class's place since is seen.

    Raises:
        CannotRepair: naming every method that differs.
    """
    differing = [
        f"{owner.__module__}.{owner.__qualname__}.{name}"
        for owner, name, digest in digests
        if not same_source(getattr(owner, name, None), digest)
    ]
    if differing:
        raise CannotRepair(
            f"written for the source that Diffusers 0.42.1 has; another one was found for {', '.join(differing)} "
            f"(Diffusers {diffusers.__version__}). Nothing was changed."
        )
