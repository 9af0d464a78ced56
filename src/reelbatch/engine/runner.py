"""Runner: requests to samples, samples to velocities, velocities to the samples after a step. It returns results and
writes nothing: work that failed can simply be done again."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from reelbatch.engine import flow
from reelbatch.engine.planner import Isolation, Planner
from reelbatch.engine.sample import Sample, SavedState
from reelbatch.loading.model import Model
from reelbatch.request import VideoRequest


class Runner:
    """Computes with one model."""

    def __init__(self, model: Model, isolation: Isolation) -> None:
        self.model, self.isolation = model, isolation

    @torch.no_grad()
    def start(self, request: VideoRequest, saved: SavedState | None = None) -> Sample:
        """A sample at the first step, or where the saved one stood."""
        family, device = self.model.family, self.model.device
        started = time.perf_counter()
        conditioning = family.encode(request)
        shift = family.flow_shift if request.flow_shift is None else request.flow_shift
        sample = Sample(
            request=request,
            conditioning=conditioning,
            latents=family.first_latents(request, conditioning),
            schedule=flow.schedule(request.steps or 1, shift, device),
            rows=family.rows(request, conditioning),
            text_seconds=time.perf_counter() - started,
        )
        return sample.resumed(saved)

    @torch.no_grad()
    def velocities(self, samples: Sequence[Sample]) -> list[list[Tensor]]:
        """One forward of these samples: the velocities of each one's guidance branches."""
        family = self.model.family
        packs = [[family.branches(sample) for sample in pack] for pack in Planner.packs(samples, self.isolation)]
        results = family.velocities([[branch for sample in pack for branch in sample] for pack in packs])
        flat = iter(velocity for pack in results for velocity in pack)
        return [[next(flat) for _ in sample] for pack in packs for sample in pack]

    @torch.no_grad()
    def advance(
        self, samples: Sequence[Sample], velocities: Sequence[list[Tensor] | Exception], started: float
    ) -> list[Sample | Exception]:
        """Each sample after the step that began at `started`, or the error that ends it."""
        latents = [
            branches
            if isinstance(branches, Exception)
            else flow.euler_step(
                sample.latents, flow.guide(branches, sample.request.true_cfg), sample.schedule, sample.step
            )
            for sample, branches in zip(samples, velocities, strict=True)
        ]
        finite = iter(_all_finite([tensor for tensor in latents if isinstance(tensor, Tensor)]))
        seconds = time.perf_counter() - started
        pairs = list(zip(samples, latents, strict=True))
        together = frozenset(sample.id for sample, tensor in pairs if isinstance(tensor, Tensor))
        outcomes: list[Sample | Exception] = []
        for sample, tensor in pairs:
            if isinstance(tensor, Exception):
                outcomes.append(tensor)
            else:
                outcomes.append(sample.advanced(tensor, seconds, together) if next(finite) else _not_finite(sample))
        return outcomes


def _all_finite(tensors: list[Tensor]) -> list[bool]:
    """Whether each tensor holds numbers only; one wait for the device, whatever the number of tensors."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist() if tensors else []


def _not_finite(sample: Sample) -> ArithmeticError:
    return ArithmeticError(
        f"the latents of request {sample.id!r} are no longer finite after step {sample.step + 1} of "
        f"{sample.schedule.steps}. With float16 this is overflow: use --dtype bfloat16 or float32. Otherwise the "
        "model's weights or a guidance far outside what it was trained for are at fault."
    )
