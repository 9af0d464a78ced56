"""What a batch will cost in memory before anything is loaded, whether it fits, and what would make it fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from reelbatch.device import choose_device, device_memory_bytes, gibibytes, held_bytes
from reelbatch.engine.planner import Isolation
from reelbatch.loading.hub import DEMO_FOLDER, REAL_MODEL, model_name
from reelbatch.loading.identity import any_shape
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder, hunyuanvideo_13b
from reelbatch.memory.calibration import Calibration, find
from reelbatch.memory.estimate import Estimator, Plan, how_far_off
from reelbatch.memory.placement import Offload
from reelbatch.models.family import Family, Phase
from reelbatch.request import VideoRequest

PLAIN_13B = ("hunyuanvideo-13b", "hunyuanvideo", "13b", REAL_MODEL.lower())
"""Names of HunyuanVideo (13B) that are planned from the configuration in the code, without a folder."""
LARGEST_BATCH = 256
"""Batches that are not looked beyond."""
PHASES: Mapping[Phase, str] = {"text": "text encoding", "step": "a denoising step", "decode": "decoding"}


class Planned:
    """A model that is not loaded, with an estimator for each precision and isolation.

    Args:
        skeleton: the family in a precision.
        device: where it is to run; it need not be here.
    """

    def __init__(self, name: str, skeleton: Callable[[Precision], Family], device: torch.device) -> None:
        self.name, self.device = name, device
        self.family = lru_cache(8)(skeleton)
        self.estimator = lru_cache(16)(self._estimator)

    def _estimator(self, precision: Precision, isolation: Isolation) -> Estimator:
        return Estimator(self.family(precision), isolation, self.device)


@dataclass(frozen=True)
class Setup:
    """A batch of equal videos, and how it is to run.

    Attributes:
        held: bytes that the process holds before the model is loaded; they count on a CPU.
        calibration: what estimates are corrected by, in the dtype that it was measured in.
    """

    model: Planned
    request: VideoRequest
    batch_size: int
    precision: Precision
    isolation: Isolation = "exact"
    offload: Offload = "none"
    held: int = 0
    calibration: Calibration | None = None

    @property
    def estimator(self) -> Estimator:
        return self.model.estimator(self.precision, self.isolation)

    def plan(self) -> Plan:
        """The estimate, corrected where there is a calibration."""
        estimated = self.estimator.plan([self.request] * self.batch_size, self.offload)
        known = self.calibration
        return known.corrected(estimated) if known and known.identity.dtype == str(self.precision) else estimated

    def peak(self) -> int:
        """Estimated bytes, with those that the process holds already."""
        return self.held + self.plan().peak

    def largest_batch(self, available: int) -> int:
        """Videos of this kind that fit together, `LARGEST_BATCH` at most; 0 if not even one does."""
        sizes = range(1, LARGEST_BATCH + 1)
        return bisect_left(sizes, True, key=lambda size: replace(self, batch_size=size).peak() > available)


@dataclass(frozen=True)
class Remedy:
    """Changes that make a batch fit, the estimated peak with them, and what they cost in words."""

    changes: tuple[str, ...]
    peak: int


@dataclass(frozen=True)
class Answer:
    """What `reelbatch plan` says. `remedies` are in the order of what they cost, the cheapest first."""

    setup: Setup
    plan: Plan
    available: int
    largest_batch: int
    remedies: tuple[Remedy, ...]
    refused: str | None = None

    @property
    def calibrated(self) -> str | None:
        """Whether estimates are corrected by measured ones, in a line; None where nothing was ever measured."""
        if self.setup.calibration is not None:
            return self.setup.calibration.line
        return self.refused and f"the stored calibration is not used: {self.refused}; run `reelbatch plan --calibrate`"

    @property
    def fits(self) -> bool:
        return self.setup.held + self.plan.peak <= self.available

    @property
    def verdict(self) -> str:
        """In a sentence."""
        peak, available = gibibytes(self.setup.held + self.plan.peak), gibibytes(self.available)
        worst = max(self.plan.phases, key=lambda phase: self.plan.phases[phase])
        if self.fits:
            return f"should fit: an estimated {peak} at the peak ({PHASES[worst]}), of {available}"
        return f"does not fit: an estimated {peak} at the peak ({PHASES[worst]}), and there are {available}"

    def record(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        setup, request = self.setup, self.setup.request
        parts = setup.estimator.family.parts
        return {
            "model": setup.model.name,
            "device": str(setup.model.device),
            "dtype": str(setup.precision),
            "isolation": setup.isolation,
            "offload": setup.offload,
            "height": request.height,
            "width": request.width,
            "frames": request.frames,
            "true_cfg": request.uses_cfg,
            "batch_size": setup.batch_size,
            "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()},
            "estimated": {
                phase: {"weights": self.plan.weights[phase], "activations": getattr(self.plan, phase), "total": total}
                for phase, total in self.plan.phases.items()
            },
            "held_before": setup.held,
            "peak": setup.held + self.plan.peak,
            "available": self.available,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "remedies": [{"changes": list(remedy.changes), "peak": remedy.peak} for remedy in self.remedies],
            "verdict": self.verdict,
            "calibrated": self.calibrated,
            "estimates": how_far_off(setup.model.device),
        }


def answer(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch_size: int = 1,
    cfg: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    isolation: Isolation = "exact",
    offload: Offload = "none",
    max_memory: int | None = None,
    vae_tiling: int | None = None,
) -> Answer:
    """The estimated cost of a batch of equal videos; loads nothing and downloads nothing.

    Args:
        model: "demo", a folder in the Diffusers layout, or "hunyuanvideo-13b".
        height, width, frames: the model's own if not given.
        cfg: whether a second, unconditional branch runs.
        max_memory: bytes; what the device has if not given.
        vae_tiling: as of `VideoRequest`.

    Raises:
        ValueError: for a model or a size that cannot be, and for a device that is not here without `max_memory`.
    """
    where = _device(device, max_memory)
    precision = Precision.parse(dtype, where)
    planned = open_model(model, where)
    guided: dict[str, Any] = {"negative_prompt": "", "true_cfg": 2.0} if cfg else {}
    request = VideoRequest(prompt="-", height=height, width=width, frames=frames, vae_tiling=vae_tiling, **guided)
    request = request.for_model(planned.family(precision).limits)
    held = held_bytes("cpu") if where.type == "cpu" else 0
    known, refused = _stored(model, planned, device, precision)
    setup = Setup(planned, request, batch_size, precision, isolation, offload, held=held, calibration=known)
    available = device_memory_bytes(where) if max_memory is None else max_memory
    plan = setup.plan()
    instead = () if held + plan.peak <= available else tuple(remedies(setup, available))
    return Answer(setup, plan, available, setup.largest_batch(available), instead, refused)


def _stored(model: str, planned: Planned, device: str, precision: Precision) -> tuple[Calibration | None, str | None]:
    """The calibration of a model and a device that are both here, or why the one that is stored is not used."""
    if model.lower() in PLAIN_13B:
        return None, None
    try:
        choose_device(device)
    except ValueError:
        return None, None
    return find(any_shape(_model_folder(model), planned.name, planned.device, precision))


def open_model(model: str, device: torch.device) -> Planned:
    """A model that is planned for, without loading it.

    Raises:
        ValueError: if there is no such folder, or it lacks a configuration.
    """
    if model.lower() in PLAIN_13B:
        return _plain_13b(device)
    folder = _model_folder(model)
    if not folder.is_dir():
        raise ValueError(
            f"model {model!r}: no such folder. A plan downloads nothing: give a model folder, demo, or {PLAIN_13B[0]}"
        )
    return Planned(model_name(folder), lambda precision: from_folder(folder, precision, device), device)


@lru_cache(4)
def _plain_13b(device: torch.device) -> Planned:
    return Planned(PLAIN_13B[0], lambda precision: hunyuanvideo_13b(precision, device), device)


def _model_folder(model: str) -> Path:
    return DEMO_FOLDER if model == "demo" else Path(model).expanduser()


def _device(device: str, max_memory: int | None) -> torch.device:
    """Also one that is not here, if its memory is given."""
    if max_memory is None or device == "auto":
        try:
            return choose_device(device)
        except ValueError as error:
            raise ValueError(f"{error}; to plan for a device that is not here, give its --max-memory") from None
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; give auto, cpu, cuda or cuda:N") from None


# -- what would make it fit ------------------------------------------------------------------------

Change = tuple[int, str, Callable[[Setup], Setup]]
"""What it costs (a rank), what to call it, and the setup with it."""

TILE_SIDES = ((1, 256), (2, 128))
"""What VAE tiles cost, and their sides in pixels."""
SMALLER_BATCH = 2


def remedies(setup: Setup, available: int) -> list[Remedy]:
    """Sets of changes with which the batch fits, none of which could be left out, the cheapest first.

    Cheap is what costs little time and leaves the videos nearly as they are: VAE tiles, a smaller batch, offloading
    what is not at work, a dtype of fewer bytes, offloading block by block.
    """
    candidates: list[tuple[int, frozenset[str], Remedy]] = []
    for changes in sorted(_combinations(setup), key=lambda changes: sum(rank for rank, _, _ in changes)):
        changed = setup
        for _, _, change in changes:
            changed = change(changed)
        cost, names = sum(rank for rank, _, _ in changes), [name for _, name, _ in changes]
        largest = changed.largest_batch(available)
        if largest == 0:
            continue
        if largest < setup.batch_size:
            changed = replace(changed, batch_size=largest)
            cost += SMALLER_BATCH
            names.append(f"--batch-size {largest}")
        kinds = frozenset(name.split()[0] for name in names)
        candidates.append((cost, kinds, Remedy(tuple(names), changed.peak())))
    candidates.sort(key=lambda one: one[0])
    needed = [one for i, one in enumerate(candidates) if not any(kinds <= one[1] for _, kinds, _ in candidates[:i])]
    return [remedy for _, _, remedy in needed]


def _combinations(setup: Setup) -> Iterator[Sequence[Change]]:
    """Every choice of at most one change of each kind; a smaller batch is tried with each."""
    kinds: list[list[Change | None]] = [[None], [None], [None]]
    tiles = setup.estimator.family.tile_side(setup.request)
    for cost, side in TILE_SIDES:
        if tiles is None or tiles > side:
            tiled = setup.request.model_copy(update={"vae_tiling": side})
            kinds[0].append((cost, f"--vae-tiling {side}", partial(replace, request=tiled)))
    if setup.offload == "none":
        kinds[1].append((3, "--offload component", lambda s: replace(s, offload="component")))
    if setup.offload != "block":
        kinds[1].append((6, "--offload block", lambda s: replace(s, offload="block")))
    half = torch.bfloat16
    if setup.precision.transformer.itemsize > half.itemsize:
        kinds[2].append((4, "--dtype bfloat16", lambda s: replace(s, precision=Precision(half, half, half))))
    for choice in product(*kinds):
        yield [change for change in choice if change is not None]
