"""What a piece of work will cost in memory, and how much there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

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
