"""EngineConfig: how an engine is opened and runs, as one object that can be saved and sent elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch

from reelbatch.attention import AUTO, check_backend
from reelbatch.device import parse_bytes
from reelbatch.engine.planner import Isolation, Planner
from reelbatch.loading.precision import Precision
from reelbatch.memory.placement import Offload
from reelbatch.request import did_you_mean


@dataclass(frozen=True)
class EngineConfig:
    """Everything that opening an engine takes. Values may be given as `Engine.from_pretrained` takes them.

    Attributes:
        model: "demo" (the bundled little model), a folder in the Diffusers layout, or a hub id.
        device: "auto" is CUDA where there is one, else the CPU.
        dtype: of weights and activations; "auto" is bfloat16 on CUDA, float32 on the CPU. Part by part as in
            "transformer=bfloat16,vae=float16,text=float16"; "int8" keeps the transformer's weights in 8 bits.
        isolation: "exact" (bit-identical to a run alone) or "packed" (equal to rounding, fewer and larger calls).
        max_batch_size: samples that share a step.
        max_batch_tokens: transformer rows that share a step, or None for no limit.
        keep_latents: whether videos carry their final latents too.
        attention: the kernel, a name in `reelbatch.attention.BACKENDS`; "auto" takes the best that there is.
        max_memory: bytes that this process (on a GPU: its allocations there) may hold; a text such as "20GiB" will do.
            Samples wait rather than overrun it, by estimate; what does not fit alone fails alone. It changes no pixel.
        offload: which weights are on the device: "none" waits elsewhere; "component", those of the component at work;
            "block", of networks of blocks those of the block at work. Videos are the same to the bit.
        lora: LoRA files that act on the transformer, each with its scale.
        keep_pixels: whether a video fails, rather than take a fallback that changes its pixels, when memory runs out
            and nothing else helps.
        decode_beside: finished samples that may be decoded beside the next steps, in a thread; 0 decodes them between
            the steps, as does a memory limit, whose estimates know one phase at a time. None: 2, but 0 on the CPU,
            where the same cores do both.

    Raises:
        ValueError: for a value that cannot be, saying what can.
    """

    model: str = "demo"
    device: str = "auto"
    dtype: str = "auto"
    isolation: Isolation = "exact"
    max_batch_size: int = 8
    max_batch_tokens: int | None = None
    keep_latents: bool = False
    attention: str = AUTO
    max_memory: int | None = None
    offload: Offload = "none"
    lora: tuple[tuple[str, float], ...] = ()
    keep_pixels: bool = False
    decode_beside: int | None = 0

    def __post_init__(self) -> None:
        given: Any = self
        dtype = given.dtype
        if isinstance(dtype, Precision):
            dtype = dtype.spec
        if isinstance(given.max_memory, str):
            self._set("max_memory", parse_bytes(given.max_memory))
        self._set("model", str(given.model))
        self._set("device", str(given.device))
        self._set("dtype", str(dtype).removeprefix("torch."))
        self._set("lora", tuple((str(path), float(scale)) for path, scale in given.lora))
        if self.isolation not in get_args(Isolation):
            raise ValueError(f"isolation is {self.isolation!r}; it must be 'exact' or 'packed'.")
        if self.max_memory is not None and self.max_memory < 1:
            raise ValueError(f"max_memory is {self.max_memory}; it must be at least 1 byte.")
        if self.decode_beside is not None and self.decode_beside < 0:
            raise ValueError(f"decode_beside is {self.decode_beside}; it must be 0 or more.")
        Planner(self.max_batch_size, self.max_batch_tokens)
        check_backend(self.attention)
        Precision.parse(self.dtype, torch.device("cpu"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """From keywords; raises TypeError, naming the nearest, for one that there is not."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"no engine option {name!r}; {did_you_mean(name, known)}")
        return cls(**options)

    @property
    def loras(self) -> list[tuple[Path, float]]:
        return [(Path(path), scale) for path, scale in self.lora]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> EngineConfig:
        """What `to_json` gave, or the same as a mapping."""
        return cls.of(**(json.loads(text) if isinstance(text, str) else text))
