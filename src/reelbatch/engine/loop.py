"""Loop: what a step of the engine does, in its order. Every part leaves each request in one state, whatever raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from reelbatch.engine.admission import Admission
from reelbatch.engine.config import EngineConfig
from reelbatch.engine.decoder import Decoded, Decoder
from reelbatch.engine.events import Event, Progress, Publisher
from reelbatch.engine.fallback import Fallback
from reelbatch.engine.limit import MemoryLimit
from reelbatch.engine.planner import Planner
from reelbatch.engine.results import Failure, end_of, progress_of
from reelbatch.engine.runner import Runner
from reelbatch.engine.sample import Sample
from reelbatch.engine.scheduler import OPEN, Scheduler, State
from reelbatch.loading.model import Model
from reelbatch.memory.calibration import Calibration
from reelbatch.memory.gauge import Memory
from reelbatch.video import Video

DECODE_BESIDE = 2
"""Videos decoded beside the next steps, where those are not computed by the same cores: on the CPU it costs 8 %."""


class Owner(Protocol):
    """What its owner may change at any time; as of `Engine`."""

    decode_beside: int | None
    on_progress: Callable[[Progress], None] | None
    should_cancel: Callable[[str], bool] | None

    @property
    def info(self) -> dict[str, Any]: ...


class Loop:
    """Moves requests on."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        planner: Planner,
        gauge: Memory | None,
        calibration: Calibration | None,
        owner: Owner,
    ) -> None:
        self.scheduler, self.publisher = Scheduler(), Publisher()
        self._model, self._keep_latents, self._owner = model, config.keep_latents, owner
        runner = Runner(model, config.isolation)
        self._fallback = Fallback(runner, planner, gauge, config.keep_pixels, wait=lambda: self._decoder.wait())
        self._decoder = Decoder(self._fallback)
        limit = config.max_memory
        self._limit = None if limit is None else MemoryLimit(limit, model, config.isolation, calibration)
        self._admission = Admission(self.scheduler, self._fallback, self._limit)

    def step(self) -> None:
        """One step of every sample that runs, with those that join before it; then those that are done are decoded."""
        self._drop_cancelled()
        for event in self._admission.admit(hold=self._decoder.stuck):
            self._publish(event)
        batch = self.scheduler.samples(State.RUNNING)
        if batch:
            result = self._fallback.step(batch)
            failures = self.scheduler.stepped(batch, result.outcomes)
            self._publish(*result.events, *progress_of(result.outcomes), *map(end_of, failures))
        self.decode(leave=self._beside if self.scheduler.samples(State.RUNNING) else 0)

    def decode(self, leave: int = 0) -> None:
        """Decodes what is past its last step; so many samples may stay with the decoder's thread."""
        samples = self.scheduler.samples(State.DECODING)
        if self._beside:
            self._decoder.begin(samples)
        others = bool(self.scheduler.samples(State.RUNNING))
        for sample, outcome in self._decoder.results(samples, leave, others):
            if isinstance(outcome, Exception):
                self._end(Failure(sample.request, outcome))
            else:
                self._end(self._video(sample, outcome), *outcome.events)

    @property
    def _beside(self) -> int:
        """Samples that the decoder's thread may have."""
        if self._limit is not None or self._model.offload != "none":
            return 0
        default = 0 if self._model.device.type == "cpu" else DECODE_BESIDE
        given = self._owner.decode_beside
        return default if given is None else given

    def _drop_cancelled(self) -> None:
        should_cancel = self._owner.should_cancel
        if should_cancel is not None:
            for entry in self.scheduler.entries(*OPEN):
                if should_cancel(entry.request.id):
                    self.scheduler.cancel(entry.request.id)
        dropped = self.scheduler.take_cancelled()
        for failure in dropped:
            self._decoder.forget(failure.request.id)
        self._publish(*map(end_of, dropped))

    def _video(self, sample: Sample, decoded: Decoded) -> Video:
        return Video(
            request=sample.request,
            frames=decoded.frames,
            provenance={
                **self._owner.info,
                "seconds": {"text": sample.text_seconds, "denoise": sample.seconds, "decode": decoded.seconds},
                "vae_tiles": decoded.tile_side or False,
                "batch": {"largest": sample.largest_batch, "mates": sorted(sample.batch_mates)},
                "fallbacks": [*sample.changes, *decoded.changes],
            },
            latents=sample.latents.cpu() if self._keep_latents else None,
        )

    def _end(self, result: Video | Failure, *events: Event) -> None:
        self.scheduler.ended(result)
        self._decoder.forget(result.request.id)
        self._publish(*events, end_of(result))

    def _publish(self, *events: Event) -> None:
        self.publisher.publish(events, self._owner.on_progress)
