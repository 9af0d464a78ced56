"""The weights that a run trains, with their average if it keeps one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelbatch.train.checkpoints import CheckpointError
from reelbatch.train.devices import is_sharded
from reelbatch.train.method import trainable

WEIGHTS_FILE = "trained.safetensors"


class TrainedWeights:
    """Registers itself with the accelerator, so that checkpoints hold what is trained and its average.

    Args:
        network: with its trainable parameters; where weights are spread over devices, as accelerate returned it.
        ema_decay: of the average (EMA); None keeps none.

    Attributes:
        parameters: by their names in the network.
        average: of the parameters, or None.
    """

    def __init__(self, network: nn.Module, ema_decay: float | None, accelerator: Accelerator) -> None:
        self.network, self.accelerator = network, accelerator
        self.parameters = trainable(network)
        self.average: EMAModel | None = None
        if ema_decay is not None:
            self.average = EMAModel(self.parameters.values(), decay=ema_decay, use_ema_warmup=True, power=0.75)
            accelerator.register_for_checkpointing(self.average)
        if not is_sharded(accelerator):  # accelerate then saves each device's part
            accelerator.register_save_state_pre_hook(self._save)
            accelerator.register_load_state_pre_hook(self._load)

    def update_average(self) -> None:
        if self.average is not None:
            self.average.step(self.parameters.values())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While entered, the network is as it is used: in evaluation mode, with averaged weights."""
        parameters = list(self.parameters.values())
        self.network.eval()
        if self.average is not None:
            self.average.store(parameters)
            self.average.copy_to(parameters)
        try:
            yield
        finally:
            if self.average is not None:
                self.average.restore(parameters)
            self.network.train()

    # accelerate would save and load whole networks, of which a LoRA changes little

    def _save(self, models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
        if self.accelerator.is_main_process:
            kept = {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}
            save_file(kept, Path(folder) / WEIGHTS_FILE)
        weights.clear()

    def _load(self, models: list[Any], folder: str) -> None:
        models.clear()
        kept = load_file(Path(folder) / WEIGHTS_FILE)
        shapes = [{name: tensor.shape for name, tensor in some.items()} for some in (kept, self.parameters)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{folder}: holds other weights than this config trains; resume with its config.yaml")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])
