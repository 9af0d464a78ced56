"""Optimizers and learning-rate schedules, all of libraries."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from reelbatch.train.config import ConfigError, TrainConfig

OPTIMIZERS: dict[str, tuple[str, str, str]] = {
    "adamw": ("torch.optim", "AdamW", "torch"),
    "adafactor": ("transformers.optimization", "Adafactor", "transformers"),
    "adamw-8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "adamw-8bit-paged": ("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes"),
    "adamw-8bit-torchao": ("torchao.optim", "AdamW8bit", "torchao"),
    "adamw-4bit-torchao": ("torchao.optim", "AdamW4bit", "torchao"),
}
"""Module, class and package of each."""


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Raises ConfigError if the optimizer's package is not installed, or cannot work here."""
    module, name, package = OPTIMIZERS[config.optimizer]
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer={config.optimizer} is of {package}, which is not installed here ({error}): "
            f"pip install {package}, or give optimizer: adamw"
        ) from None
    except Exception as error:  # what a package says whose library does not run on this machine
        raise ConfigError(f"optimizer={config.optimizer}: {package} does not work here ({error}); give adamw") from None
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        options |= {"scale_parameter": False, "relative_step": False}
    else:
        options["betas"] = config.betas
    optimizer: torch.optim.Optimizer = kind(list(parameters), **options)
    return optimizer


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate of every step."""
    from transformers import get_scheduler

    own = {"min_lr_rate": config.min_lr_share} if config.schedule == "cosine_with_min_lr" else None
    return get_scheduler(config.schedule, optimizer, config.warmup_steps, config.steps, own)


def apply_settings(config: TrainConfig, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Gives an optimizer whose state was loaded the config's own settings: a state brings those that it had with it.

    Args:
        optimizer, schedule: as accelerate wraps them.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate
        group |= {name: getattr(config, name) for name in ("weight_decay", "betas") if name in group}
    inner = schedule.scheduler
    inner.base_lrs = [config.learning_rate] * len(optimizer.param_groups)
    inner.last_epoch -= 1
    inner.step()
