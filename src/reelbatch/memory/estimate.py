"""What work will cost in memory: traced on fake tensors, plus a margin.

The margin is for what a trace does not see: libraries, the C allocator on a CPU, the caching allocator and the context
on a GPU. That of the CPU was measured by benchmarks/memory_plan.py; that of GPUs is an assumption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from reelbatch.image import blank
from reelbatch.memory.placement import Offload
from reelbatch.memory.streaming import network_bytes, streamed_bytes
from reelbatch.models.family import PHASES, Family, Phase
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.tracing import peak_bytes

LONGEST_PROMPT = "a " * 2048
"""More words than a text encoder reads."""
TRACED = 3
"""Equal requests of a batch that are traced; each further one costs as much as the third."""


class Margin(NamedTuple):
    """What is added to the bytes of tensors: so many, and a share of them."""

    bytes: int
    share: float

    def added_to(self, tensors: int) -> int:
        return int(tensors * (1 + self.share)) + self.bytes


CPU_MARGIN = Margin(64 * 2**20, 0.25)
"""For what libraries read and keep at their first use, and for what the C allocator holds besides tensors."""
GPU_MARGIN = Margin(768 * 2**20, 0.05)
"""For the context, libraries' workspaces and the caching allocator. Assumed, not measured."""


def margin(device: torch.device) -> Margin:
    return CPU_MARGIN if device.type == "cpu" else GPU_MARGIN


STEPS_OFF, DECODES_OFF = (-0.028, 0.929), (-0.090, 0.332)
"""Lowest and highest error (estimate over measured, less 1) on a CPU: of the 40 peaks of steps, and of decodes, in fp32
under benchmarks/results, which an earlier version measured on another processor. Estimates of tiny videos are the
furthest off, and too high."""


def how_far_off(device: torch.device | str) -> str:
    """What must be said of every estimate."""
    spans = (f"{-low:.0%} too low to {high:.0%} too high" for low, high in (STEPS_OFF, DECODES_OFF))
    on_cpu = "on the CPU those of steps have been {}, of decodes {}".format(*spans)
    if torch.device(device).type == "cpu":
        return f"These are estimates: {on_cpu} (`reelbatch plan --calibrate` measures it here)."
    return f"These are estimates, not yet compared with a GPU's real use; {on_cpu}."


@dataclass(frozen=True)
class Plan:
    """Estimated memory of a batch, in bytes.

    Attributes:
        weights: on the device in each phase.
        text, step, decode: what each phase takes at its peak besides weights.
    """

    weights: Mapping[Phase, int]
    text: int
    step: int
    decode: int

    @property
    def phases(self) -> dict[Phase, int]:
        """All that each phase takes."""
        return {phase: self.weights[phase] + getattr(self, phase) for phase in PHASES}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def fits(self, available_bytes: int) -> bool:
        return self.peak <= available_bytes


class View(NamedTuple):
    """A sample as the family sees it."""

    request: VideoRequest
    conditioning: object
    latents: Tensor
    timestep: Tensor
    next_timestep: Tensor


class Estimator:
    """Estimates for one model. Weights are not counted by `text`, `step` and `decode`; they include the margin.

    Estimates are kept by what a request asks of memory, so only the first of its kind takes time. Any thread may ask.

    Args:
        family: loaded, or a skeleton (`loading/skeleton.py`). Where weights come and go (offload) or are in 8 bits, it
            must be a skeleton: its networks are run.
        isolation: "exact" gives each sample a pack of its own; "packed" puts all in one.
        device: where the model runs or is to run, which decides the margin.
    """

    def __init__(
        self,
        family: Family,
        isolation: Literal["exact", "packed"],
        device: torch.device,
    ) -> None:
        self.family, self.isolation, self.device = family, isolation, device
        self._margin = margin(device)
        self._where = device if device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")
        self._texts = lru_cache(64)(self._trace_text)
        self._steps = lru_cache(1024)(self._trace_step)
        self._decodes = lru_cache(256)(self._trace_decode)

    # -- estimates

    def text(self, request: VideoRequest) -> int:
        """Encoding the longest text that is read, and the image."""
        wanted = _alike(request)
        if request.image is None:  # else the VAE encodes it, at the video's size
            side = self.family.geometry.spatial_stride
            wanted = wanted.model_copy(update={"height": side, "width": side, "frames": 1, "vae_tiling": None})
        return self._margin.added_to(self._texts(wanted))

    def step(self, requests: Sequence[VideoRequest]) -> int:
        """A step that these requests share, with what is kept of each between steps.

        Raises:
            ValueError: for no request.
        """
        if not requests:
            raise ValueError("no requests given: a step is of one video or more.")
        return self._margin.added_to(self.step_tensors(requests))

    def decode(self, request: VideoRequest, waiting: Sequence[VideoRequest] = ()) -> int:
        """Decoding a request, while the latents of others wait."""
        tensors = self._decodes(_alike(request)) + sum(self.latent_bytes(other) for other in waiting)
        return self._margin.added_to(tensors)

    def plan(self, requests: Sequence[VideoRequest], offload: Offload = "none") -> Plan:
        """A batch: the encoding of a text, a step of all, and decoding one while the latents of the others wait."""
        step, counts = self.step(requests), Counter(map(_alike, requests))
        latents = sum(count * self.latent_bytes(request) for request, count in counts.items())
        decode = max(self._decodes(request) + latents - self.latent_bytes(request) for request in counts)
        return Plan(self.weights(offload), max(map(self.text, counts)), step, self._margin.added_to(decode))

    def weights(self, offload: Offload = "none") -> Mapping[Phase, int]:
        """Bytes of weights on the device in each phase."""
        family = self.family
        if offload == "none":
            return MappingProxyType(dict.fromkeys(PHASES, sum(map(network_bytes, family.parts.values()))))
        sizes = dict.fromkeys(PHASES, 0)
        for name, network in family.parts.items():
            in_blocks = offload == "block" and name in family.blockwise
            for phase in (family.phases[name], *family.also.get(name, ())):
                sizes[phase] += streamed_bytes(network) if in_blocks else network_bytes(network)
        return MappingProxyType(sizes)

    # -- tensors

    def latent_bytes(self, request: VideoRequest) -> int:
        channels, frames, height, width = self.family.geometry.latent_shape(request)
        return channels * frames * height * width * torch.float32.itemsize

    def step_tensors(self, requests: Sequence[VideoRequest]) -> int:
        """Bytes of tensors of a step, without the margin. Each further one of equal requests adds the same."""
        counts = Counter(map(_alike, requests))
        traced = {request: min(count, TRACED) for request, count in counts.items()}
        size = base = self._steps(_in_order(traced))
        for request, count in counts.items():
            if count > TRACED:
                fewer = self._steps(_in_order({**traced, request: TRACED - 1}))
                size += (count - TRACED) * (base - fewer)
        return size

    def _trace_text(self, request: VideoRequest) -> int:
        longest = {"prompt": LONGEST_PROMPT, **({"negative_prompt": LONGEST_PROMPT} if request.uses_cfg else {})}

        def encode() -> None:
            with catch_warnings():
                simplefilter("ignore")  # of words that are cut
                self.family.encode(request.model_copy(update=longest))

        return peak_bytes(encode, self.device)

    def _trace_step(self, counts: tuple[tuple[VideoRequest, int], ...]) -> int:
        requests = [request for request, count in counts for _ in range(count)]

        def step() -> object:
            views = [
                View(
                    request,
                    self.family.stand_in(request),
                    self._latents(request),
                    self._float(500.0),
                    self._float(480.0),
                )
                for request in requests
            ]
            branches = [self.family.branches(view) for view in views]
            packs = branches if self.isolation == "exact" else [[branch for each in branches for branch in each]]
            velocities = iter(velocity for pack in self.family.velocities(packs) for velocity in pack)
            # a sample's branches become its velocity, and Euler's step is taken in fp32
            return [
                view.latents + torch.stack([next(velocities).float() for _ in each]).sum(0)
                for view, each in zip(views, branches, strict=True)
            ]

        return peak_bytes(step, self.device)

    def _trace_decode(self, request: VideoRequest) -> int:
        return peak_bytes(
            lambda: self.family.decode(self._latents(request), self.family.tile_side(request)), self.device
        )

    def _latents(self, request: VideoRequest) -> Tensor:
        return torch.zeros(self.family.geometry.latent_shape(request), device=self._where)

    def _float(self, value: float) -> Tensor:
        return torch.tensor(value, device=self._where)


def any_image(limits: ModelLimits) -> dict[str, Any]:
    """Fields of a request that stands for others, of models that make no video without an image."""
    if not limits.image_required:
        return {}
    return {"image": blank(), "height": limits.defaults.height, "width": limits.defaults.width}


def _alike(request: VideoRequest) -> VideoRequest:
    """A request that asks the same of memory as all that differ from it in nothing that matters there."""
    return request.model_copy(
        update={
            "prompt": "-",
            "prompt_2": None,
            "negative_prompt": "" if request.uses_cfg else None,
            "image": None if request.image is None else blank(),
            "true_cfg": 2.0 if request.uses_cfg else 1.0,
            "seed": 0,
            "steps": None,
            "guidance": None,
            "flow_shift": None,
            "attention_rule": None,  # attention takes about the same with rules, and is not where a step takes most
            "fps": None,
            "id": "-",
            "tags": (),
            "name": None,
        }
    )


def _in_order(counts: Mapping[VideoRequest, int]) -> tuple[tuple[VideoRequest, int], ...]:
    """The largest last: where packs work one after the other, that is where most is kept meanwhile."""
    return tuple(sorted(counts.items(), key=lambda item: (item[0].pixels, item[0].size)))
