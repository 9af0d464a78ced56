"""`repair` and `restore`: a loaded Diffusers pipeline, made right for batches in place, and back again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakSet

from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline, HunyuanVideoPipeline

from reelbatch.repairs import hunyuan_video, hunyuan_video15
from reelbatch.repairs.alone import Isolated, Isolation
from reelbatch.repairs.fix import CannotRepair, Undo
from reelbatch.repairs.step_cache import refuse_step_cache

WRITTEN_FOR = "0.42.1"
REPAIRS = {
    HunyuanVideoPipeline: hunyuan_video.faults,
    HunyuanVideo15Pipeline: hunyuan_video15.faults,
    HunyuanVideo15ImageToVideoPipeline: hunyuan_video15.faults,
}
_HELD = "_reelbatch_repair"


class _Held:
    """What undoes the repair of a part, and the repaired pipelines that were seen with that part."""

    def __init__(self, undo: Undo) -> None:
        self.undo = undo
        self.pipelines: WeakSet[Any] = WeakSet()

    def __deepcopy__(self, memo: object) -> _Held:
        return _Held(_refuse_copy)


def _refuse_copy() -> None:
    raise CannotRepair("this is a copy of what was repaired: call restore first and copy then. Nothing was changed.")


class Repaired(NamedTuple):
    """One thing that a repair did."""

    fault: str
    cure: str

    def __str__(self) -> str:
        return f"{self.fault} → {self.cure}"


def repair(pipe: Any, isolation: Isolation = "exact") -> list[Repaired]:
    """Makes every video of a batch the one that the pipeline would have given alone, in place.

    Bit for bit in `exact` isolation; to rounding in `packed`.

    The parameters stay the very same tensors; hooks (offload), LoRA adapters and quantized layers stay on. The pipeline
    is used as before. Pipelines that share a model share its repair: it lasts until the last of them is restored.

        pipe = HunyuanVideoPipeline.from_pretrained(...)
        reelbatch.repair(pipe)
        pipe(["a cat", "a dog on a beach at night"], num_videos_per_prompt=2, guidance_scale=[6.0, 4.5])

    Args:
        pipe: a `HunyuanVideoPipeline`, `HunyuanVideo15Pipeline` or `HunyuanVideo15ImageToVideoPipeline`.
        isolation: "exact": everything is computed in the shapes that a video has alone, so it is the same bit for bit;
            "packed": fewer and larger calls, the same to rounding. Repairing again sets it anew.

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
    refuse_step_cache(pipe.transformer)
    fixes = find(pipe)
    with ExitStack() as on_refusal:
        undos = []
        for fix in fixes:
            undos.append(fix.apply())
            on_refusal.callback(undos[-1])
        on_refusal.pop_all()
    for fix, undo in zip(fixes, undos, strict=True):
        vars(fix.part)[_HELD] = _Held(undo)
    for part in _parts(pipe):
        if _HELD in vars(part):
            vars(part)[_HELD].pipelines.add(pipe)
    if isinstance(pipe, Isolated):
        pipe.isolation = isolation
    return [Repaired(fix.fault, fix.cure) for fix in fixes]


def restore(pipe: Any) -> None:
    """Undoes `repair`, exactly; a pipeline that was not repaired stays as it is.

    A model that another repaired pipeline has too stays repaired until that one is restored.

    Raises:
        CannotRepair: if the class of a module was changed again after the repair.
    """
    for part in _parts(pipe):
        held = vars(part).get(_HELD)
        if held is None:
            continue
        held.pipelines.discard(pipe)
        if not any(part is used for other in held.pipelines for used in _parts(other)):
            held.undo()
            del vars(part)[_HELD]


def _parts(pipe: Any) -> list[Any]:
    """What a repair may change: the pipeline, its transformer and its VAE."""
    models = (getattr(pipe, name, None) for name in ("transformer", "vae"))
    return [pipe, *(getattr(model, "_orig_mod", model) for model in models if model is not None)]
