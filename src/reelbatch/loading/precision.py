"""Precision: the dtype that each part of a model computes in, and 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
)
PARTS = ("transformer", "vae", "text")
INT8 = "int8"
NOT_CONVERTED = (
    "x_embedder",
    "context_embedder",
    "context_embedder_2",
    "image_embedder",
    "time_text_embed",
    "time_embed",
    "norm_out",
)
"""Parts of the transformer before and after its blocks: small, and all that follows hangs on them."""
HOW = (
    "give auto, float32, bfloat16 or float16 for all, int8 for 8-bit transformer weights, or say it part by part as in "
    "transformer=bfloat16,vae=float16,text=float16"
)


@dataclass(frozen=True)
class Precision:
    """Dtypes of weights and activations, part by part.

    Attributes:
        int8: whether the linear layers of the transformer's blocks keep their weights in 8 bits, with one scale an
            output row, and compute in `transformer`. Activations are not quantized, so batch-mates share no scale.
    """

    transformer: torch.dtype
    vae: torch.dtype
    text: torch.dtype
    int8: bool = False

    @classmethod
    def parse(cls, asked: Precision | torch.dtype | str, device: torch.device) -> Precision:
        """Reads a dtype for all parts, or text such as "auto", "bf16", "int8" or "transformer=int8,vae=fp16".

        What is not said is "auto": bfloat16 on CUDA, float32 elsewhere.

        Raises:
            ValueError: for anything else, saying how to write it.
        """
        if isinstance(asked, Precision):
            return asked
        if isinstance(asked, torch.dtype):
            asked = str(asked).removeprefix("torch.")
        parts = _by_part(asked)
        int8 = parts.get("transformer") == INT8
        chosen = {part: _dtype(parts.get(part, "auto"), part, device) for part in PARTS}
        return cls(**chosen, int8=int8)

    def of(self, component: str) -> torch.dtype:
        """The dtype of a component, by the name of its folder."""
        return {"transformer": self.transformer, "vae": self.vae}.get(component, self.text)

    def weight_bytes(self, component: str, parameters: int) -> int:
        """Memory that so many weights take."""
        return parameters * (1 if self.int8 and component == "transformer" else self.of(component).itemsize)

    def loading(self, component: str) -> dict[str, Any]:
        """Further options of `from_pretrained`."""
        if not (self.int8 and component == "transformer"):
            return {}
        try:
            from diffusers import TorchAoConfig
            from torchao.quantization import Int8WeightOnlyConfig
        except ImportError as error:
            raise ValueError(f"8-bit weights need torchao ({error}): pip install 'reelbatch[int8]'") from error
        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(NOT_CONVERTED))
        return {"quantization_config": config}

    @property
    def spec(self) -> str:
        """As `parse` takes it."""
        named = {part: INT8 if part == "transformer" and self.int8 else getattr(self, part) for part in PARTS}
        return ",".join(f"{part}={str(dtype).removeprefix('torch.')}" for part, dtype in named.items())

    def __str__(self) -> str:
        named = {part: str(getattr(self, part)).removeprefix("torch.") for part in PARTS}
        if self.int8:
            named["transformer"] = f"int8 in {named['transformer']}"
        same = len(set(named.values())) == 1
        return named["vae"] if same else ",".join(f"{part}={dtype}" for part, dtype in named.items())


def _by_part(asked: str) -> dict[str, str]:
    if "=" not in asked:
        return {"transformer": INT8} if asked == INT8 else dict.fromkeys(PARTS, asked)
    parts: dict[str, str] = {}
    for piece in asked.split(","):
        part, _, dtype = (word.strip() for word in piece.partition("="))
        if part not in PARTS or part in parts or not dtype:
            raise ValueError(f"dtype {asked!r}: {piece.strip()!r} is not one of {', '.join(PARTS)} with a dtype; {HOW}")
        parts[part] = dtype
    return parts


def _dtype(name: str, part: str, device: torch.device) -> torch.dtype:
    if name == "auto" or (name == INT8 and part == "transformer"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} cannot be used for {part}; {HOW}")
    return DTYPES[name]


def choose_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """What the transformer computes in; see `Precision.parse`."""
    return Precision.parse(dtype, device).transformer
