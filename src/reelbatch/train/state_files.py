"""Nested states (of optimizers, schedules, generators) as files that hold numbers and text, and nothing that runs.

A state is two files: its tensors in NAME.safetensors, and the rest in NAME.json, where an object with one key stands
for what JSON has no form for: {"tensor": "3"}, {"dict": [[key, value], …]}, {"tuple": […]}.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelbatch.outside_json import read_object
from reelbatch.train.checkpoints import CheckpointError

OTHER_TENSORS = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
"""Tensors of several parts that optimizers keep, and where their classes are."""
REMEDY = "resume from another checkpoint"


def write_state(folder: Path, name: str, state: Any) -> None:
    """Raises OSError, and TypeError for what has no form here."""
    tensors: dict[str, Tensor] = {}
    tree = _to_json(state, tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"state": tree}) + "\n", encoding="utf-8")


def read_state(folder: Path, name: str) -> Any:
    """What `write_state` wrote; tensors are on the CPU. Raises CheckpointError."""
    path = folder / f"{name}.json"
    try:
        tree = read_object(path, REMEDY)["state"]
        path = folder / f"{name}.safetensors"
        return _from_json(tree, load_file(path))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {REMEDY}") from None


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _tensor_to_json(value.detach(), tensors)
    if isinstance(value, dict):
        return {"dict": [[_to_json(key, tensors), _to_json(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list):
        return [_to_json(inner, tensors) for inner in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(inner, tensors) for inner in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__name__} cannot be stored in a checkpoint")


def _tensor_to_json(value: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(value).__name__
    if kind in OTHER_TENSORS:
        parts, settings = value.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = [[part, _to_json(getattr(value, part), tensors)] for part in parts]
        return {kind: [inner, _to_json(settings, tensors)]}
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"a {kind} cannot be stored in a checkpoint")
    name = str(len(tensors))
    tensors[name] = value.cpu().contiguous().clone()  # safetensors refuses tensors that share memory
    return {"tensor": name}


def _from_json(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_from_json(inner, tensors) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {_from_json(key, tensors): _from_json(inner, tensors) for key, inner in value}
    if kind == "tuple":
        return tuple(_from_json(inner, tensors) for inner in value)
    if kind == "dtype" and isinstance(dtype := getattr(torch, value), torch.dtype):
        return dtype
    if kind in OTHER_TENSORS:
        parts, settings = value
        inner = {part: _from_json(tensor, tensors) for part, tensor in parts}
        unflatten = getattr(import_module(OTHER_TENSORS[kind]), kind).__tensor_unflatten__
        return unflatten(inner, _from_json(settings, tensors))
    raise ValueError(f"{kind!r} is no part of a state")
