"""A training run, from its config to its files. Every process of a run on many devices calls `train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelbatch.loading.hub import resolve
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.train.batches import packs_of_step, share_of
from reelbatch.train.checkpoints import CheckpointError, Checkpoints, Position, read_position
from reelbatch.train.config import TrainConfig
from reelbatch.train.dataset import make_dataset
from reelbatch.train.devices import forget_precision, is_sharded, make_accelerator
from reelbatch.train.export import write_trained
from reelbatch.train.flow_matching import Example, flow_matching_loss
from reelbatch.train.method import prepare_network, trainable
from reelbatch.train.optimizers import make_optimizer, make_schedule, set_anew
from reelbatch.train.report import Metrics, Outcome, Tally, line
from reelbatch.train.samples import VALIDATION_LEVELS, Drawn, Samples

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
        if accelerator.num_processes == 1:
            forget_precision()


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
        if config.resume is None and self.checkpoints.last is not None:
            raise CheckpointError(
                f"out={config.out}: a run with checkpoints is there; give resume: auto to go on with it, or another out"
            )
        set_seed(config.seed)
        self.model = self._load()
        self.network = self.model.family.transformer
        prepare_network(self.network, config)
        self.dtype = torch.float32 if config.method == "full" else self.network.x_embedder.proj.weight.dtype
        self.trained = trainable(self.network)
        # before the data: encoding them may take hours
        optimizer = make_optimizer(config, self.trained.values())
        self.requests = _requests(config, self.model)
        self.dataset = make_dataset(config, self.model, accelerator, tell)
        self.samples = Samples(config, self.dataset, self.model)
        self.model, self.optimizer, self.schedule = accelerator.prepare(
            self.network, optimizer, make_schedule(config, optimizer)
        )
        if is_sharded(accelerator):
            self.trained = trainable(self.model)
        self.ema: EMAModel | None = None
        if config.ema_decay is not None:
            self.ema = EMAModel(self.trained.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
            accelerator.register_for_checkpointing(self.ema)
        self._save_what_is_trained()
        made_with = {"method": config.method, "optimizer": config.optimizer, "ema": self.ema is not None}
        self.position = Position(clips=self.dataset.hash(), made_with=made_with)
        if resume is not None:
            self._go_on_from(resume)
        if accelerator.is_main_process:
            self._write_down()

    # -- what is needed before the first step ------------------------------------------------------

    def _load(self) -> Model:
        device = self.accelerator.device
        dtype = f"transformer={base_dtype(self.config)}"
        model = load(resolve(self.config.model), device, Precision.parse(dtype, device))
        model.family.transformer.set_attention_backend(self.config.attention)
        return model

    def _go_on_from(self, checkpoint: Path) -> None:
        """Raises CheckpointError if what is trained, or how, is not what the checkpoint is of."""
        found, own = read_position(checkpoint), self.position
        for name, before in found.made_with.items():
            if before != own.made_with.get(name):
                raise CheckpointError(
                    f"{checkpoint}: was made with {name}={before}; this config has {name}={own.made_with.get(name)}"
                )
        if found.clips != own.clips:
            self.tell("warning: the clips are not those of the checkpoint; what comes next is drawn from the new ones")
            found.clips = own.clips
        try:
            self.accelerator.load_state(str(checkpoint))
        except CheckpointError:
            raise
        except Exception as error:  # of any of the libraries that wrote it
            told = " ".join(str(error).split())
            raise CheckpointError(f"{checkpoint}: cannot be gone on from ({told}); resume from another one") from error
        set_anew(self.config, self.optimizer, self.schedule)
        self.position = found
        self.tell(f"resumed at step {found.step} from {checkpoint}")

    def _write_down(self) -> None:
        """The run's settings and what it could not use; only now, so that a run that is refused changes nothing."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        anew = config.model_copy(update={"resume": None})
        (config.out / "config.yaml").write_text(anew.dump(), encoding="utf-8")
        skipped = config.out / "skipped.txt"
        if self.dataset.skipped:
            skipped.write_text("\n".join(self.dataset.skipped) + "\n", encoding="utf-8")
        else:
            skipped.unlink(missing_ok=True)

    def _save_what_is_trained(self) -> None:
        """Checkpoints hold the weights that are trained: a LoRA's network does not change."""
        if is_sharded(self.accelerator):
            return

        def save(models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
            if self.accelerator.is_main_process:
                kept = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
                save_file(kept, Path(folder) / WEIGHTS_FILE)
            weights.clear()

        def restore(models: list[Any], folder: str) -> None:
            models.clear()
            kept = load_file(Path(folder) / WEIGHTS_FILE)
            shapes = [{name: tensor.shape for name, tensor in of.items()} for of in (kept, self.trained)]
            if shapes[0] != shapes[1]:
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
        tally = Tally()
        stopped, loss, held_out = False, math.nan, None
        self._put_encoders_away()
        try:
            while self.position.step < config.steps and not stopped:
                outcome = self.step(stopping)
                stopped = outcome.stop
                tally.add(outcome)
                step, last = self.position.step, stopped or self.position.step == config.steps
                row: dict[str, Any] = {}
                left: float | None = None
                if step % config.log_every == 0 or last:
                    row = tally.row(step, self.schedule.get_last_lr()[0])
                    loss, left = row["loss"], tally.seconds_left(config.steps - step)
                    tally = Tally()
                if self.dataset.held_out and (_due(step, config.validate_every) or last):
                    held_out = self.validation_loss()
                    row |= {"step": step, "validation_loss": held_out}
                if row:
                    self.tell(line(row, config.steps, left))
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
        return Trained(config.out, weights, self.position.step, stopped, loss, held_out, list(self.dataset.skipped))

    def step(self, stopping: Callable[[], bool] = lambda: False) -> Outcome:
        """One optimizer step: the packs of all devices, of which this process computes its share.

        Raises:
            TrainingError: if the loss or the gradient is not finite; the weights are then as before.
        """
        started = time.perf_counter()
        devices = self.accelerator.num_processes
        packs = packs_of_step(self.position.sample, self.config.accumulate * devices, self.samples.pack)
        numbers = [number for pack in packs for number in pack]
        loss, stop = self._backward(packs, numbers, stopping)
        norm = self._update(numbers)
        seconds = time.perf_counter() - started
        self.position.step += 1
        self.position.sample = packs[-1].stop
        self.position.seconds += seconds
        tokens = sum(self.samples.of(number).tokens for number in numbers)
        return Outcome(loss, norm, len(numbers), tokens, seconds, stop)

    def _backward(
        self, packs: Sequence[range], numbers: Sequence[int], stopping: Callable[[], bool]
    ) -> tuple[float, bool]:
        """Gradients of all devices' packs; gives the loss, and whether any device was told to stop."""
        accelerator = self.accelerator
        devices = accelerator.num_processes
        total = sum(self.samples.weight(number) for number in numbers)
        mine = share_of(packs, accelerator.process_index, devices)
        summed, bad = torch.zeros((), dtype=torch.float64), []
        for i, pack in enumerate(mine):
            weights = torch.tensor([self.samples.weight(number) for number in pack], device=accelerator.device)
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
            raise self._not_finite("loss", bad or numbers)
        return loss / total, stop > 0

    def _update(self, numbers: Sequence[int]) -> float:
        """The optimizer's step by the gradients that are there; gives their norm before clipping."""
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        norm = float(accelerator.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm or math.inf))
        # loss scaling skips steps until it has found its scale; below 1 it is not the scale that overflows
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise self._not_finite("gradient", numbers)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.trained.values())
        self.optimizer.zero_grad()
        return norm

    def loss(self, numbers: Sequence[int]) -> Tensor:
        """The loss of these samples, `[samples]`, as one pack."""
        return self._losses([self.samples.draw(number) for number in numbers])

    def _losses(self, drawn: Sequence[Drawn]) -> Tensor:
        device = self.accelerator.device
        examples = []
        for one in drawn:
            caption = one.example.caption
            moved = type(caption)(caption.text.to(device), caption.pooled.to(device))
            examples.append(Example(one.example.latents.to(device), moved))
        return flow_matching_loss(
            self.model,
            examples,
            torch.stack([one.sigma for one in drawn]).to(device),
            torch.stack([one.guidance for one in drawn]).to(device),
            [one.noise.to(device) for one in drawn],
            self.dtype,
        )

    def _not_finite(self, what: str, numbers: Sequence[int]) -> TrainingError:
        files = sorted({str(self.samples.of(number).clip.path) for number in numbers})
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
        packs = self.samples.held_out()
        devices = self.accelerator.num_processes
        summed = torch.zeros((), device=self.accelerator.device)
        with self._resting():
            for turn in range(-(-len(packs) // devices)):  # every device as often, as sharded weights ask
                place = turn * devices + self.accelerator.process_index
                pack = packs[min(place, len(packs) - 1)]
                losses = self._losses([self.samples.draw_held_out(*one) for one in pack])
                summed += losses.sum() * float(place < len(packs))
        tries = len(self.dataset.held_out) * len(VALIDATION_LEVELS)
        return float(self.accelerator.reduce(summed, "sum")) / tries

    def sample(self) -> Path | None:
        """A contact sheet of the sample prompts, by the EMA if any; on the main process alone."""
        if is_sharded(self.accelerator):
            self.tell("no samples: the weights are spread over devices (FSDP)")
            return None
        if not self.accelerator.is_main_process:
            return None
        from reelbatch.engine.engine import Engine
        from reelbatch.video import contact_sheet

        self._away.close()
        engine = Engine(self.model, attention=self.config.attention)
        with self._resting():
            videos = engine.generate(self.requests)
        self._put_encoders_away()
        sheet = contact_sheet(videos, self.config.out / "samples" / f"step-{self.position.step:07d}.png")
        self.tell(f"samples: {sheet}")
        return sheet

    def _put_encoders_away(self) -> None:
        """Text encoders and VAE leave the GPU to the training, until samples are drawn."""
        if self.accelerator.device.type == "cuda":
            self._away.enter_context(self.model.elsewhere("text", "vae"))

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
                anywhere=self._anywhere,
            )
        except OSError as error:
            last = self.checkpoints.last
            told = f"the checkpoint of step {self.position.step} could not be saved: {error}; the last good one: {last}"
            if must:
                raise OSError(told) from error
            self.tell(f"warning: {told}. Training goes on; make room")
        else:
            self.tell(f"checkpoint: {path}")

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any device; all of them ask together."""
        told = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, "sum"))

    def write_weights(self) -> Path | None:
        """The LoRA file or the model folder, with the averaged weights if there are any; None but on the main process.

        Raises:
            OSError: if it cannot be written.
        """
        with self._resting():
            gathered = self.accelerator.get_state_dict(self.model) if is_sharded(self.accelerator) else None
            if not self.accelerator.is_main_process:
                return None
            return write_trained(self.config, self.model, gathered)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _requests(config: TrainConfig, model: Model) -> list[Any]:
    from reelbatch.jobs.prompts import Entry, make_requests, read_entries

    entries = []
    for number, prompt in enumerate(config.sample_prompts, 1):
        path = Path(prompt)
        if path.suffix.lower() in {".txt", ".jsonl", ".csv", ".tsv"}:
            entries += read_entries(path)
        else:
            entries.append(Entry(f"sample prompt {number}", {"prompt": prompt}))
    return make_requests(entries, first_seed=0, limits=model.limits)
