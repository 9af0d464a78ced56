"""Another class for an object that is there already: its parameters, hooks and adapters stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from reelbatch.repairs.fix import CannotRepair, Undo

Class = TypeVar("Class", bound=type)


def stands_in(new_class: Class) -> Class:
    """Class decorator: go by the name of the base class, so that `save_pretrained` writes the class that was repaired.

    What makes new objects (`from_pretrained` and its like) makes them of the base class.
    """
    repaired = next(base for base in new_class.__bases__ if base.__module__.startswith("diffusers."))
    for name in ("__name__", "__qualname__", "__module__", "from_pretrained", "from_config", "from_pipe"):
        if hasattr(repaired, name):
            setattr(new_class, name, getattr(repaired, name))
    return new_class


def reclass(instance: Any, new_class: type) -> Undo:
    """`reclass_all` for one instance."""
    return reclass_all([(instance, new_class)])


def reclass_all(changes: Iterable[tuple[Any, type]]) -> Undo:
    """Make each instance one of its new class, a subclass of its class; returns what gives them their old classes back.

    Hooks keep the `forward` that was there before them, bound to its class, and call it past the new class. So every
    kept one is exchanged: accelerate's `_old_forward`, the functions of Diffusers' hook registry, and the plain bound
    `forward` that a removed hook leaves behind. The undo looks for them anew, so hooks may come and go in between.

    Raises:
        CannotRepair: for an instance of another class than the one that its new class is derived from, and where
            something unknown wraps its `forward`. Nothing has been changed then; the undo raises likewise.
    """
    switches = [(instance, type(instance), new_class) for instance, new_class in changes]
    for _, old_class, new_class in switches:
        if old_class not in new_class.__bases__:
            theirs = [base for base in new_class.__bases__ if not base.__module__.startswith("reelbatch.")]
            expected = " or ".join(base.__name__ for base in theirs)
            raise CannotRepair(f"found a {old_class.__module__}.{old_class.__qualname__} where {expected} was expected")
    _switch_all(switches)
    return partial(_switch_all, [(instance, new, old) for instance, old, new in reversed(switches)])


def _switch_all(switches: Sequence[tuple[Any, type, type]]) -> None:
    """From the one class to the other, all or none."""
    with ExitStack() as on_refusal:
        for instance, old_class, new_class in switches:
            if type(instance) is not old_class:
                raise CannotRepair(f"{old_class.__name__} was changed again after its repair: undo that first")
            _switch(instance, new_class)
            on_refusal.callback(_switch, instance, old_class)
        on_refusal.pop_all()


def _switch(instance: Any, new_class: Any) -> None:
    kept = [place for place in _forward_places(instance) if _is_own_forward(place[0].get(place[1]), instance)]
    if "forward" in vars(instance) and not kept:
        raise CannotRepair(
            f"something unknown wraps the forward of this {type(instance).__name__} ({vars(instance)['forward']!r}): "
            "repair it before that is put on, or take that off"
        )
    instance.__class__ = new_class
    for owner, name in kept:
        owner[name] = MethodType(new_class.forward, instance)


def _forward_places(instance: Any) -> list[tuple[dict[str, Any], str]]:
    """Where accelerate and Diffusers keep a module's forward: (dictionary, key)."""
    registry = vars(instance).get("_diffusers_hook")
    references = registry._fn_refs if registry is not None else []
    own = [(vars(instance), name) for name in ("forward", "_old_forward")]
    return own + [(vars(reference), name) for reference in references for name in ("forward", "original_forward")]


def _is_own_forward(forward: Any, instance: Any) -> bool:
    """Whether `forward` is that of the instance's class, bound to the instance."""
    bound = isinstance(forward, MethodType) and forward.__self__ is instance
    return bound and forward.__func__ is type(instance).forward
