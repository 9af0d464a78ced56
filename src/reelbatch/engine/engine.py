"""Engine: submit, step, run. Requests go in; videos come out, each the video it would have been alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from reelbatch.attention import AUTO, Setting, choose, rule_named
from reelbatch.device import OutOfMemory, device_memory_bytes, free_memory, gibibytes, held_bytes, is_out_of_memory, log
from reelbatch.engine import flow
from reelbatch.engine.planner import Isolation, Planner
from reelbatch.engine.sample import Sample, SavedState, draw_noise
from reelbatch.loading.hub import resolve
from reelbatch.loading.load import Components, load
from reelbatch.loading.precision import Precision
from reelbatch.memory.estimate import step_peak_bytes
from reelbatch.memory.placement import Offload
from reelbatch.models.hunyuan_video.text import Conditioning
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.models.layers import BranchShape
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.versions import versions
from reelbatch.video import Video

Result = TypeVar("Result")
Decoded = tuple[Tensor, float]
"""Frames, and the seconds that decoding took."""
Way = tuple[str, Callable[[], AbstractContextManager[None]]]
"""A way to do with less memory: what to call it, and what to enter while working so."""
TEXT_WINDOW = 16
"""Requests in line whose texts are encoded while the text encoders are on the device, where they come and go."""
SMALLER_TILES = (128, 64)
"""Pixels on a side of the VAE tiles that are tried when decoding runs out of memory."""

Phase = Literal["text", "denoise", "decode", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """Where one request stands. `seconds_per_step` is that of its last step, None before the first."""

    id: str
    phase: Phase
    step: int
    steps: int
    seconds_per_step: float | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Failure:
    """A request that ended without a video."""

    request: VideoRequest
    error: Exception
    cancelled: bool = False


class Cancelled(Exception):
    """The request was cancelled by its owner."""


class FailedRequests(Exception):
    """Some requests of a `generate` call failed; the others finished and are in `videos`."""

    def __init__(self, videos: list[Video], failures: list[Failure]) -> None:
        reasons = "; ".join(f"{failure.request.id}: {failure.error}" for failure in failures)
        super().__init__(f"{len(failures)} of {len(videos) + len(failures)} requests failed: {reasons}")
        self.videos = videos
        self.failures = failures


class Engine:
    """Makes many videos in one run.

    Samples of any size, length, step count, guidance and progress share the steps of the transformer. In `exact`
    isolation a video is bit for bit the one its request gives alone; in `packed` it equals it to rounding.

        engine = Engine.from_pretrained("demo")
        videos = engine.generate([VideoRequest(prompt="a large red circle moving left on a black background")])

    Attributes:
        decode_beside: finished samples that may be decoded beside the next steps, in a thread; 0 decodes them between
            the steps, as does a memory limit, whose estimates know one phase at a time.
        correct_step: from the estimated bytes of a step's activations to better ones, for `max_memory`; those of
            `reelbatch plan --calibrate`, where the command line finds them.
        on_progress: called with a `Progress` whenever a request gets further.
        should_cancel: asked with a request's id before each step; True ends that request alone.
    """

    def __init__(
        self,
        components: Components,
        *,
        isolation: Isolation = "exact",
        max_batch_size: int = 8,
        max_batch_tokens: int | None = None,
        keep_latents: bool = False,
        attention: str = AUTO,
        max_memory: int | None = None,
    ) -> None:
        if isolation not in ("exact", "packed"):
            raise ValueError(f"isolation is {isolation!r}; it must be 'exact' or 'packed'.")
        choose(Setting(components.device.type, components.transformer.dtype, "none"), attention)
        components.transformer.set_attention_backend(attention)
        self.max_memory = max_memory
        self.decode_beside = 0
        self.correct_step: Callable[[int], int] = int
        if components.residence is not None:
            components.residence.leave()
        self._held = held_bytes(components.device)
        if max_memory is not None:
            above = max(max_memory - self._held - components.visiting_bytes("vae"), 0)
            known = components.decoder.tile_above_bytes
            decoder = VideoDecoder(components.decoder.vae, above if known is None else min(above, known))
            components = replace(components, decoder=decoder)
        self.components = components
        self.isolation = isolation
        self.planner = Planner(max_batch_size, max_batch_tokens)
        self.keep_latents = keep_latents
        self.on_progress: Callable[[Progress], None] | None = None
        self.should_cancel: Callable[[str], bool] | None = None
        self._waiting: deque[VideoRequest] = deque()
        self._saved: dict[str, SavedState] = {}
        self._running: list[Sample] = []
        self._decoding: deque[tuple[Sample, Future[Decoded]]] = deque()
        self._decoder_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")
        self._ids: set[str] = set()
        self._cancelled: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        model: str = "demo",
        *,
        device: str | torch.device = "auto",
        dtype: Precision | torch.dtype | str = "auto",
        isolation: Isolation = "exact",
        max_batch_size: int = 8,
        max_batch_tokens: int | None = None,
        keep_latents: bool = False,
        attention: str = AUTO,
        max_memory: int | None = None,
        offload: Offload = "none",
        lora: Sequence[tuple[str | Path, float]] = (),
    ) -> Engine:
        """Opens a model folder and makes an engine of it.

        Args:
            model: "demo" (the bundled little model), a folder in the Diffusers layout, or a hub id.
            device: "auto" is CUDA where there is one, else the CPU.
            dtype: of weights and activations; "auto" is bfloat16 on CUDA, float32 on the CPU. Part by part as in
                "transformer=bfloat16,vae=float16,text=float16"; "int8" keeps the transformer's weights in 8 bits.
            isolation: "exact" (bit-identical to a run alone) or "packed" (equal to rounding, fewer and larger calls).
            max_batch_size: samples that share a step.
            max_batch_tokens: transformer rows that share a step, or None for no limit.
            keep_latents: whether videos carry their final latents too.
            max_memory: bytes that this process (on a GPU: its allocations there) may hold. Samples wait rather than
                overrun it, by estimate; what does not fit alone fails alone.
            attention: the kernel, a name in `reelbatch.attention.BACKENDS`; "auto" takes the best that there is.
            offload: which weights are on the device: "none" waits elsewhere; "component", those of the component at
                work; "block", of the transformer and Llama those of the block at work. Videos are the same to the bit.
            lora: LoRA files that act on the transformer, each with its scale.

        Raises:
            LoraError: if a LoRA file cannot be read, or is not of this model.
            AttentionBackendError: if the attention backend cannot run here, with those that can.
            ModelFolderError: if the folder is not a model that can run, with the file and the remedy.
            ValueError: for an offload that cannot be here, with the one that can.
        """
        return cls(
            load(resolve(model), device, dtype, offload=offload, lora=lora),
            isolation=isolation,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            keep_latents=keep_latents,
            attention=attention,
            max_memory=max_memory,
        )

    # -- asking ------------------------------------------------------------------------------------

    @property
    def limits(self) -> ModelLimits:
        """What the model can make, and its defaults."""
        return self.components.limits

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The words that a little model knows; None for a model that knows language."""
        return self.components.vocabulary

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether a request is in line, runs, or is decoded."""
        return bool(self._waiting or self._running or self._decoding)

    @property
    def info(self) -> dict[str, Any]:
        """What it takes to make these videos again: model, device, dtype, isolation and versions."""
        return {
            "model": self.components.name,
            "device": str(self.components.device),
            "dtype": str(self.components.precision),
            "isolation": self.isolation,
            "attention": self.components.transformer.attention_backend,
            "offload": self.components.offload,
            "versions": dict(versions()),
        }

    # -- working -----------------------------------------------------------------------------------

    def submit(self, request: VideoRequest, saved: SavedState | None = None) -> str:
        """Puts a request in line and returns its id. It joins between two steps, as soon as there is room.

        Args:
            saved: where an earlier run of the same request stopped, as `states` gave it; it goes on from there.

        Raises:
            RequestError: if the model cannot make it, or a request of this id is already here.
        """
        request = request.for_model(self.limits)
        if request.id in self._ids:
            raise ValueError(f"id is {request.id!r}, which another request in line has; ids must differ.")
        if saved is not None:
            saved.check(request, self._latent_shape(request))
            self._saved[request.id] = saved
        self._ids.add(request.id)
        self._waiting.append(request)
        return request.id

    def states(self) -> dict[str, SavedState]:
        """Where those that run stand, by id: what it takes to go on with them in another process."""
        return {sample.request.id: sample.save() for sample in self._running}

    def cancel(self, id: str) -> None:
        """Ends one request before its next step; the others go on. An id that is not here is ignored."""
        self._cancelled.add(id)

    def step(self) -> list[Video | Failure]:
        """One step of every sample that runs; returns what ended in it."""
        ended: list[Video | Failure] = [*self._drop_cancelled(), *self._admit()]
        if self._running:
            started = time.perf_counter()
            ended += self._advance(self._velocities(self._running), started)
        return [*ended, *self._decoded(leave=self.decode_beside if self._running else 0)]

    def run(self) -> Iterator[Video | Failure]:
        """Steps until nothing is left, giving each video as soon as it is done. Requests may be submitted meanwhile."""
        while self.busy:
            yield from self.step()

    def drain(self) -> list[Video | Failure]:
        """What is past its last step; no further step is taken."""
        return list(self._decoded(leave=0))

    def generate(self, requests: Sequence[VideoRequest]) -> list[Video]:
        """The videos of these requests, in their order.

        Raises:
            RequestError: before anything runs, if one of them cannot be made.
            ValueError: if requests are in line already: what becomes of them comes out of `run`.
            FailedRequests: after the others finished, if some failed; it holds the videos and the failures.
        """
        if self._ids:
            raise ValueError(f"{len(self._ids)} submitted requests are in line: call run() for them first.")
        resolved = [request.for_model(self.limits) for request in requests]
        order = {self.submit(request): i for i, request in enumerate(resolved)}
        ended = sorted(self.run(), key=lambda end: order[end.request.id])
        videos = [end for end in ended if isinstance(end, Video)]
        failures = [end for end in ended if isinstance(end, Failure)]
        if failures:
            raise FailedRequests(videos, failures)
        return videos

    # -- one step, in parts ------------------------------------------------------------------------

    def _drop_cancelled(self) -> list[Failure]:
        requests = [*(sample.request for sample in self._running), *self._waiting]
        if self.should_cancel is not None:
            self._cancelled |= {request.id for request in requests if self.should_cancel(request.id)}
        dropped = [request for request in requests if request.id in self._cancelled]
        self._cancelled.clear()
        if dropped:
            gone = {request.id for request in dropped}
            self._running = [sample for sample in self._running if sample.request.id not in gone]
            self._waiting = deque(request for request in self._waiting if request.id not in gone)
        return [self._fail(request, Cancelled("cancelled by request")) for request in dropped]

    def _admit(self) -> list[Failure]:
        failures = []
        while self._waiting and self._has_room_for(self._waiting[0]):
            request = self._waiting.popleft()
            self._report(request, "text", 0)
            try:
                self._refuse_too_large(request)
                self._running.append(self._start_or_free(request).resume(self._saved.pop(request.id, None)))
            except Exception as error:
                if is_out_of_memory(error) and self._running:
                    log.warning("out of memory in the text of %s: it waits until a video is done", request.id)
                    self._waiting.appendleft(request)
                    break
                failures.append(self._fail(request, error))
        self._encode_ahead()
        return failures

    def _encode_ahead(self) -> None:
        """Where the text encoders come and go: the texts of the next in line too while they are here, one by one."""
        if self.components.residence is None or self.components.residence.here != "text":
            return
        for request in islice(self._waiting, TEXT_WINDOW):
            try:
                self._texts(request)
            except Exception as error:  # is met again, and told, when it is this request's turn
                if is_out_of_memory(error):
                    break

    def _has_room_for(self, request: VideoRequest) -> bool:
        """Whether it may join those that run; its text counts at its longest, as it is not encoded yet."""
        shapes = self._shapes_at_most(request)
        if not self.planner.admits(sum(shape.video + shape.text for shape in shapes), self._running):
            return False
        return not self._running or self.max_memory is None or self._step_bytes(shapes) <= self.max_memory

    def _refuse_too_large(self, request: VideoRequest) -> None:
        if self.max_memory is None or self._running:
            return
        need = self._step_bytes(self._shapes_at_most(request))
        if need > self.max_memory:
            raise OutOfMemory(
                f"a step of request {request.id!r} ({request.width}×{request.height}, {request.frames} frames) is "
                f"estimated to need {gibibytes(need)}, of which {gibibytes(self._held)} are held already; the memory "
                f"limit is {gibibytes(self.max_memory)}. Raise the limit, or make the video smaller or shorter."
            )

    def _step_bytes(self, joining: Sequence[BranchShape]) -> int:
        """Estimated bytes held at the peak of a step of those that run and one more."""
        c = self.components
        samples = [*(sample.shapes for sample in self._running), tuple(joining)]
        peak = step_peak_bytes(c.transformer.config, samples, c.transformer.dtype, self.isolation, device=c.device)
        return self._held + c.visiting_bytes("transformer") + self.correct_step(peak)

    def _start_or_free(self, request: VideoRequest) -> Sample:
        try:
            return self._start(request)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        ways: list[Way] = [("again after memory was freed", nullcontext)]
        if self.components.device.type != "cpu":
            ways.append(
                ("with the other networks moved to the CPU", lambda: self.components.elsewhere("transformer", "vae"))
            )
            ways.append(("on the CPU", lambda: self.components.elsewhere("text")))
        return self._first_that_fits(request, "the text", ways, lambda: self._start(request))

    @torch.no_grad()
    def _start(self, request: VideoRequest) -> Sample:
        c = self.components
        started = time.perf_counter()
        conditional, unconditional = self._texts(request)
        shift = c.flow_shift if request.flow_shift is None else request.flow_shift
        dtype = c.transformer.dtype
        return Sample(
            request=request,
            latents=draw_noise(request.seed, self._latent_shape(request)).to(c.device),
            schedule=flow.schedule(cast(int, request.steps), shift, c.device),
            conditional=conditional,
            unconditional=unconditional,
            guidance=torch.tensor(request.guidance, dtype=dtype, device=c.device) * 1000.0,
            shapes=tuple(
                BranchShape(*self._grid(request), len(text.text))
                for text in (conditional, unconditional)
                if text is not None
            ),
            rules=None if request.attention_rule is None else rule_named(request.attention_rule, self._heads),
            text_seconds=time.perf_counter() - started,
        )

    def _velocities(self, samples: list[Sample]) -> list[list[Tensor] | Exception]:
        """The velocities of each sample's branches, or what went wrong for it alone.

        Nothing is written into a sample here, so a step that failed is simply tried again in halves, until the sample
        that cannot be computed stands alone.
        """
        return [outcome for group in self.planner.groups(samples) for outcome in self._velocities_of(group)]

    def _velocities_of(self, samples: list[Sample]) -> list[list[Tensor] | Exception]:
        try:
            return [*self._forward(samples)]
        except Exception as error:
            ran_out = is_out_of_memory(error)
            if len(samples) == 1 and not ran_out:
                return [error]
        free_memory()  # outside of the handler, whose traceback held the failed step's activations
        if len(samples) == 1:
            return [self._velocities_alone(samples[0])]
        halves = self.planner.halves(samples)
        if ran_out:
            self.planner.limit_forward(halves)
            log.warning("out of memory in a step of %d videos: it is done in parts", len(samples))
        return [outcome for half in halves for outcome in self._velocities_of(half)]

    def _velocities_alone(self, sample: Sample) -> list[Tensor] | Exception:
        """Of a sample that ran out of memory in a step of its own."""
        others = "the text encoders and the VAE moved to the CPU"
        ways: list[Way] = [("again after memory was freed", nullcontext)]
        if self.components.device.type != "cpu":
            ways.append((f"with {others}", lambda: self.components.elsewhere("text", "vae")))
            if self.components.offload != "block":
                ways.append(("with weights that come block by block", self.components.block_by_block))
        try:
            return self._first_that_fits(sample.request, "a step", ways, lambda: self._forward([sample])[0])
        except Exception as error:
            return error

    def _first_that_fits(
        self, request: VideoRequest, phase: str, ways: Sequence[Way], work: Callable[[], Result]
    ) -> Result:
        """The result of `work`, tried in one way after the other for as long as memory runs out."""
        self._wait_for_decoder()
        for way, entered in ways:
            log.warning("out of memory in %s of %s: tried %s", phase, request.id, way)
            try:
                with entered():
                    return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                told = str(error).splitlines()[0] if str(error) else type(error).__name__
            free_memory()
        there = gibibytes(device_memory_bytes(self.components.device))
        raise OutOfMemory(
            f"{phase} of request {request.id!r} ({request.width}×{request.height}, {request.frames} frames) runs out "
            f"of memory even alone: {told}. {self.components.device} has {there} in all. Make it smaller or shorter, "
            "use a dtype of fewer bytes, or a device with more memory."
        )

    @torch.no_grad()
    def _forward(self, samples: list[Sample]) -> list[list[Tensor]]:
        packs = self.planner.packs(samples, self.isolation)
        branches = [[sample.branches() for sample in pack] for pack in packs]
        velocities = self.components.transformer(packs=[[b for sample in pack for b in sample] for pack in branches])
        flat = iter(velocity for pack in velocities for velocity in pack)
        return [[next(flat) for _ in sample] for pack in branches for sample in pack]

    @torch.no_grad()
    def _advance(self, velocities: list[list[Tensor] | Exception], started: float) -> list[Video | Failure]:
        ended: list[Video | Failure] = []
        stepped: list[tuple[Sample, Tensor]] = []
        for sample, outcome in zip(self._running, velocities, strict=True):
            if isinstance(outcome, Exception):
                ended.append(self._fail(sample.request, outcome))
            else:
                velocity = flow.guide(outcome, sample.request.true_cfg)
                stepped.append((sample, flow.euler_step(sample.latents, velocity, sample.schedule, sample.step)))
        finite = _all_finite([latents for _, latents in stepped])
        seconds = time.perf_counter() - started
        ids = {sample.request.id for sample, _ in stepped}

        self._running = []
        for (sample, latents), is_finite in zip(stepped, finite, strict=True):
            if not is_finite:
                ended.append(self._fail(sample.request, _not_finite(sample)))
                continue
            sample.latents, sample.step = latents, sample.step + 1
            sample.seconds += seconds
            sample.batch_mates |= ids - {sample.request.id}
            sample.largest_batch = max(sample.largest_batch, len(ids))
            self._report(sample.request, "denoise", sample.step, seconds, len(ids))
            if sample.done and self.decode_beside and self.max_memory is None and self.components.offload == "none":
                self._start_decoding(sample)
            elif sample.done:
                ended.append(self._finish(sample))
            else:
                self._running.append(sample)
        return ended

    def _finish(self, sample: Sample) -> Video | Failure:
        self._report(sample.request, "decode", sample.step)
        started = time.perf_counter()
        try:
            frames = self._decode(sample)
        except Exception as error:
            return self._fail(sample.request, error)
        return self._video(sample, frames, time.perf_counter() - started)

    def _video(self, sample: Sample, frames: Tensor, seconds: float) -> Video:
        video = Video(
            request=sample.request,
            frames=(frames * 255).round().to(torch.uint8).numpy(),
            provenance={
                **self.info,
                "seconds": {"text": sample.text_seconds, "denoise": sample.seconds, "decode": seconds},
                "vae_tiles": sample.tiles or self.components.decoder.tiles(tuple(sample.latents.shape)),
                "batch": {"largest": sample.largest_batch, "mates": sorted(sample.batch_mates)},
            },
            latents=sample.latents.cpu() if self.keep_latents else None,
        )
        self._ids.discard(sample.request.id)
        self._report(sample.request, "done", sample.step)
        return video

    def _start_decoding(self, sample: Sample) -> None:
        """Beside the next steps, in the decoder's thread, and on a GPU in a stream of its own."""
        self._report(sample.request, "decode", sample.step)
        device = self.components.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # until the latents are written
        self._decoding.append((sample, self._decoder_thread.submit(self._decode_there, sample, stream)))

    def _decode_there(self, sample: Sample, stream: torch.cuda.Stream | None) -> Decoded:
        started = time.perf_counter()
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            frames = self.components.decoder.decode(sample.latents)
        return frames, time.perf_counter() - started

    def _decoded(self, leave: int) -> Iterator[Video | Failure]:
        """What the decoder's thread is through with; waits for it only while more than `leave` are open."""
        while self._decoding and (self._decoding[0][1].done() or len(self._decoding) > leave):
            sample, future = self._decoding.popleft()
            try:
                frames, seconds = future.result()
            except Exception as error:
                yield self._finish(sample) if is_out_of_memory(error) else self._fail(sample.request, error)
            else:
                yield self._video(sample, frames, seconds)

    def _wait_for_decoder(self) -> None:
        """Before networks are moved or changed, which its thread may be using."""
        wait([future for _, future in self._decoding])

    def _decode(self, sample: Sample) -> Tensor:
        decoder = self.components.decoder
        try:
            return decoder.decode(sample.latents)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        ways: list[Way] = [("again after memory was freed", nullcontext)]
        ways += [(f"in VAE tiles of {size} pixels", partial(self._in_tiles, sample, size)) for size in SMALLER_TILES]
        if self.components.device.type != "cpu":
            ways.append(
                ("with the other networks moved to the CPU", lambda: self.components.elsewhere("text", "transformer"))
            )
            ways.append(("on the CPU", lambda: self.components.elsewhere("vae")))
        return self._first_that_fits(sample.request, "decoding", ways, lambda: decoder.decode(sample.latents))

    @contextmanager
    def _in_tiles(self, sample: Sample, pixels: int) -> Iterator[None]:
        with self.components.decoder.in_tiles_of(pixels):
            yield
        sample.tiles = pixels

    # -- small parts -------------------------------------------------------------------------------

    @torch.no_grad()
    def _texts(self, request: VideoRequest) -> tuple[Conditioning, Conditioning | None]:
        """Its prompt's and, with classifier-free guidance, its negative prompt's."""
        conditional = self._encode(request.prompt, request.prompt_2)
        return conditional, self._encode(cast(str, request.negative_prompt), None) if request.uses_cfg else None

    def _encode(self, prompt: str, prompt_2: str | None) -> Conditioning:
        found = self.components.text.encode(prompt, prompt_2)
        to = {"device": self.components.device, "dtype": self.components.transformer.dtype}
        return replace(found, text=found.text.to(**to), pooled=found.pooled.to(**to))

    @property
    def _heads(self) -> int:
        return cast(int, self.components.transformer.config.num_attention_heads)

    def _latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int]:
        config, vae = self.components.transformer.config, self.components.decoder.vae
        frames, height, width = (cast(int, size) for size in (request.frames, request.height, request.width))
        space, time_ = vae.spatial_compression_ratio, vae.temporal_compression_ratio
        return config.in_channels, (frames - 1) // time_ + 1, height // space, width // space

    def _grid(self, request: VideoRequest) -> tuple[int, int, int]:
        """Patches along frame, row and column."""
        config = self.components.transformer.config
        _, frames, height, width = self._latent_shape(request)
        return frames // config.patch_size_t, height // config.patch_size, width // config.patch_size

    def _shapes_at_most(self, request: VideoRequest) -> list[BranchShape]:
        """Of its branches, with the most text that they can have."""
        return [BranchShape(*self._grid(request), self.components.text.max_tokens)] * (2 if request.uses_cfg else 1)

    def _fail(self, request: VideoRequest, error: Exception) -> Failure:
        self._ids.discard(request.id)
        self._saved.pop(request.id, None)
        cancelled = isinstance(error, Cancelled)
        self._report(request, "cancelled" if cancelled else "failed", 0)
        return Failure(request, error, cancelled)

    def _report(
        self, request: VideoRequest, phase: Phase, step: int, seconds: float | None = None, batch_size: int = 0
    ) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(request.id, phase, step, cast(int, request.steps), seconds, batch_size))


def _all_finite(tensors: list[Tensor]) -> list[bool]:
    """Whether each tensor holds numbers only; one wait for the device, whatever the number of tensors."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist() if tensors else []


def _not_finite(sample: Sample) -> ArithmeticError:
    return ArithmeticError(
        f"the latents of request {sample.request.id!r} are no longer finite after step {sample.step + 1} of "
        f"{sample.schedule.steps}. With float16 this is overflow: use --dtype bfloat16 or float32. Otherwise the "
        "model's weights or a guidance far outside what it was trained for are at fault."
    )
