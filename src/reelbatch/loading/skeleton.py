"""Skeletons: families without weights, for estimates of memory before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from reelbatch.loading import hunyuan_video
from reelbatch.loading.configs import Config, build, check_config
from reelbatch.loading.inspection import inspect
from reelbatch.loading.layout import PROCESSORS, Contents, Layout
from reelbatch.loading.precision import NOT_CONVERTED, Precision
from reelbatch.models.family import Family
from reelbatch.models.prompts import PromptTemplate
from reelbatch.outside_json import read_object
from reelbatch.request import ModelLimits
from reelbatch.tracing import FAKE

HUNYUANVIDEO: Mapping[str, Mapping[str, Any]] = {
    "transformer": {},
    "vae": {},
    "text_encoder": {
        "vocab_size": 128320,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "text_encoder_2": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
    },
}
"""HunyuanVideo (13B): its networks' own defaults, Llama 3 8B (as in LLaVA) and CLIP ViT-L/14."""


def hunyuanvideo_13b(precision: Precision, device: torch.device) -> Family:
    """HunyuanVideo as it was published, from the configurations in the code."""
    layout = hunyuan_video.LAYOUT
    return _family(layout, HUNYUANVIDEO, precision, device, layout.limits(HUNYUANVIDEO, {}), 7.0, None)


def from_folder(folder: Path, precision: Precision, device: torch.device) -> Family:
    """The model of a folder in the Diffusers layout, from its JSON files alone.

    Raises:
        ValueError: if a config.json is missing or cannot be read.
    """
    info = inspect(folder)
    configs = {part: _read_config(folder / part, info.layout.configs[part]) for part in info.layout.networks}
    return _family(info.layout, configs, precision, device, info.limits, info.flow_shift, info.profile.prompt_template)


def _read_config(folder: Path, kind: type[Config]) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config, faults = check_config(kind, read_object(path, "a plan needs it"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); a plan needs it") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if faults:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in faults))
    return config


def _family(
    layout: Layout,
    configs: Mapping[str, Mapping[str, Any]],
    precision: Precision,
    device: torch.device,
    limits: ModelLimits,
    flow_shift: float,
    template: PromptTemplate | None,
) -> Family:
    where = device if device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")
    networks: dict[str, Any] = {name: build(kind, configs[name]) for name, kind in layout.networks.items()}
    if precision.int8:
        _to_int8(networks["transformer"])
    for name, network in networks.items():
        _fake_weights(network.eval(), precision.of(name), where)
    letters: Any = _LetterTokenizer(getattr(networks["text_encoder"].config, "image_token_id", 0))
    tokenizers: dict[str, Any] = {"tokenizer": letters, "tokenizer_2": letters}
    for name in layout.classes.keys() & PROCESSORS.keys():
        vision = networks.get("image_encoder", networks["text_encoder"]).config
        side = getattr(vision, "vision_config", vision).image_size
        square = {"height": side, "width": side}
        tokenizers[name] = PROCESSORS[name](size=square, crop_size=square)
    return layout.build(Contents(networks, tokenizers, template, limits, flow_shift, where))


def _fake_weights(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Weights that are said to be in a dtype on a device, and take no memory."""

    def fake(tensor: Tensor) -> FakeTensor:
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        return FakeTensor(FAKE, torch.empty(tensor.shape, dtype=wanted, device="meta"), device)

    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


class _Int8Linear(nn.Module):
    """A linear layer with weights in 8 bits, which are written out in the dtype of its input while it works."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        self.register_buffer("scale", linear.weight[:, :1])
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight.to(rows.dtype) * self.scale, self.bias)


def _to_int8(transformer: nn.Module) -> None:
    linears = [
        (name, module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in NOT_CONVERTED)
    ]
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, _Int8Linear(linear))


class _LetterTokenizer:
    """A token for each letter: as good as any where nothing has values. An image's mark is one, and has its own."""

    is_fast = True

    def __init__(self, image_token: int) -> None:
        self._image_token = image_token

    def __call__(self, text: str, max_length: int | None = None, **_: object) -> SimpleNamespace:
        marks = [match.span() for match in re.finditer("<image>|.", text, re.DOTALL)][:max_length]
        ids = [self._image_token if end - start > 1 else 0 for start, end in marks]
        return SimpleNamespace(input_ids=ids, offset_mapping=marks)

    def convert_tokens_to_ids(self, token: str) -> None:
        """It has no other marks."""
