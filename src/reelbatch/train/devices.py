"""The devices of a run, as accelerate sees them."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

from reelbatch.train.config import ConfigError, TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of the devices, with what it leaves out on the CPU without a word: fp16 and FSDP.

    Raises:
        ConfigError: if the first version of FSDP is asked for, or an EMA with FSDP.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=config.device == "cpu", step_scheduler_with_optimizer=False
    )
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and config.mixed_precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.NO:
        plugin = FullyShardedDataParallelPlugin()  # of the environment that accelerate's launcher makes
        if plugin.fsdp_version != 2:
            raise ConfigError("FSDP version 1 is not supported; give accelerate --fsdp_version 2")
        if config.ema_decay is not None:
            raise ConfigError("ema_decay is not there for weights that are spread over devices (FSDP); leave it out")
        if on_cpu:
            if config.mixed_precision != "no":
                plugin.set_mixed_precision(config.mixed_precision)
            accelerator.state.fsdp_plugin = plugin
            for state in (PartialState, AcceleratorState):  # the second takes over what the first holds
                state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each device holds a part of the weights only (FSDP)."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def forget_precision() -> None:
    """So that the next run of this process may choose another precision: accelerate keeps the first one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
