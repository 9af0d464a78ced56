"""`repair` and `restore`: a loaded Diffusers pipeline, made right for batches in place, and back again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline, HunyuanVideoPipeline
from torch import nn

from reelbatch.drop_in import hunyuan_video, hunyuan_video15
from reelbatch.drop_in.fix import CannotRepair, Fix

WRITTEN_FOR = "0.42.1"
REPAIRS = {
    HunyuanVideoPipeline: hunyuan_video.faults,
    HunyuanVideo15Pipeline: hunyuan_video15.faults,
    HunyuanVideo15ImageToVideoPipeline: hunyuan_video15.faults,
}
_UNDO = "_reelbatch_undo"


class Repaired(NamedTuple):
    """One thing that a repair did."""

    fault: str
    cure: str

    def __str__(self) -> str:
        return f"{self.fault} → {self.cure}"


def repair(pipe: Any, isolation: Literal["exact", "packed"] = "exact") -> list[Repaired]:
    """Makes every video of a batch the one that the pipeline would have made alone, in place.

    The parameters stay the very same tensors; hooks (offload), LoRA adapters and quantized layers stay on. The pipeline
    is used as before.

        pipe = HunyuanVideoPipeline.from_pretrained(...)
        reelbatch.repair(pipe)
        pipe(["a cat", "a dog on a beach at night"], num_videos_per_prompt=2, guidance_scale=[6.0, 4.5])

    Args:
        pipe: a `HunyuanVideoPipeline`, `HunyuanVideo15Pipeline` or `HunyuanVideo15ImageToVideoPipeline`.
        isolation: of the first HunyuanVideo's transformer. "exact": each video's forward has the shapes it has alone,
            so it is the same bit for bit; "packed": fewer and larger calls, the same to rounding.

    Returns:
        What was done; empty if the pipeline was repaired already.

    Raises:
        CannotRepair: for another pipeline, for a Diffusers whose source differs from the one that the repair was
            written for, and for a step cache, which couples the videos of a batch. Nothing has been changed then.
    """
    if isolation not in ("exact", "packed"):
        raise ValueError(f"isolation is {isolation!r}; it must be 'exact' or 'packed'.")
    find = next((find for kind, find in REPAIRS.items() if isinstance(pipe, kind)), None)
    if find is None:
        known = ", ".join(kind.__name__ for kind in REPAIRS)
        raise CannotRepair(
            f"{type(pipe).__module__}.{type(pipe).__name__} is not a pipeline that the repair knows; it knows {known} "
            f"of Diffusers {WRITTEN_FOR}. Nothing was changed."
        )
    _refuse_step_cache(pipe.transformer)
    return _apply(pipe, find(pipe), isolation)


def restore(pipe: Any) -> None:
    """Undoes `repair`, exactly; a pipeline that was not repaired stays as it is."""
    for undo in reversed(vars(pipe).pop(_UNDO, [])):
        undo.close()


def _apply(pipe: Any, fixes: list[Fix], isolation: str) -> list[Repaired]:
    with ExitStack() as done:
        for fix in fixes:
            done.callback(fix.apply())
        transformer = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
        if isinstance(transformer, hunyuan_video.Transformer):
            before = vars(transformer).get("isolation")
            vars(transformer)["isolation"] = isolation
            done.callback(_put_back, transformer, "isolation", before)
        vars(pipe).setdefault(_UNDO, []).append(done.pop_all())
    return [Repaired(fix.fault, fix.cure) for fix in fixes]


def _put_back(owner: Any, name: str, before: Any) -> None:
    vars(owner).pop(name, None)
    if before is not None:
        vars(owner)[name] = before


def _refuse_step_cache(transformer: nn.Module | None) -> None:
    if transformer is None:
        return
    turn_off = "pipe.transformer.disable_cache()" if getattr(transformer, "is_cache_enabled", False) else None
    for name, module in transformer.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for key, hook in registry.hooks.items() if registry is not None else ():
            if turn_off is None and _is_step_cache(hook):
                turn_off = (
                    f"pipe.transformer.get_submodule({name!r})._diffusers_hook.remove_hook({key!r}), and its like"
                )
    if turn_off is not None:
        raise CannotRepair(
            "a step cache is enabled on the transformer. It decides once for the whole batch whether a step is "
            f"skipped, so a video would depend on its batch-mates. Turn it off first: {turn_off}. Nothing was changed."
        )


def _is_step_cache(hook: object) -> bool:
    module = type(hook).__module__
    return module.startswith("diffusers.hooks.") and any(part in module for part in ("cache", "broadcast"))
