"""Diffusers' step caches: why a repaired pipeline has none, and how one that is on is turned off."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from reelbatch.repairs.fix import CannotRepair


def refuse_step_cache(transformer: nn.Module | None) -> None:
    """Refuse a transformer with a step cache, whether `enable_cache` or one of the `apply_*` functions put it on.

    Raises:
        CannotRepair: with the call that turns it off.
    """
    if transformer is None:
        return
    turn_off = "pipe.transformer.disable_cache()"
    if not getattr(transformer, "is_cache_enabled", False):
        hooks = list(dict.fromkeys(_step_cache_hooks(transformer)))
        if not hooks:
            return
        registry = "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)"
        turn_off = f"for hook in {hooks}: {registry}.remove_hook(hook)"
    raise CannotRepair(
        "a step cache is on the transformer. It decides once for the whole batch what is computed. One that looks at "
        "the data (first-block cache and its kin) makes a video depend on its batch-mates, and those that count steps "
        f"work on Diffusers' own blocks. Nothing was changed. Turn it off first: {turn_off}"
    )


def _step_cache_hooks(transformer: nn.Module) -> Iterator[str]:
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, hook in registry.hooks.items() if registry is not None else ():
            kind = type(hook).__module__
            if kind.startswith("diffusers.hooks.") and ("cache" in kind or "broadcast" in kind):
                yield name
