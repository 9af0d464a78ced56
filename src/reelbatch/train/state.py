"""The state of a run in a checkpoint's folder: safetensors and JSON, which hold nothing that runs.

trained.safetensors   the weights that are trained                  average.*   their average, if the run keeps one
optimizer.*           schedule.*, scaler.*                          random_N.*  the global generators of process N
sharded/, shared.json where weights are spread over devices (FSDP): each device's part, and what all share

Version 0.1.0 left pickles of accelerate's. They are read as weights only; those of FSDP, which cannot be, are refused.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from reelbatch.outside_json import read_object
from reelbatch.train.checkpoints import CheckpointError
from reelbatch.train.devices import is_sharded
from reelbatch.train.state_files import read_state, write_state
from reelbatch.train.weights import TrainedWeights

SHARDED, SHARED = "sharded", "shared.json"
BEFORE = "optimizer.bin"
BEFORE_SHARDED = "pytorch_model_fsdp_0"
_ARRAY = np.empty(0).__reduce__()[0]
NUMPY: list[Any] = [np.ndarray, np.dtype, np.dtypes.UInt32DType, _ARRAY, (_ARRAY, "numpy.core.multiarray._reconstruct")]
"""What the pickle of numpy's generator names: arrays of numbers, also by numpy 1's name for them."""


class RunState:
    """What a run goes on from, besides its `Position`.

    Args:
        network, optimizer, schedule: as accelerate returned them.
    """

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, optimizer: Any, schedule: Any, weights: TrainedWeights
    ) -> None:
        self.accelerator, self.network, self.weights = accelerator, network, weights
        self.optimizer, self.schedule = optimizer, schedule

    def save(self, folder: Path) -> None:
        """Every process calls it; a part that is the same on all is written by the main one. Raises OSError."""
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        if is_sharded(accelerator):
            self._save_sharded(folder)
        elif main:
            self.weights.save(folder)
            write_state(folder, "optimizer", self.optimizer.state_dict())
        if main:
            write_state(folder, "schedule", self.schedule.state_dict())
            if accelerator.scaler is not None:
                write_state(folder, "scaler", accelerator.scaler.state_dict())
        write_state(folder, f"random_{accelerator.process_index}", _generators())

    def load(self, folder: Path) -> None:
        """Raises CheckpointError; and whatever a library does to a state that is not its own."""
        read = self._read_before(folder) if self._is_before(folder) else lambda name: read_state(folder, name)
        if is_sharded(self.accelerator):
            self._load_sharded(folder)
        else:
            self.weights.load(folder, read)
            self.optimizer.load_state_dict(read("optimizer"))
        self.schedule.load_state_dict(read("schedule"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(read("scaler"))
        own = f"random_{self.accelerator.process_index}"
        if (folder / f"{own}.json").exists() or self._is_before(folder):  # on more devices, the others' are new
            _set_generators(read(own))

    # -- weights that are spread over devices ------------------------------------------------------

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of the weights and the optimizer, each device's part, and the other values, which all share."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        network, optimizer = get_state_dict(self.network, self.optimizer.optimizer, options=options)
        state: dict[str, Any] = {f"network.{name}": value for name, value in network.items()}
        state |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
        return tensors, {name: value for name, value in state.items() if name not in tensors}

    def _save_sharded(self, folder: Path) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        tensors, shared = self._state()
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / SHARDED), save_distributed=True))
        if self.accelerator.is_main_process:
            values = {name: value.item() if isinstance(value, Tensor) else value for name, value in shared.items()}
            (folder / SHARED).write_text(json.dumps(values) + "\n", encoding="utf-8")

    def _load_sharded(self, folder: Path) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        tensors, shared = self._state()
        stored = read_object(folder / SHARED)
        if stored.keys() != shared.keys():
            raise CheckpointError(f"{folder}: holds other weights than this config trains; resume with its config.yaml")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / SHARDED)))
        values = {
            name: torch.full_like(value, stored[name]) if isinstance(value, Tensor) else stored[name]
            for name, value in shared.items()
        }
        state = tensors | values
        set_state_dict(
            self.network,
            self.optimizer.optimizer,
            model_state_dict=_under("network.", state),
            optim_state_dict=_under("optimizer.", state),
            options=StateDictOptions(flatten_optimizer_state_dict=True),
        )

    # -- checkpoints of version 0.1.0 --------------------------------------------------------------

    def _is_before(self, folder: Path) -> bool:
        if (folder / BEFORE_SHARDED).exists():
            raise CheckpointError(
                f"{folder}: was saved over several devices (FSDP) by an earlier version, as pickles, which could run "
                "code; start anew (out: another folder), or end this run with the version that began it"
            )
        return (folder / BEFORE).exists()

    def _read_before(self, folder: Path) -> Callable[[str], Any]:
        names = {
            "optimizer": BEFORE,
            "schedule": "scheduler.bin",
            "scaler": "scaler.pt",
            "average": "custom_checkpoint_0.pkl",
            f"random_{self.accelerator.process_index}": f"random_states_{self.accelerator.process_index}.pkl",
        }

        def read(name: str) -> Any:
            path = folder / names[name]
            try:
                with torch.serialization.safe_globals(NUMPY):
                    return torch.load(path, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, LookupError) as error:
                reason = str(error).partition("\n")[0]
                raise CheckpointError(
                    f"{path}: cannot be read as numbers alone, and nothing else is read of it ({reason}); resume from "
                    "another checkpoint"
                ) from None

        return read


def _under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _generators() -> dict[str, Any]:
    """The global random generators: a LoRA's dropout draws from them."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "random_state": random.getstate(),
        "numpy_random_seed": (kind, [int(key) for key in keys], *rest),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
    return state


def _set_generators(state: dict[str, Any]) -> None:
    random.setstate(state["random_state"])
    np.random.set_state(state["numpy_random_seed"])
    torch.set_rng_state(state["torch_manual_seed"])
    if torch.cuda.is_available() and len(state.get("torch_cuda_manual_seed", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["torch_cuda_manual_seed"])
