"""A repaired pipeline's computations, each in the shape that a video has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Isolation = Literal["exact", "packed"]


class Isolated:
    """Mixin for a repaired pipeline."""

    isolation: Isolation = "exact"
    """Whether the shapes of every computation are those that a video has alone, or those of the batch."""


@contextmanager
def isolated(pipe: Any, isolation: Isolation) -> Iterator[None]:
    """Transformer and VAE of a pipeline in this isolation for a while; in exact, one video is decoded at a time."""
    with ExitStack() as during:
        during.enter_context(_set(pipe.transformer, "isolation", isolation))
        if isolation == "exact":
            during.enter_context(_set(pipe.vae, "use_slicing", True))
        yield


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute's value for a while; an owner that has no such attribute is left alone."""
    owner = getattr(owner, "_orig_mod", owner)
    if not hasattr(owner, name):
        yield
        return
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(before)


def encode_texts(
    encode: Callable[[Any], tuple[Tensor, ...]], texts: str | list[str], isolation: Isolation
) -> Sequence[Tensor]:
    """One row a text of everything that `encode` gives; in exact isolation each text is read alone, and once."""
    if isinstance(texts, str) or isolation == "packed":
        return encode(texts)
    rows = {text: encode(text) for text in dict.fromkeys(texts)}
    return [torch.cat(parts) for parts in zip(*(rows[text] for text in texts), strict=True)]


def one_a_prompt(name: str, texts: Any, prompts: int) -> Any:
    """A list of a text a prompt, of one that serves them all; anything else stays as it is.

    Raises:
        ValueError: for a list of another length.
    """
    if isinstance(texts, str):
        return [texts] * prompts
    if isinstance(texts, list) and len(texts) != prompts:
        raise ValueError(f"{name} has {len(texts)} texts for {prompts} prompts: give one, or one a prompt.")
    return texts
