"""The versions of what a video depends on."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from reelbatch import __version__


@cache
def versions() -> dict[str, str]:
    """Versions of reelbatch, torch, diffusers and transformers. Kept, as looking one up takes a millisecond."""
    return {"reelbatch": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers")}
