"""The weights that a run trains, with their average if it keeps one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from reelbatch.train.checkpoints import CheckpointError
from reelbatch.train.method import trainable
from reelbatch.train.state_files import write_state

WEIGHTS_FILE = "trained.safetensors"
AVERAGE = "average"


class TrainedWeights:
    """What is trained, and its average.

    Args:
        network: with its trainable parameters; where weights are spread over devices, as accelerate returned it.
        ema_decay: of the average (EMA); None keeps none.

    Attributes:
        parameters: by their names in the network.
        average: of the parameters, or None.
    """

    def __init__(self, network: nn.Module, ema_decay: float | None) -> None:
        self.network = network
        self.parameters = trainable(network)
        self.average: EMAModel | None = None
        if ema_decay is not None:
            self.average = EMAModel(self.parameters.values(), decay=ema_decay, use_ema_warmup=True, power=0.75)

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

    def save(self, folder: Path) -> None:
        """Raises OSError."""
        kept = {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}
        save_file(kept, folder / WEIGHTS_FILE)
        if self.average is not None:
            write_state(folder, AVERAGE, self.average.state_dict())

    def load(self, folder: Path, read: Callable[[str], Any]) -> None:
        """Raises CheckpointError for other weights than these. read: gives the state of a name."""
        kept = load_file(folder / WEIGHTS_FILE)
        average = None if self.average is None else read(AVERAGE)
        shapes = [{name: tensor.shape for name, tensor in some.items()} for some in (kept, self.parameters)]
        averaged = shapes[1].values() if average is None else [tensor.shape for tensor in average["shadow_params"]]
        if shapes[0] != shapes[1] or list(averaged) != list(shapes[1].values()):
            raise CheckpointError(f"{folder}: holds other weights than this config trains; resume with its config.yaml")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])
        if self.average is not None:
            self.average.load_state_dict(average)
            self.average.to(device=next(iter(self.parameters.values())).device)
