"""A training run, from its config to its files. Every process of a run on many devices calls `train`."""

from __future__ import annotations

import reelbatch.models  # noqa: F401  # isort: skip  # before anything of Diffusers: it imports torchao quietly

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelbatch.models.checkpoint import Components, load, resolve
from reelbatch.models.lora import save_lora
from reelbatch.models.precision import DTYPES, Precision
from reelbatch.train.batches import Order, fill, generator_of, packs_of_step, share_of
from reelbatch.train.cache import Encoded, EncodedClips
from reelbatch.train.checkpoints import CheckpointError, Checkpoints, Position, read_position
from reelbatch.train.config import ConfigError, TrainConfig
from reelbatch.train.data import BrokenClip, Clip, ClipRules, DataError, find_clips
from reelbatch.train.flow_matching import Example, draw_sigmas, flow_matching_loss, shift
from reelbatch.train.method import prepare_network, trainable
from reelbatch.train.optimizers import make_optimizer, make_schedule
from reelbatch.train.report import Metrics

LORA_FILE = "lora.safetensors"
DEFAULT_BATCH_SIZE = 4
VALIDATION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels at which every held-out clip is tried, each with noise of its own that is the same in every run."""
WEIGHTS_FILE = "trained.safetensors"

Tell = Callable[[str], None]


class TrainingError(RuntimeError):
    """A run that cannot go on: the step, what was in it, and where to go on from."""


@dataclass
class Trained:
    """How a run ended.

    Attributes:
        out: its folder. weights: the LoRA file, or the model folder.
        steps: how far it came. stopped: whether it was told to stop before the end.
        skipped: files that could not be used, with the reason.
    """

    out: Path
    weights: Path | None
    steps: int
    stopped: bool
    loss: float
    validation_loss: float | None = None
    skipped: list[str] = field(default_factory=list)


def train(config: TrainConfig, tell: Tell = lambda text: None, stopping: Callable[[], bool] = lambda: False) -> Trained:
    """Trains, and writes the run's folder: config.yaml, metrics.csv, loss.png, samples/, checkpoints/, the weights.

    Args:
        tell: gets lines for people.
        stopping: asked after every step; True ends the run with a checkpoint.

    Raises:
        ConfigError, DataError, CheckpointError, ModelFolderError: before anything is trained.
        TrainingError: if the loss or the gradient is not finite.
        OSError: if the last checkpoint or the weights cannot be written.
    """
    accelerator = make_accelerator(config)
    try:
        return Run(config, accelerator, tell if accelerator.is_main_process else lambda text: None).go(stopping)
    finally:
        if accelerator.num_processes == 1:  # so that the next run of this process may choose another precision
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def make_accelerator(config: TrainConfig) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=config.device == "cpu", step_scheduler_with_optimizer=False
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate leaves fp16 out on the CPU without a word; PyTorch has both parts of it there
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def base_dtype(config: TrainConfig) -> str:
    """What the transformer is loaded in: fp32 where its weights are trained."""
    if config.method == "full":
        return "float32"
    if config.base_dtype != "auto":
        return config.base_dtype
    return {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.mixed_precision]


class Run:
    """One training run on one process."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, tell: Tell) -> None:
        self.config, self.accelerator, self.tell = config, accelerator, tell
        self._away = ExitStack()
        self.checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
        resume = None if config.resume is None else self.checkpoints.find(config.resume)
        if resume is None and config.resume is None and self.checkpoints.last is not None:
            raise CheckpointError(
                f"out={config.out}: a run with checkpoints is there; give resume: auto to go on with it, or another out"
            )
        set_seed(config.seed)
        self.components = self._load()
        self.network = self.components.transformer
        prepare_network(self.network, config)
        self.dtype = torch.float32 if config.method == "full" else self.network.x_embedder.proj.weight.dtype
        self.trained = trainable(self.network)
        optimizer = make_optimizer(config, self.trained.values())  # before the data: encoding them may take hours
        self.rules = self._rules()
        self._find_data()

        self.model, self.optimizer, self.schedule = accelerator.prepare(
            self.network, optimizer, make_schedule(config, optimizer)
        )
        if self._sharded:
            self.trained = trainable(self.model)
        self.ema: EMAModel | None = None
        if config.ema_decay is not None and self._sharded:
            raise ConfigError("ema_decay is not there for weights that are spread over devices (FSDP); leave it out")
        if config.ema_decay is not None:
            self.ema = EMAModel(self.trained.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
            accelerator.register_for_checkpointing(self.ema)
        self._save_what_is_trained()
        known = str([(one.clip.path.name, one.clip.captions, one.shape) for one in self.clips])
        clips = hashlib.sha256(known.encode()).hexdigest()[:16]
        self.position = Position(clips=clips)
        if resume is not None:
            self.position = read_position(resume)
            if self.position.clips != clips:
                tell("warning: the clips are not those of the checkpoint; what comes next is drawn from the new ones")
                self.position.clips = clips
            accelerator.load_state(str(resume))
            tell(f"resumed at step {self.position.step} from {resume}")

    # -- what is needed before the first step ------------------------------------------------------

    def _load(self) -> Components:
        device = self.accelerator.device
        dtype = f"transformer={base_dtype(self.config)}"
        components = load(resolve(self.config.model), device, Precision.parse(dtype, device))
        components.transformer.set_attention_backend(self.config.attention)
        return components

    def _rules(self) -> ClipRules:
        config, limits = self.config, self.components.limits
        d = limits.defaults
        return ClipRules(
            fps=config.fps or d.fps,
            max_frames=config.max_frames or d.frames,
            max_pixels=config.max_pixels or d.height * d.width,
            spatial_stride=limits.spatial_stride,
            temporal_stride=limits.temporal_stride,
        )

    def _find_data(self) -> None:
        """Encodes what is not in the cache, a share of it on each device, and finds out what can be used."""
        config, accelerator = self.config, self.accelerator
        train, held_out = find_clips(config.data), find_clips(config.validation) if config.validation else []
        if config.validation_share:
            order = torch.randperm(len(train), generator=generator_of(config.seed, 0, 2)).tolist()
            apart = set(order[: max(1, round(config.validation_share * len(train)))])
            held_out += [clip for i, clip in enumerate(train) if i in apart]
            train = [clip for i, clip in enumerate(train) if i not in apart]
        self.encoded = EncodedClips(config.cache or _cache_folder(), self.components, self.rules)
        clips = train + held_out
        rank, devices = accelerator.process_index, accelerator.num_processes
        mine: list[tuple[int, tuple[int, ...], int] | tuple[int, str]] = []
        for count, i in enumerate(range(rank, len(clips), devices), 1):
            try:
                shape = tuple(self.encoded.latents(clips[i]).shape)
            except BrokenClip as error:
                mine.append((i, str(error)))
                continue
            mine.append((i, shape, max(len(self.encoded.caption(caption).text) for caption in clips[i].captions)))
            if count % 100 == 0:
                self.tell(f"{count * devices} of {len(clips)} clips are encoded")
        self.encoded.caption("")  # for those whose caption is dropped
        found = sorted(gather_object(mine) if devices > 1 else mine)
        self.skipped = [str(entry[1]) for entry in found if len(entry) == 2]
        usable = {entry[0]: self._known(clips[entry[0]], entry[1], entry[2]) for entry in found if len(entry) == 3}
        self.clips = [usable[i] for i in range(len(train)) if i in usable]
        self.held_out = [usable[i] for i in range(len(train), len(clips)) if i in usable]
        if not self.clips:
            raise DataError(["none of the files can be used:", *self.skipped])
        if accelerator.is_main_process:
            self._write_down(clips)
        self.order = Order(len(self.clips), config.seed)
        self.tell(
            f"{len(self.clips)} clips to train on, {len(self.held_out)} held out, {len(self.skipped)} skipped; "
            f"{self.encoded.made} newly encoded"
        )

    def _known(self, clip: Clip, shape: tuple[int, ...], text: int) -> Encoded:
        network = self.components.transformer.config
        _, frames, height, width = shape
        video = frames // network.patch_size_t * (height // network.patch_size) * (width // network.patch_size)
        return Encoded(clip, shape, video, text)

    def _write_down(self, clips: Sequence[Clip]) -> None:
        self.config.out.mkdir(parents=True, exist_ok=True)
        (self.config.out / "config.yaml").write_text(self.config.dump(), encoding="utf-8")
        if self.skipped:
            self.tell(f"{len(self.skipped)} of {len(clips)} files cannot be used (skipped.txt lists them):")
            for line in self.skipped[:5]:
                self.tell(f"  {line}")
            (self.config.out / "skipped.txt").write_text("\n".join(self.skipped) + "\n", encoding="utf-8")

    @property
    def _sharded(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    def _save_what_is_trained(self) -> None:
        """Checkpoints hold the weights that are trained: a LoRA's network does not change."""
        if self._sharded:
            return

        def save(models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
            if self.accelerator.is_main_process:
                kept = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
                save_file(kept, Path(folder) / WEIGHTS_FILE)
            weights.clear()

        def restore(models: list[Any], folder: str) -> None:
            models.clear()
            kept = load_file(Path(folder) / WEIGHTS_FILE)
            if kept.keys() != self.trained.keys():
                raise CheckpointError(
                    f"{folder}: holds other weights than this config trains; resume with its config.yaml"
                )
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(kept[name])

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(restore)

    # -- the loop ----------------------------------------------------------------------------------

    def go(self, stopping: Callable[[], bool]) -> Trained:
        config, main = self.config, self.accelerator.is_main_process
        metrics = Metrics(config.out, self.position.step) if main else None
        tally = _Tally()
        stopped, loss, held_out = False, math.nan, None
        self._put_encoders_away()
        try:
            while self.position.step < config.steps and not stopped:
                outcome = self.step(stopping)
                stopped = outcome.stop
                tally.add(outcome)
                step, last = self.position.step, stopped or self.position.step == config.steps
                row: dict[str, Any] = {}
                if step % config.log_every == 0 or last:
                    row = tally.row(step, self.schedule.get_last_lr()[0])
                    loss = row["loss"]
                    tally = _Tally()
                if self.held_out and (_due(step, config.validate_every) or last):
                    held_out = self.validation_loss()
                    row |= {"step": step, "validation_loss": held_out}
                if row:
                    self.tell(" ".join(f"{name} {value:.4g}" for name, value in row.items() if value != ""))
                    if metrics is not None:
                        metrics.add(row)
                if _due(step, config.sample_every) or (last and config.sample_prompts):
                    self.sample()
                if _due(step, config.save_every) or last:
                    self._checkpoint(must=last)
        finally:
            self._away.close()
            if metrics is not None:
                metrics.close()
        weights = self.write_weights()
        self.accelerator.wait_for_everyone()
        return Trained(config.out, weights, self.position.step, stopped, loss, held_out, self.skipped)

    def step(self, stopping: Callable[[], bool] = lambda: False) -> Outcome:
        """One optimizer step: the packs of all devices, of which this process computes its share.

        Raises:
            TrainingError: if the loss or the gradient is not finite; the weights are then as before.
        """
        config, accelerator = self.config, self.accelerator
        started = time.perf_counter()
        devices = accelerator.num_processes
        packs = packs_of_step(self.position.sample, config.accumulate * devices, self._pack)
        total = sum(self._weight(number) for pack in packs for number in pack)
        mine = share_of(packs, accelerator.process_index, devices)
        summed, bad = torch.zeros((), dtype=torch.float64), []
        for i, pack in enumerate(mine):
            weights = torch.tensor([self._weight(number) for number in pack], device=accelerator.device)
            with accelerator.no_sync(self.model) if i + 1 < len(mine) else nullcontext():
                losses = self.loss(pack)
                # gradients are averaged over devices, and each holds its share of the sum
                accelerator.backward((losses * weights).sum() * (devices / total))
            detached = losses.detach()
            summed += (detached * weights).sum().double().cpu()
            bad += [number for number, value in zip(pack, detached, strict=True) if not value.isfinite()]
        told = torch.tensor([float(summed), float(stopping()), float(len(bad))], device=accelerator.device)
        loss, stop, failed = accelerator.reduce(told, "sum").tolist()
        if failed or not math.isfinite(loss):
            raise self._not_finite("loss", bad or [number for pack in packs for number in pack])
        limit = config.max_grad_norm or math.inf
        norm = float(accelerator.clip_grad_norm_(self.trained.values(), limit))
        if accelerator.scaler is None and not math.isfinite(norm):
            raise self._not_finite("gradient", [number for pack in packs for number in pack])
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # as loss scaling does until it has found its scale
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.trained.values())
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        self.position.step += 1
        self.position.sample = packs[-1].stop
        self.position.seconds += seconds
        samples = sum(len(pack) for pack in packs)
        tokens = sum(self._of(number).tokens for pack in packs for number in pack)
        return Outcome(loss / total, norm, samples, tokens, seconds, stop > 0)

    def loss(self, numbers: Sequence[int]) -> Tensor:
        """The loss of these samples, as one pack."""
        drawn = [self.draw(number) for number in numbers]
        return self._losses(
            [one.example for one in drawn],
            torch.stack([one.sigma for one in drawn]),
            torch.stack([one.guidance for one in drawn]),
            [one.noise for one in drawn],
        )

    def _losses(self, examples: Sequence[Example], sigmas: Tensor, guidance: Tensor, noise: Sequence[Tensor]) -> Tensor:
        device = self.accelerator.device
        moved = [
            Example(
                one.latents.to(device),
                type(one.caption)(one.caption.text.to(device), one.caption.pooled.to(device)),
            )
            for one in examples
        ]
        return flow_matching_loss(
            self.model, moved, sigmas.to(device), guidance.to(device), [n.to(device) for n in noise], self.dtype
        )

    def draw(self, number: int) -> Drawn:
        """Sample `number` of the run: always the same, whoever shares its pack."""
        config, known = self.config, self._of(number)
        generator = generator_of(config.seed, number)
        dropped = torch.rand((), generator=generator).item() < config.caption_dropout
        wording = int(torch.randint(len(known.clip.captions), (), generator=generator))
        sigma = draw_sigmas(
            1,
            generator,
            logit_normal=config.timesteps == "logit-normal",
            mean=config.logit_mean,
            std=config.logit_std,
        )[0]
        high = config.guidance if config.guidance_max is None else config.guidance_max
        guidance = config.guidance + (high - config.guidance) * torch.rand((), generator=generator)
        caption = self.encoded.caption("" if dropped else known.clip.captions[wording])
        latents = self.encoded.latents(known.clip)
        noise = torch.randn(latents.shape, generator=generator)
        return Drawn(Example(latents, caption), shift(sigma, self._shift(known)), guidance, noise)

    def _shift(self, known: Encoded) -> float:
        by = self.components.flow_shift if self.config.flow_shift is None else self.config.flow_shift
        if not self.config.shift_by_size:
            return by
        limits = self.components.limits
        d, s = limits.defaults, limits.spatial_stride
        own = ((d.frames - 1) // limits.temporal_stride + 1) * (d.height // s) * (d.width // s)
        return by * math.sqrt(known.video_tokens / own)

    def _of(self, number: int) -> Encoded:
        return self.clips[self.order(number)]

    def _weight(self, number: int) -> float:
        return float(self._of(number).video_tokens) if self.config.weigh == "tokens" else 1.0

    def _pack(self, first: int) -> range:
        size = self.config.batch_size
        if size is None and self.config.batch_tokens is None:
            size = DEFAULT_BATCH_SIZE
        return fill(first, lambda number: self._of(number).tokens, self.config.batch_tokens, size)

    def _not_finite(self, what: str, numbers: Sequence[int]) -> TrainingError:
        files = sorted({str(self._of(number).clip.path) for number in numbers})
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        last = self.checkpoints.last
        back = f"the last good checkpoint is {last} (resume: {last})" if last else "there is no checkpoint yet"
        return TrainingError(
            f"the {what} of step {self.position.step + 1} is not finite; in the batch: {shown}; {back}. Look at these "
            "files, lower the learning rate, or train in bf16 or fp32"
        )

    # -- looking at it -----------------------------------------------------------------------------

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of the held-out clips over `VALIDATION_LEVELS`, each with its fixed noise, by the EMA if any."""
        tries = [(clip, level) for clip in range(len(self.held_out)) for level in range(len(VALIDATION_LEVELS))]
        size = self.config.batch_size or (None if self.config.batch_tokens else DEFAULT_BATCH_SIZE)
        packs: list[range] = []
        while not packs or packs[-1].stop < len(tries):
            first = packs[-1].stop if packs else 0
            found = fill(
                first,
                lambda i: self.held_out[tries[i][0]].tokens if i < len(tries) else 2**62,
                self.config.batch_tokens or 2**61,
                size,
            )
            packs.append(found)
        devices = self.accelerator.num_processes
        summed = torch.zeros((), device=self.accelerator.device)
        with self._resting():
            for turn in range(-(-len(packs) // devices)):  # every device as often, as sharded weights ask
                place = turn * devices + self.accelerator.process_index
                pack = packs[min(place, len(packs) - 1)]
                drawn = [self._fixed(*tries[i]) for i in pack]
                losses = self._losses(
                    [one.example for one in drawn],
                    torch.stack([one.sigma for one in drawn]),
                    torch.stack([one.guidance for one in drawn]),
                    [one.noise for one in drawn],
                )
                summed += losses.sum() * float(place < len(packs))
        return float(self.accelerator.reduce(summed, "sum")) / len(tries)

    def _fixed(self, clip: int, level: int) -> Drawn:
        known = self.held_out[clip]
        latents = self.encoded.latents(known.clip)
        noise = torch.randn(latents.shape, generator=generator_of(0, clip, level, 3))
        example = Example(latents, self.encoded.caption(known.clip.captions[0]))
        return Drawn(example, torch.tensor(VALIDATION_LEVELS[level]), torch.tensor(self.config.guidance), noise)

    def sample(self) -> Path | None:
        """A contact sheet of the sample prompts, by the EMA if any; on the main process alone."""
        if self._sharded:
            self.tell("no samples: the weights are spread over devices (FSDP)")
            return None
        if not self.accelerator.is_main_process:
            return None
        from reelbatch.engine.engine import Engine
        from reelbatch.video import contact_sheet

        self._away.close()
        engine = Engine(self.components, attention=self.config.attention)
        with self._resting():
            videos = engine.generate(_requests(self.config, self.components))
        self._put_encoders_away()
        sheet = contact_sheet(videos, self.config.out / "samples" / f"step-{self.position.step:07d}.png")
        self.tell(f"samples: {sheet}")
        return sheet

    def _put_encoders_away(self) -> None:
        """Text encoders and VAE leave the GPU to the training, until samples are drawn."""
        if self.accelerator.device.type == "cuda":
            self._away.enter_context(self.components.elsewhere("text", "vae"))

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """While entered, the network is as it is used: in evaluation, with averaged weights."""
        parameters = list(self.trained.values())
        self.network.eval()
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(parameters)
            self.network.train()

    # -- what stays --------------------------------------------------------------------------------

    def _checkpoint(self, must: bool) -> None:
        accelerator = self.accelerator
        try:
            path = self.checkpoints.save(
                self.position,
                lambda folder: accelerator.save_state(str(folder)),
                main=accelerator.is_main_process,
                wait=accelerator.wait_for_everyone,
            )
        except OSError as error:
            last = self.checkpoints.last
            told = f"the checkpoint of step {self.position.step} could not be saved: {error}; the last good one: {last}"
            if must:
                raise OSError(told) from error
            self.tell(f"warning: {told}. Training goes on; make room")
        else:
            self.tell(f"checkpoint: {path}")

    def write_weights(self) -> Path | None:
        """The LoRA file or the model folder, with the averaged weights if there are any; None but on the main process.

        Raises:
            OSError: if it cannot be written.
        """
        with self._resting():
            gathered = self.accelerator.get_state_dict(self.model) if self._sharded else None
            if not self.accelerator.is_main_process:
                return None
            if self.config.method == "lora":
                path = self.config.out / LORA_FILE
                part = self.config.out / f".{LORA_FILE}"
                save_lora(self.network, part, dtype=DTYPES[self.config.save_dtype], state=gathered)
                part.replace(path)
                return path
            return write_model(self.components, self.config.out / "model", DTYPES[self.config.save_dtype], gathered)


@dataclass(frozen=True)
class Drawn:
    """One sample of a step: a clip with its caption, and all that was drawn for it."""

    example: Example
    sigma: Tensor
    guidance: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Outcome:
    """One step of all devices together. `gradient_norm` is that before clipping."""

    loss: float
    gradient_norm: float
    samples: int
    tokens: int
    seconds: float
    stop: bool


@dataclass
class _Tally:
    """What came of the steps since the last row."""

    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def row(self, step: int, learning_rate: float) -> dict[str, Any]:
        found = self.outcomes
        seconds = sum(one.seconds for one in found)
        samples = sum(one.samples for one in found)
        return {
            "step": step,
            "samples": samples,
            "tokens": sum(one.tokens for one in found),
            "loss": sum(one.loss for one in found) / len(found),
            "learning_rate": learning_rate,
            "gradient_norm": sum(one.gradient_norm for one in found) / len(found),
            "seconds": seconds,
            "samples_per_second": samples / seconds,
        }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _cache_folder() -> Path:
    from reelbatch.tune.profiles import cache_folder

    return cache_folder() / "encoded"


def _requests(config: TrainConfig, components: Components) -> list[Any]:
    from reelbatch.jobs.prompts import Entry, make_requests, read_entries

    entries = []
    for number, prompt in enumerate(config.sample_prompts, 1):
        path = Path(prompt)
        if path.suffix.lower() in {".txt", ".jsonl", ".csv", ".tsv"}:
            entries += read_entries(path)
        else:
            entries.append(Entry(f"sample prompt {number}", {"prompt": prompt}))
    return make_requests(entries, first_seed=0, limits=components.limits)


def write_model(
    components: Components, folder: Path, dtype: torch.dtype, state: dict[str, Tensor] | None = None
) -> Path:
    """A whole model folder in the Diffusers layout with this transformer; what did not change is linked, or copied.

    Args:
        state: the transformer's weights, where they are not in it (spread over devices).
    """
    from reelbatch.models.hunyuan_video import HunyuanVideoTransformer3DModel

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for source in sorted(components.folder.rglob("*")):
        inside = source.relative_to(components.folder)
        if source.is_file() and inside.parts[0] != "transformer" and not inside.name.startswith("."):
            (part / inside).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), part / inside)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, part / inside)
    written = HunyuanVideoTransformer3DModel.from_config(components.transformer.config)
    written.load_state_dict(components.transformer.state_dict() if state is None else state)
    written.to(dtype).save_pretrained(part / "transformer")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder
