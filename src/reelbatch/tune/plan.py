"""What a batch will cost in memory before anything is loaded, and whether the engine can make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reelbatch.device import choose_device, device_memory_bytes, gibibytes, held_bytes
from reelbatch.engine.planner import Isolation
from reelbatch.loading.hub import resolve_here
from reelbatch.loading.identity import any_shape
from reelbatch.loading.precision import Precision
from reelbatch.memory.calibration import Stored, find
from reelbatch.memory.cards import Card, card
from reelbatch.memory.estimate import Plan, any_image, how_far_off, margin
from reelbatch.memory.placement import Offload
from reelbatch.models.family import Phase
from reelbatch.request import VideoRequest
from reelbatch.tune.reliefs import Outcome, outcomes
from reelbatch.tune.remedies import Remedy, remedies
from reelbatch.tune.setup import PLAIN_13B, Planned, Setup, open_model

PHASES: Mapping[Phase, str] = {"text": "text encoding", "step": "a denoising step", "decode": "decoding"}
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Answer:
    """What `reelbatch plan` says.

    Attributes:
        plan: the estimate of the batch as it is set.
        available: bytes.
        limited: whether `--max-memory` sets them, and not the device.
        loads: whether the weights that must be there at once fit; if not, the engine does not open.
        largest_batch: that fits as it is set.
        outcomes: how each phase goes, with what the engine does by itself.
        remedies: what to set so that it fits as it is set, the cheapest first.
        card: that is planned for; None: a device of this machine.
        refused: why a stored calibration is not used.
    """

    setup: Setup
    plan: Plan
    available: int
    limited: bool
    loads: bool
    largest_batch: int
    outcomes: tuple[Outcome, ...]
    remedies: tuple[Remedy, ...]
    card: Card | None = None
    refused: str | None = None

    @property
    def calibrated(self) -> str | None:
        """Whether estimates are corrected by measured ones, in a line; None where nothing was ever measured."""
        if self.setup.calibration is not None:
            return self.setup.calibration.line
        return self.refused and f"the stored calibration is not used: {self.refused}; run `reelbatch plan --calibrate`"

    @property
    def fits_as_set(self) -> bool:
        """Whether nothing has to be tried a second time, and nothing waits."""
        return self.setup.held + self.plan.peak <= self.available

    @property
    def fits(self) -> bool:
        """Whether the engine makes these videos, with what it does by itself."""
        return self.loads and all(outcome.fits for outcome in self.outcomes)

    @property
    def where(self) -> str:
        return str(self.setup.model.device) if self.card is None else self.card.name

    @property
    def verdict(self) -> str:
        """In a sentence."""
        worst = max(self.plan.phases, key=lambda phase: self.plan.phases[phase])
        there = f"{gibibytes(self.available)}{' of --max-memory' if self.limited else ''}"
        as_set = f"an estimated {gibibytes(self.setup.held + self.plan.peak)} at the peak ({PHASES[worst]})"
        if self.fits_as_set:
            return f"should fit: {as_set}, of {there}"
        if self.fits:
            used = "; ".join(_words(outcome) for outcome in self.outcomes if outcome.relief)
            return f"should fit by what the engine does by itself: {used}. As it is set: {as_set}, of {there}"
        if not self.loads:
            weights = gibibytes(max(self.plan.weights.values()))
            with_offload = f"with offload {self.setup.offload}"
            return f"does not fit: the weights alone take {weights} {with_offload}, and there are {there}"
        misses = "; ".join(_words(outcome) for outcome in self.outcomes if not outcome.fits)
        return f"does not fit: at the least, {misses}, and there are {there}"

    def record(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        setup, request = self.setup, self.setup.request
        parts = setup.estimator.family.parts
        return {
            "model": setup.model.name,
            "device": str(setup.model.device),
            "card": self.card and self.card.name,
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
            "loads": self.loads,
            "fits_as_set": self.fits_as_set,
            "reliefs": [
                {"phase": outcome.phase, "relief": outcome.relief, "peak": outcome.peak, "exact": outcome.exact}
                for outcome in self.outcomes
                if outcome.relief and self.fits
            ],
            "largest_batch": self.largest_batch,
            "remedies": [{"changes": list(remedy.changes), "peak": remedy.peak} for remedy in self.remedies],
            "verdict": self.verdict,
            "calibrated": self.calibrated,
            "estimates": how_far_off(setup.model.device),
        }


def _words(outcome: Outcome) -> str:
    pixels = "" if outcome.exact else ", which changes pixels: --keep-pixels forbids it"
    relief = f" {outcome.relief}" if outcome.relief else ""
    return f"{PHASES[outcome.phase]}{relief} (an estimated {gibibytes(outcome.peak)}{pixels})"


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
    on: str | None = None,
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
        device: of this machine; with `max_memory` also one that is not here.
        on: a card by name or size, whatever this machine has; `device` is not looked at.
        max_memory: bytes, as of `EngineConfig`; videos wait rather than pass it.
        vae_tiling: as of `VideoRequest`.

    Raises:
        ValueError: for a model, a card or a size that cannot be; for a device that is not here without `max_memory`.
    """
    chosen = None if on is None else card(on)
    where = _device(device, max_memory) if chosen is None else CUDA
    precision = Precision.parse(chosen.dtype if chosen and dtype == "auto" else dtype, where)
    planned = open_model(model, where)
    guided: dict[str, Any] = {"negative_prompt": "", "true_cfg": 2.0} if cfg else {}
    limits = planned.family(precision).limits
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    request = VideoRequest(
        prompt="-", frames=frames, vae_tiling=vae_tiling, **guided, **any_image(limits) | size
    ).for_model(limits)
    held = held_bytes("cpu") if where.type == "cpu" else 0
    known, refused = Stored() if chosen else _stored(model, planned, device, precision)
    setup = Setup(planned, request, batch_size, precision, isolation, offload, held=held, calibration=known)
    memory = _memory(where) if chosen is None else chosen.usable
    limited = max_memory is not None and (memory is None or max_memory < memory)
    available = max_memory if max_memory is not None and limited else memory or 0
    plan = setup.plan()
    fits = held + plan.peak <= available
    return Answer(
        setup,
        plan,
        available,
        limited,
        held + max(plan.weights.values()) + margin(where).bytes <= (memory or available),
        setup.largest_batch(available),
        outcomes(setup, available, limited),
        () if fits else tuple(remedies(setup, available)),
        chosen,
        refused,
    )


def _stored(model: str, planned: Planned, device: str, precision: Precision) -> Stored:
    """The calibration of a model and a device that are both here, or why the one that is stored is not used."""
    if model.lower() in PLAIN_13B:
        return Stored()
    try:
        choose_device(device)
    except ValueError:
        return Stored()
    return find(any_shape(resolve_here(model), planned.name, planned.device, precision))


def _device(device: str, max_memory: int | None) -> torch.device:
    """Also one that is not here, if its memory is given."""
    if max_memory is None or device == "auto":
        try:
            return choose_device(device)
        except ValueError as error:
            raise ValueError(f"{error}; to plan for a card that is not here, name it with --on") from None
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; give auto, cpu, cuda or cuda:N") from None


def _memory(device: torch.device) -> int | None:
    """All of a device's memory; None where the device is not here."""
    try:
        return device_memory_bytes(choose_device(device))
    except ValueError:
        return None
