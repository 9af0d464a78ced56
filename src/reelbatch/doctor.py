"""What this machine has, for `reelbatch doctor` and for the records of measurements."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import version
from typing import Any, get_args

from reelbatch.attention import BACKENDS, Setting, choose, rule_names, varlen
from reelbatch.attention.flex import COMPILERS
from reelbatch.attention.setting import Kind, compute_capability
from reelbatch.device import choose_device, device_memory_bytes, device_name
from reelbatch.loading.precision import choose_dtype

PACKAGES = ("reelbatch", "torch", "diffusers", "transformers", "accelerate", "peft", "av")
WITH = {
    "none": "no mask",
    "keys": "a mask of keys",
    "dense": "a mask tensor",
    "rules": "rules",
}


def examine(device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """The machine, the attention kernels that run on it, and the one that is chosen for each kind of mask."""
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    settings: dict[Kind, Setting] = {kind: Setting.on(chosen_device, chosen_dtype, kind) for kind in get_args(Kind)}
    chosen = {kind: choose(setting) for kind, setting in settings.items()}
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    capability = compute_capability(chosen_device)
    notes = {"varlen": None if capability is None else varlen.note(capability)}
    return {
        "machine": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "system": f"{platform.system()} {platform.release()}",
            "device": device_name(chosen_device),
            "cores": os.cpu_count(),
            "memory": f"{device_memory_bytes(chosen_device) / 2**30:.1f} GiB",
            "C++ compiler": compiler or "none (FlexAttention on the CPU and torch.compile need one)",
        },
        "device": str(chosen_device),
        "dtype": str(chosen_dtype).removeprefix("torch."),
        "chosen": {WITH[kind]: {"backend": choice.backend.name, "why": choice.why} for kind, choice in chosen.items()},
        "backends": [_backend(name, settings, notes.get(name)) for name in BACKENDS],
        "rules": list(rule_names()),
    }


def _backend(name: str, settings: dict[Kind, Setting], note: str | None) -> dict[str, Any]:
    refusals = {kind: BACKENDS[name].refuses(setting) for kind, setting in settings.items()}
    reasons = {WITH[kind]: reason for kind, reason in refusals.items() if reason is not None}
    always = len(reasons) == len(settings) and len(set(reasons.values())) == 1
    return {
        "name": name,
        "what": BACKENDS[name].what + (f" ({note})" if note else ""),
        "never": next(iter(reasons.values())) if always else None,
        "refuses": {} if always else reasons,
    }
