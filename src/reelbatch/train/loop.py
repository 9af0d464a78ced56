"""A training run, from its config to its files. Every process of a run on many devices calls `train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from reelbatch.train.base_model import load_base
from reelbatch.train.batches import packs_of_step, share_of
from reelbatch.train.checkpoints import CheckpointError, Checkpoints, Position, read_position
from reelbatch.train.config import TrainConfig
from reelbatch.train.dataset import make_dataset
from reelbatch.train.devices import forget_precision, is_sharded, make_accelerator
from reelbatch.train.export import write_trained
from reelbatch.train.flow_matching import flow_matching_loss
from reelbatch.train.method import prepare_network, trainable
from reelbatch.train.optimizers import apply_settings, make_optimizer, make_schedule
from reelbatch.train.report import Metrics, Outcome, Tally, line
from reelbatch.train.samples import VALIDATION_LEVELS, Drawn, Samples
from reelbatch.train.state import RunState
from reelbatch.train.weights import TrainedWeights

if TYPE_CHECKING:
    from reelbatch.request import VideoRequest

Log = Callable[[str], None]


class TrainingError(RuntimeError):
    """A run that cannot go on: the step, what was in it, and where to go on from."""


@dataclass
class Trained:
    """How a run ended.

    Attributes:
        out: its folder. weights: the LoRA file, or the model folder.
        steps: how far it came. stopped: whether it was asked to stop before the end.
        skipped: files that could not be used, with the reason.
    """

    out: Path
    weights: Path | None
    steps: int
    stopped: bool
    loss: float
    validation_loss: float | None = None
    skipped: list[str] = field(default_factory=list)


def train(
    config: TrainConfig, log: Log = lambda text: None, should_stop: Callable[[], bool] = lambda: False
) -> Trained:
    """Trains, and writes the run's folder: config.yaml, metrics.csv, loss.png, samples/, checkpoints/, the weights.

    Args:
        log: gets lines for people.
        should_stop: asked after every step; True ends the run with a checkpoint.

    Raises:
        ConfigError, DataError, CheckpointError, ModelFolderError: before anything is trained.
        TrainingError: if the loss or the gradient is not finite.
        OSError: if the last checkpoint or the weights cannot be written.
    """
    accelerator = make_accelerator(config)
    try:
        return Run(config, accelerator, log if accelerator.is_main_process else lambda text: None).go(should_stop)
    finally:
        if accelerator.num_processes == 1:
            forget_precision()


class Run:
    """One training run on one process."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, log: Log) -> None:
        self.config, self.accelerator, self.log = config, accelerator, log
        self._evicted = ExitStack()
        self.checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
        resume = None if config.resume is None else self.checkpoints.find(config.resume)
        if config.resume is None and self.checkpoints.last is not None:
            raise CheckpointError(
                f"out={config.out}: a run with checkpoints is there; give resume: auto to go on with it, or another out"
            )
        set_seed(config.seed)
        self.model, self.family = load_base(config, accelerator.device)
        network = self.family.transformer
        self.dtype = torch.float32 if config.method == "full" else self.family.dtype
        prepare_network(network, config)
        # before the data: encoding them may take hours
        optimizer = make_optimizer(config, trainable(network).values())
        self.preview_requests = self._preview_requests()
        self.dataset = make_dataset(config, self.family, accelerator, log)
        self.samples = Samples(config, self.dataset, self.family)
        self.wrapped, self.optimizer, self.schedule = accelerator.prepare(
            network, optimizer, make_schedule(config, optimizer)
        )
        self.weights = TrainedWeights(self.wrapped if is_sharded(accelerator) else network, config.ema_decay)
        self.state = RunState(accelerator, self.wrapped, self.optimizer, self.schedule, self.weights)
        with_average = self.weights.average is not None
        made_with = {"method": config.method, "optimizer": config.optimizer, "ema": with_average}
        self.position = Position(clips=self.dataset.hash(), made_with=made_with)
        if resume is not None:
            self._resume(resume)
        if accelerator.is_main_process:
            self._write_config()

    # -- what is needed before the first step ------------------------------------------------------

    def _preview_requests(self) -> list[VideoRequest]:
        if not self.config.sample_prompts:
            return []
        from reelbatch.train.previews import preview_requests

        return preview_requests(self.config, self.model.limits)

    def _resume(self, checkpoint: Path) -> None:
        """Raises CheckpointError if what is trained, or how, is not what the checkpoint is of."""
        position, own = read_position(checkpoint), self.position
        for name, before in position.made_with.items():
            if before != own.made_with.get(name):
                raise CheckpointError(
                    f"{checkpoint}: was made with {name}={before}; this config has {name}={own.made_with.get(name)}"
                )
        if position.clips != own.clips:
            self.log("warning: the clips are not those of the checkpoint; what comes next is drawn from the new ones")
            position.clips = own.clips
        try:
            self.state.load(checkpoint)
        except CheckpointError:
            raise
        except Exception as error:  # of any of the libraries that wrote it
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{checkpoint}: cannot be gone on from ({reason}); resume from another one"
            ) from error
        apply_settings(self.config, self.optimizer, self.schedule)
        self.position = position
        self.log(f"resumed at step {position.step} from {checkpoint}")

    def _write_config(self) -> None:
        """The run's settings and what it could not use; only now, so that a run that is refused changes nothing."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        own = config.model_copy(update={"resume": None})
        (config.out / "config.yaml").write_text(own.dump(), encoding="utf-8")
        skipped = config.out / "skipped.txt"
        if self.dataset.skipped:
            skipped.write_text("\n".join(self.dataset.skipped) + "\n", encoding="utf-8")
        else:
            skipped.unlink(missing_ok=True)

    # -- the loop ----------------------------------------------------------------------------------

    def go(self, should_stop: Callable[[], bool]) -> Trained:
        config, main = self.config, self.accelerator.is_main_process
        metrics = Metrics(config.out, self.position.step) if main else None
        tally = Tally()
        stopped, loss, held_out = False, math.nan, None
        self._evict_encoders()
        try:
            while self.position.step < config.steps and not stopped:
                outcome = self.step(should_stop)
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
                    self.log(line(row, config.steps, left))
                    if metrics is not None:
                        metrics.add(row)
                if _due(step, config.sample_every) or (last and config.sample_prompts):
                    self.preview()
                if _due(step, config.save_every) or last:
                    self._checkpoint(must=last)
        finally:
            self._evicted.close()
            if metrics is not None:
                metrics.close()
        weights = self.write_weights()
        self.accelerator.wait_for_everyone()
        return Trained(config.out, weights, self.position.step, stopped, loss, held_out, list(self.dataset.skipped))

    def step(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """One optimizer step: the packs of all devices, of which this process computes its share.

        Raises:
            TrainingError: if the loss or the gradient is not finite; the weights are then as before.
        """
        started = time.perf_counter()
        devices = self.accelerator.num_processes
        packs = packs_of_step(self.position.sample, self.config.accumulate * devices, self.samples.pack)
        numbers = [number for pack in packs for number in pack]
        loss, stop = self._backward(packs, numbers, should_stop)
        norm = self._update(numbers)
        seconds = time.perf_counter() - started
        self.position.step += 1
        self.position.sample = packs[-1].stop
        self.position.seconds += seconds
        tokens = sum(self.samples.of(number).tokens for number in numbers)
        return Outcome(loss, norm, len(numbers), tokens, seconds, stop)

    def _backward(
        self, packs: Sequence[range], numbers: Sequence[int], should_stop: Callable[[], bool]
    ) -> tuple[float, bool]:
        """Gradients of all devices' packs; gives the loss, and whether any device was asked to stop."""
        accelerator = self.accelerator
        devices = accelerator.num_processes
        total = sum(self.samples.weight(number) for number in numbers)
        mine = share_of(packs, accelerator.process_index, devices)
        summed, bad = torch.zeros((), dtype=torch.float64), []
        for i, pack in enumerate(mine):
            weights = torch.tensor([self.samples.weight(number) for number in pack], device=accelerator.device)
            with accelerator.no_sync(self.wrapped) if i + 1 < len(mine) else nullcontext():
                losses = self.loss(pack)
                # gradients are averaged over devices, and each holds its share of the sum
                accelerator.backward((losses * weights).sum() * (devices / total))
            detached = losses.detach()
            summed += (detached * weights).sum().double().cpu()
            bad += [number for number, value in zip(pack, detached, strict=True) if not value.isfinite()]
        sums = torch.tensor([float(summed), float(should_stop()), float(len(bad))], device=accelerator.device)
        loss, stop, failed = accelerator.reduce(sums, "sum").tolist()
        if failed or not math.isfinite(loss):
            raise self._not_finite("loss", bad or numbers)
        return loss / total, stop > 0

    def _update(self, numbers: Sequence[int]) -> float:
        """The optimizer's step by the gradients that are there; gives their norm before clipping."""
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        norm = float(
            accelerator.clip_grad_norm_(self.weights.parameters.values(), self.config.max_grad_norm or math.inf)
        )
        # loss scaling skips steps until its scale fits; below 1 it is not the scale that overflows
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise self._not_finite("gradient", numbers)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            self.weights.update_average()
        self.optimizer.zero_grad()
        return norm

    def loss(self, numbers: Sequence[int]) -> Tensor:
        """The loss of these samples, `[samples]`, as one pack."""
        return self._losses([self.samples.draw(number) for number in numbers])

    def _losses(self, drawn: Sequence[Drawn]) -> Tensor:
        device = self.accelerator.device
        return flow_matching_loss(
            self.wrapped,
            self.family.training_branch,
            [one.example.to(device) for one in drawn],
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
        """Mean loss of the held-out clips over `VALIDATION_LEVELS`, each with fixed noise, by the average if any."""
        packs = self.samples.held_out()
        devices = self.accelerator.num_processes
        summed = torch.zeros((), device=self.accelerator.device)
        with self.weights.in_use():
            for turn in range(-(-len(packs) // devices)):  # every device as often, as sharded weights ask
                place = turn * devices + self.accelerator.process_index
                pack = packs[min(place, len(packs) - 1)]
                losses = self._losses([self.samples.draw_held_out(*one) for one in pack])
                summed += losses.sum() * float(place < len(packs))
        tries = len(self.dataset.held_out) * len(VALIDATION_LEVELS)
        return float(self.accelerator.reduce(summed, "sum")) / tries

    def preview(self) -> Path | None:
        """A contact sheet of the sample prompts, by the average if any; on the main process alone."""
        if is_sharded(self.accelerator):
            self.log("no samples: the weights are spread over devices (FSDP)")
            return None
        if not self.accelerator.is_main_process:
            return None
        from reelbatch.train.previews import draw_previews

        self._evicted.close()
        with self.weights.in_use():
            sheet = draw_previews(self.config, self.model, self.preview_requests, self.position.step)
        self._evict_encoders()
        self.log(f"samples: {sheet}")
        return sheet

    def _evict_encoders(self) -> None:
        """Text encoders and VAE leave a GPU to the training, until samples are drawn. Not on the CPU, where weights
        would go to disk."""
        if self.accelerator.device.type != "cpu":
            self._evicted.enter_context(self.model.placement.evicted("text", "decode"))

    # -- what stays --------------------------------------------------------------------------------

    def _checkpoint(self, must: bool) -> None:
        accelerator = self.accelerator
        try:
            path = self.checkpoints.save(
                self.position,
                self.state.save,
                main=accelerator.is_main_process,
                anywhere=self._anywhere,
            )
        except OSError as error:
            last = self.checkpoints.last
            step = self.position.step
            message = f"the checkpoint of step {step} could not be saved: {error}; the last good one: {last}"
            if must:
                raise OSError(message) from error
            self.log(f"warning: {message}. Training goes on; make room")
        else:
            self.log(f"checkpoint: {path}")

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any device; all of them ask together."""
        votes = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, "sum"))

    def write_weights(self) -> Path | None:
        """The LoRA file or the model folder, with the averaged weights if there are any; None but on the main process.

        Raises:
            OSError: if it cannot be written.
        """
        with self.weights.in_use():
            gathered = self.accelerator.get_state_dict(self.wrapped) if is_sharded(self.accelerator) else None
            if not self.accelerator.is_main_process:
                return None
            return write_trained(self.config, self.model.folder, self.family, gathered)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
