"""Engine: submit, step, run. Requests go in; videos come out, each the video it would have been alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from reelbatch.attention import Setting, choose
from reelbatch.engine.admission import as_requests
from reelbatch.engine.config import EngineConfig
from reelbatch.engine.events import Event, Progress
from reelbatch.engine.loop import Loop
from reelbatch.engine.planner import Planner
from reelbatch.engine.results import Cancelled, FailedRequests, Failure
from reelbatch.engine.sample import SavedState
from reelbatch.engine.scheduler import State
from reelbatch.loading.hub import resolve
from reelbatch.loading.identity import any_shape
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.memory.calibration import Calibration, find
from reelbatch.memory.gauge import Memory
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.versions import versions
from reelbatch.video import Video

__all__ = ["Cancelled", "Engine", "FailedRequests", "Failure", "Progress"]


class Engine:
    """Makes many videos in one run.

    Samples of any size, length, step count, guidance and progress share the steps of the transformer. In `exact`
    isolation a video is bit for bit the one its request gives alone; in `packed` it equals it to rounding.

        videos = Engine.from_pretrained("demo").generate("a large red circle moving left on a black background")

    `submit` and `cancel` may be called from any thread, all else from one. Whatever a callback raises, no request is
    lost: the next `step` goes on.

    Args:
        gauge: if given, measures the peak memory of each piece of work (`Worked.peak_bytes`).
        calibration: corrects the estimates that a memory limit goes by.
        options: of `EngineConfig`, in the place of those in `config`.

    Attributes:
        on_progress: called with a `Progress` whenever a request gets further.
        should_cancel: asked with each request's id before each step; True is as `cancel`.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        *,
        gauge: Memory | None = None,
        calibration: Calibration | None = None,
        **options: Any,
    ) -> None:
        self.config = replace(config or EngineConfig(), **options)
        choose(Setting.on(model.device, model.family.dtype, "none"), self.config.attention)
        model.family.set_attention_backend(self.config.attention)
        self.model, self.calibration = model, calibration
        self.isolation, self.max_memory = self.config.isolation, self.config.max_memory
        self.planner = Planner(self.config.max_batch_size, self.config.max_batch_tokens)
        self.decode_beside = self.config.decode_beside
        self.on_progress: Callable[[Progress], None] | None = None
        self.should_cancel: Callable[[str], bool] | None = None
        self._loop = Loop(model, self.config, self.planner, gauge, calibration, self)
        self._scheduler = self._loop.scheduler

    @classmethod
    def from_pretrained(cls, model: str = "demo", **options: Any) -> Engine:
        """Opens a model folder and makes an engine of it.

        Args:
            model, options: the attributes of `EngineConfig`: device, dtype, isolation, max_batch_size,
                max_batch_tokens, keep_latents, attention, max_memory, offload, lora, keep_pixels, decode_beside.

        Raises:
            LoraError: if a LoRA file cannot be read, or is not of this model.
            AttentionBackendError: if the attention backend cannot run here, with those that can.
            ModelFolderError: if the folder is not a model that can run, with the file and the remedy.
            ValueError: for an option that cannot be here, with those that can.
        """
        return cls.open(EngineConfig.of(model=model, **options))

    @classmethod
    def open(cls, config: EngineConfig) -> Engine:
        """Loads the model; a memory limit goes by what `reelbatch plan --calibrate` measured here, if it did."""
        model = load(resolve(config.model), config.device, config.dtype, config.offload, config.loras)
        if not config.max_memory:
            return cls(model, config)
        about = any_shape(model.folder, model.name, model.device, model.precision)
        return cls(model, config, calibration=find(about).calibration)

    @property
    def limits(self) -> ModelLimits:
        """What the model can make, and its defaults."""
        return self.model.limits

    @property
    def waiting(self) -> int:
        return len(self._scheduler.entries(State.WAITING))

    @property
    def running(self) -> int:
        return len(self._scheduler.entries(State.RUNNING))

    @property
    def busy(self) -> bool:
        """Whether there is a request whose result was not handed out."""
        return self._scheduler.busy

    @property
    def info(self) -> dict[str, Any]:
        """What it takes to make these videos again."""
        return {
            **self.model.record,
            "isolation": self.config.isolation,
            "attention": self.config.attention,
            "versions": dict(versions()),
        }

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Has every event given to `listener`, between changes of state."""
        self._loop.publisher.listeners.append(listener)

    def submit(self, request: VideoRequest, saved: SavedState | None = None) -> str:
        """Puts a request in line and returns its id. It joins between two steps, as soon as there is room.

        Args:
            saved: where an earlier run of the same request stopped, as `states` gave it; it goes on from there.

        Raises:
            RequestError: if the model cannot make it.
            ValueError: if a request of this id is already here, or `saved` is none of this request.
        """
        request = request.for_model(self.limits)
        if saved is not None:
            saved.check(request, self.model.family.geometry.latent_shape(request))
        self._scheduler.add([request], saved)
        return request.id

    def cancel(self, id: str) -> None:
        """Ends one request before its next step, or drops its frames; the others go on. An id that is not here is
        ignored: a request that comes later is another one."""
        self._scheduler.cancel(id)

    def states(self) -> dict[str, SavedState]:
        """Where those that run stand, by id: what it takes to go on with them in another process."""
        saved = {entry.request.id: entry.saved for entry in self._scheduler.entries(State.WAITING) if entry.alone}
        running = {sample.id: sample.save() for sample in self._scheduler.samples(State.RUNNING)}
        return running | {id: state for id, state in saved.items() if state is not None}

    def step(self) -> list[Video | Failure]:
        """One step of every sample that runs; returns what has ended."""
        self._loop.step()
        return self._scheduler.take()

    def run(self) -> Iterator[Video | Failure]:
        """Steps until nothing is left, giving each video as soon as it is done. Requests may be submitted meanwhile."""
        while self.busy:
            self._loop.step()
            for entry in self._scheduler.entries(State.ENDED):  # one by one: who takes them may stop
                yield from self._scheduler.take([entry.request.id])

    def drain(self) -> list[Video | Failure]:
        """What is past its last step; no further step is taken."""
        self._loop.decode()
        return self._scheduler.take()

    def generate(self, requests: VideoRequest | str | Iterable[VideoRequest | str]) -> list[Video]:
        """The videos of these requests, in their order. A text is a request with this prompt.

        After an interruption the same call goes on where it stopped, and `run` gives what is here. Requests that were
        submitted before go on beside these; what becomes of them comes out of `run` or `step`.

        Raises:
            RequestError, ValueError: before anything runs, if one of them cannot be made, or two have one id.
            FailedRequests: after the others finished, if some failed; it holds the videos and the failures.
        """
        wanted = [request.for_model(self.limits) for request in as_requests(requests)]
        here = {entry.request.id: entry.request for entry in self._scheduler.entries(*State)}
        self._scheduler.add([request for request in wanted if here.get(request.id) != request])
        ids = [request.id for request in wanted]
        while any((entry := self._scheduler.get(id)) is not None and entry.state != State.ENDED for id in ids):
            self._loop.step()
        ended = {result.request.id: result for result in self._scheduler.take(ids)}
        results = [ended[id] for id in ids]
        videos = [result for result in results if isinstance(result, Video)]
        if failures := [result for result in results if isinstance(result, Failure)]:
            raise FailedRequests(videos, failures)
        return videos
