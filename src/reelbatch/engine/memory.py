"""What a piece of work will cost in memory, and how much there is.

What a plan costs is an estimate, made before anything is loaded. How far estimates have been off is measured by
benchmarks/memory_plan.py and kept in benchmarks/results/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

if TYPE_CHECKING:
    from reelbatch.engine.planner import Isolation
    from reelbatch.models.checkpoint import Components, ModelInfo
    from reelbatch.models.hunyuan_video import BranchShape

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
Offload = Literal["none", "component", "block"]
"""Which weights are on the device: all; those of the component at work; the block at work and the one that follows."""

DECODE_COPIES_FP32, DECODE_COPIES_HALF = 8.0, 7.5
"""Copies of its widest activation that the VAE decoder holds at its peak. The peak is in the last upsampler: the
interpolated frames, those with the first frame joined, the padded ones, the convolution's result, and the convolution
library's own copies. Measured on a CPU as the growth of the peak resident set over that of the activation: 7.7
in fp32, 7.0 in bf16 (tests/test_vae.py measures again)."""

DECODE_FIXED_BYTES = 150 * 2**20
"""What a decode takes whatever its shape (reordered weights, scratch): 100 to 155 MB measured."""

# HunyuanVideo's VAE in Diffusers: these are attributes of the loaded class with fixed defaults, not part of its config.
TILE_LATENT_FRAMES = 4
TILE_PIXELS = 256


def decode_peak_bytes(
    vae_config: Mapping[str, Any],
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    framewise: bool = True,
    tiled: bool = False,
) -> int:
    """Estimated peak memory of decoding one sample, in bytes, weights not counted.

    The widest activation has full resolution: the last upsampler's, with the channels of the second block. On a CPU the
    estimate was 17 to 39 % above measured peaks of more than 450 MiB, and up to 90 % above smaller ones.

    Args:
        vae_config: of `AutoencoderKLHunyuanVideo`.
        latent_shape: [channels, latent_frames, h, w].
        dtype: of the VAE.
        framewise: whether the VAE works through time in tiles (it does so by default).
        tiled: whether it works through space in tiles.
    """
    _, latent_frames, height, width = latent_shape
    temporal, spatial = vae_config["temporal_compression_ratio"], vae_config["spatial_compression_ratio"]
    frames, height, width = (latent_frames - 1) * temporal + 1, height * spatial, width * spatial
    video = 3 * frames * height * width * dtype.itemsize * 2  # what is decoded already: tiles overlap in time and space
    if framewise and latent_frames > TILE_LATENT_FRAMES:
        frames = TILE_LATENT_FRAMES * temporal + 1
    if tiled:
        height, width = min(height, TILE_PIXELS), min(width, TILE_PIXELS)
    widest = max(vae_config["block_out_channels"][:2]) * frames * height * width * dtype.itemsize
    copies = DECODE_COPIES_FP32 if dtype.itemsize >= 4 else DECODE_COPIES_HALF
    return int(copies * widest) + video + DECODE_FIXED_BYTES


# --------------------------------------------------------------------------------------------------
# What the estimates need of a model


@dataclass(frozen=True)
class Network:
    """Configurations and parameter counts of a model's components; nothing of it is loaded.

    Attributes:
        configs: of `transformer`, `vae`, `text_encoder` and `text_encoder_2`, as in their config.json.
        parameters: of each of these.
        largest_block: parameters of the largest block of each: what offloading block by block moves at once.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, int]
    largest_block: Mapping[str, int]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Network:
        """Of a folder in the Diffusers layout, from its config.json files alone."""
        import json

        from reelbatch.models.checkpoint import _name

        configs = {name: json.loads((Path(folder) / name / "config.json").read_text("utf-8")) for name in COMPONENTS}
        return cls._from_configs(_name(Path(folder)), configs)

    @classmethod
    def from_info(cls, info: ModelInfo) -> Network:
        """Of a folder that has been looked into."""
        return cls.from_folder(info.folder)

    @classmethod
    def from_components(cls, components: Components) -> Network:
        """Of a loaded model."""
        networks: dict[str, Any] = {
            "transformer": components.transformer,
            "vae": components.decoder.vae,
            "text_encoder": components.text.llama,
            "text_encoder_2": components.text.clip,
        }
        configs = {
            name: dict(network.config) if name in ("transformer", "vae") else network.config.to_dict()
            for name, network in networks.items()
        }
        return cls._from_networks(components.name, configs, networks)

    @classmethod
    def hunyuanvideo_13b(cls) -> Network:
        """HunyuanVideo (13B) with its Llama 3 8B and CLIP-L, from the configuration in the code."""
        return cls._from_configs("hunyuanvideo-13b", {"transformer": {}, "vae": {}, **HUNYUANVIDEO_TEXT})

    @classmethod
    def _from_configs(cls, name: str, configs: Mapping[str, Mapping[str, Any]]) -> Network:
        """Builds the networks on the meta device, where they take no memory, and counts."""
        import transformers
        from diffusers import AutoencoderKLHunyuanVideo

        from reelbatch.models.hunyuan_video import HunyuanVideoTransformer3DModel

        with torch.device("meta"):
            networks: dict[str, Any] = {
                "transformer": HunyuanVideoTransformer3DModel.from_config(dict(configs["transformer"])),
                "vae": AutoencoderKLHunyuanVideo.from_config(dict(configs["vae"])),
                "text_encoder": transformers.LlamaModel(transformers.LlamaConfig(**configs["text_encoder"])),
                "text_encoder_2": transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder_2"])),
            }
        known = {
            name: dict(network.config) if name in ("transformer", "vae") else network.config.to_dict()
            for name, network in networks.items()
        }
        return cls._from_networks(name, known, networks)

    @classmethod
    def _from_networks(
        cls, name: str, configs: Mapping[str, Mapping[str, Any]], networks: Mapping[str, torch.nn.Module]
    ) -> Network:
        def count(module: torch.nn.Module) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        def blocks(module: torch.nn.Module) -> list[int]:
            lists = [child for child in module.modules() if isinstance(child, torch.nn.ModuleList)]
            return [count(block) for blocks in lists for block in blocks]

        return cls(
            name,
            MappingProxyType({part: MappingProxyType(dict(config)) for part, config in configs.items()}),
            MappingProxyType({part: count(network) for part, network in networks.items()}),
            MappingProxyType({part: max(blocks(network)) for part, network in networks.items()}),
        )


HUNYUANVIDEO_TEXT: Mapping[str, Mapping[str, Any]] = {
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
"""The text encoders that HunyuanVideo was trained with: Llama 3 8B (as in LLaVA) and CLIP ViT-L/14."""


# --------------------------------------------------------------------------------------------------
# Phases


@dataclass(frozen=True)
class VideoShape:
    """What one request asks of memory. Height and width in pixels; `cfg` is whether a second branch runs; `text_tokens`
    is of each branch."""

    height: int
    width: int
    frames: int
    cfg: bool = False
    text_tokens: int = 256

    def latent(self, network: Network) -> tuple[int, int, int, int]:
        """[channels, latent_frames, h, w]."""
        transformer, vae = network.configs["transformer"], network.configs["vae"]
        space, time = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
        frames = (self.frames - 1) // time + 1
        return transformer["in_channels"], frames, self.height // space, self.width // space

    def branches(self, network: Network) -> list[BranchShape]:
        """Patches of each branch of a step."""
        from reelbatch.models.hunyuan_video import BranchShape

        config = network.configs["transformer"]
        _, frames, height, width = self.latent(network)
        patch = config["patch_size"]
        shape = BranchShape(frames // config["patch_size_t"], height // patch, width // patch, self.text_tokens)
        return [shape] * (2 if self.cfg else 1)


def text_peak_bytes(network: Network, tokens: int, dtype: torch.dtype) -> int:
    """Estimated peak memory of encoding one prompt, in bytes, weights not counted."""
    config = network.configs["text_encoder"]
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    states = (layers + 1) * hidden  # all layers' states are kept until the one that is used is taken
    return tokens * (states + 8 * hidden + 3 * wide) * dtype.itemsize + STEP_FIXED_BYTES


STEP_FIXED_BYTES = 64 * 2**20


def step_peak_bytes(
    transformer_config: Mapping[str, Any],
    branches: Sequence[BranchShape | Sequence[BranchShape]],
    dtype: torch.dtype,
    isolation: Isolation,
) -> int:
    """Estimated peak memory of one denoising step, in bytes, weights not counted.

    Args:
        transformer_config: of `HunyuanVideoTransformer3DModel`.
        branches: of the samples that share the step; an element is a branch, or the branches of one sample (with
            classifier-free guidance), which share a pack.
        dtype: of the transformer.
        isolation: "exact" gives each element a pack of its own, "packed" puts all in one.
    """
    samples: list[list[Any]] = [[found] if hasattr(found, "video") else list(found) for found in branches]
    packs = samples if isolation == "exact" else [[branch for sample in samples for branch in sample]]
    config = transformer_config
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    ratio = config["mlp_ratio"]
    rows = [sum(branch.video + branch.text for branch in pack) for pack in packs]
    streams = 2 * sum(rows) * dim
    wide = (4 + 2 * ratio) * max(rows) * dim
    rope = sum(branch[0] * branch[1] * branch[2] for branch in {b[:3] for pack in packs for b in pack})
    return int((streams + wide) * dtype.itemsize) + rope * config["attention_head_dim"] * 4 + STEP_FIXED_BYTES


# --------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Plan:
    """Estimated peak memory of a batch, in bytes.

    Attributes:
        weights: of the most weights that are on the device at once.
        text, step, decode: activations of each phase, weights not counted.
        phases: weights and activations of each phase.
    """

    weights: int
    text: int
    step: int
    decode: int
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def fits(self, available_bytes: int) -> bool:
        return self.peak <= available_bytes


def plan(
    network: Network,
    shapes: Sequence[VideoShape],
    *,
    dtypes: torch.dtype | Mapping[str, torch.dtype],
    isolation: Isolation = "exact",
    offload: Offload = "none",
    tiled: bool = False,
) -> Plan:
    """The estimated cost of making these videos in one batch.

    Args:
        dtypes: one for all, or those of "transformer", "vae" and "text".
        tiled: whether the VAE decodes in spatial tiles.
    """
    if isinstance(dtypes, torch.dtype):
        dtypes = {"transformer": dtypes, "vae": dtypes, "text": dtypes}
    of = {part: dtypes.get(part, dtypes.get("text")) for part in COMPONENTS}
    size = {part: of[part].itemsize * network.parameters[part] for part in COMPONENTS}  # type: ignore[union-attr]
    text = max(text_peak_bytes(network, 95 + shape.text_tokens, dtypes["text"]) for shape in shapes)
    step = step_peak_bytes(
        network.configs["transformer"], [s.branches(network) for s in shapes], dtypes["transformer"], isolation
    )
    decode = max(
        decode_peak_bytes(network.configs["vae"], shape.latent(network), dtypes["vae"], tiled=tiled) for shape in shapes
    )
    held = {"text": size["text_encoder"] + size["text_encoder_2"], "step": size["transformer"], "decode": size["vae"]}
    if offload == "none":
        held = dict.fromkeys(held, sum(size.values()))
    if offload == "block":
        held["step"] = 2 * network.largest_block["transformer"] * dtypes["transformer"].itemsize
    phases = {"text": held["text"] + text, "step": held["step"] + step, "decode": held["decode"] + decode}
    return Plan(max(held.values()), text, step, decode, phases)


# --------------------------------------------------------------------------------------------------
# What there is

UNITS = {"": 1, "B": 1, **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)}}
UNITS |= {f"{k}iB": 1024**i for i, k in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 20GiB, 20GB, 20480MiB or 1.5 GiB; a bare number is bytes.

    Raises:
        ValueError: for anything else, saying how to write it.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise ValueError(f"memory size {text!r} cannot be read; write it as 20GiB, 20GB or 20480MiB")
    return int(float(found[1]) * units[found[2].lower()])


def held_bytes(device: torch.device | str) -> int:
    """What this process holds now: on a GPU its tensors there, on the CPU its resident memory."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def device_memory_bytes(device: torch.device | str) -> int:
    """Total memory of `device`; for the CPU what this process may use, a container's limit included."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min([psutil.virtual_memory().total, *_cgroup_limits()])


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterable[int]:
    """Memory limits of the process's control group and of those above it (versions 1 and 2)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = base / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(base):
                break
            try:
                value = (folder / name).read_text().strip()
            except OSError:  # the root has no limit file; in a container the path may be the host's
                continue
            if value.isdigit():  # else "max": no limit
                yield int(value)
