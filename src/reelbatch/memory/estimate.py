"""What a piece of work will cost in memory, and how much there is.

All costs are estimates, made from configurations before anything is loaded: the tensors that are alive at the worst
moment of a phase, as the code of the networks makes them, and on a CPU what was measured to come on top: libraries and
the C allocator. How far estimates have been off is measured by benchmarks/memory_plan.py and kept in
benchmarks/results/memory_plan_cpu.md and memory_plan_held_out_cpu.md; on a GPU it has not been measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from reelbatch.memory.placement import Offload

if TYPE_CHECKING:
    from reelbatch.engine.planner import Isolation
    from reelbatch.loading.inspection import ModelInfo
    from reelbatch.loading.load import Components
    from reelbatch.loading.precision import Precision
    from reelbatch.models.layers import BranchShape

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
Phase = Literal["text", "step", "decode"]

ERRORS_MEASURED = (-0.143, 0.308)
"""Lowest and highest error (estimate over measured, less 1) in benchmarks/results/memory_plan_cpu.md and, of batches
that nothing was fitted to, memory_plan_held_out_cpu.md. Steps, which the engine goes by, are from -0.06 to 0.124."""

RUNTIME_BYTES: Mapping[Phase, tuple[int, int]] = MappingProxyType(
    {"text": (20 * 2**20, 29 * 2**20), "step": (23 * 2**20, 40 * 2**20), "decode": (45 * 2**20, 44 * 2**20)}
)
"""What a CPU process grows by up to each phase besides tensors, in fp32 and in half precision: code of libraries that
is read from disk at its first use, their buffers, tokenizers. Measured as the rest at small shapes, with freed memory
going back to the system at once (MALLOC_MMAP_THRESHOLD_=262144)."""

SLACK_MIB: Mapping[Phase, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "text": ((0, 0), (20, 22), (34, 38), (66, 66), (90, 100)),
        "step": ((0, 0), (20, 16), (34, 32), (62, 55), (80, 110), (100, 115)),
        "decode": ((0, 0), (16, 3), (50, 48), (110, 44), (235, 40), (400, 80), (470, 95), (900, 110)),
    }
)
"""Memory that the C allocator holds on a CPU besides the tensors, against the tensors: (MiB of tensors, MiB besides),
with straight lines between and nothing more beyond the last. Freed tensors of up to 32 MiB stay in glibc's heap, and
cannot always be used again; larger ones go back to the system, and larger decodings trim the heap. Fitted to what
benchmarks/memory_plan.py measured."""

SLACK_HALF: Mapping[Phase, tuple[float, int]] = MappingProxyType({"step": (0.7, 45), "decode": (0.5, 9)})
"""What comes on top of it in half precision, over the tensors, and at most (MiB)."""

SLACK_HALF_WEIGHTS = (0.05, 15)
"""And over the transformer's weights, once a step has run: why is not known; of one model with heavy weights."""

SLACK_PINNED = (0.9, 30)
"""The same in exact isolation, over the streams of the other packs, which lie between what a pack frees."""

GPU_RUNTIME_BYTES = 768 * 2**20
GPU_SLACK = 0.05
"""On a GPU: its context and the libraries' workspaces, and what the caching allocator wastes, over the tensors. Both
are assumed, not measured."""

# HunyuanVideo's VAE in Diffusers: these are attributes of the loaded class with fixed defaults, not part of its config.
TILE_LATENT_FRAMES, TILE_LATENT_STRIDE = 4, 3
TILE_PIXELS, TILE_PIXELS_STRIDE = 256, 192

CONV_BLOCK = 16
"""Channels that the convolution library lays side by side; their number is rounded up to a multiple of it."""


def how_far_off(device: torch.device | str) -> str:
    """What must be said of every estimate."""
    low, high = ERRORS_MEASURED
    on_cpu = f"on the CPU estimates have been {-low:.0%} too low to {high:.0%} too high"
    if torch.device(device).type == "cpu":
        return f"These are estimates: {on_cpu} (benchmarks/results/memory_plan_cpu.md)."
    return f"These are estimates, not yet compared with a GPU's real use; {on_cpu}."


def runtime_bytes(phase: Phase, dtype: torch.dtype, device: torch.device | str) -> int:
    """What a process takes besides tensors."""
    return RUNTIME_BYTES[phase][dtype.itemsize < 4] if torch.device(device).type == "cpu" else GPU_RUNTIME_BYTES


def slack_bytes(phase: Phase, tensors: int, dtype: torch.dtype, device: torch.device | str, others: int = 0) -> int:
    """What the allocator holds besides so many bytes of tensors, `others` of them streams of other packs."""
    if torch.device(device).type != "cpu":
        return int(tensors * GPU_SLACK)
    points = [(size * 2**20, besides * 2**20) for size, besides in SLACK_MIB[phase]]
    slack = points[-1][1]
    for (left, low), (right, high) in pairwise(points):
        if left <= tensors < right:
            slack = low + (high - low) * (tensors - left) // (right - left)
    if dtype.itemsize < 4 and phase in SLACK_HALF:
        slack += _at_most(tensors, *SLACK_HALF[phase])
    return slack + _at_most(others, *SLACK_PINNED)


def _at_most(size: int, share: float, most_mib: int) -> int:
    return min(int(share * size), most_mib * 2**20)


def _all_told(phase: Phase, tensors: int, dtype: torch.dtype, device: torch.device | str, others: int = 0) -> int:
    slack = slack_bytes(phase, tensors, dtype, device, others)
    return tensors + slack + runtime_bytes(phase, dtype, device)


# --------------------------------------------------------------------------------------------------
# What the estimates need of a model


@dataclass(frozen=True)
class Network:
    """Configurations and parameter counts of a model's components; nothing of it is loaded.

    Attributes:
        configs: of `transformer`, `vae`, `text_encoder` and `text_encoder_2`, as in their config.json.
        parameters: of each of these.
        largest_block: parameters of the largest block of each: what offloading block by block moves at once.
        outside_blocks: parameters of the transformer before and after its blocks.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, int]
    largest_block: Mapping[str, int]
    outside_blocks: int

    @classmethod
    def from_folder(cls, folder: str | Path) -> Network:
        """Of a folder in the Diffusers layout, from its config.json files alone.

        Raises:
            ValueError: if a config.json is missing or is none.
        """

        from reelbatch.loading.hub import model_name

        return cls._from_configs(
            model_name(Path(folder)), {part: _read_config(Path(folder) / part) for part in COMPONENTS}
        )

    @classmethod
    def from_info(cls, info: ModelInfo) -> Network:
        """Of a folder that has been looked into."""
        return cls.from_folder(info.folder)

    @classmethod
    def from_components(cls, components: Components) -> Network:
        """Of a loaded model."""
        networks = {
            "transformer": components.transformer,
            "vae": components.decoder.vae,
            "text_encoder": components.text.llama,
            "text_encoder_2": components.text.clip,
        }
        return cls._from_networks(components.name, networks)

    @classmethod
    def hunyuanvideo_13b(cls) -> Network:
        """HunyuanVideo (13B) with its Llama 3 8B and CLIP-L, from the configuration in the code."""
        return cls._from_configs("hunyuanvideo-13b", {"transformer": {}, "vae": {}, **HUNYUANVIDEO_TEXT})

    @classmethod
    def _from_configs(cls, name: str, configs: Mapping[str, Mapping[str, Any]]) -> Network:
        """Builds the networks on the meta device, where they take no memory, to count them."""
        import transformers
        from diffusers import AutoencoderKLHunyuanVideo

        from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

        with torch.device("meta"):
            networks = {
                "transformer": HunyuanVideoTransformer3DModel.from_config(dict(configs["transformer"])),
                "vae": AutoencoderKLHunyuanVideo.from_config(dict(configs["vae"])),
                "text_encoder": transformers.LlamaModel(transformers.LlamaConfig(**configs["text_encoder"])),
                "text_encoder_2": transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder_2"])),
            }
        return cls._from_networks(name, networks)

    @classmethod
    def _from_networks(cls, name: str, networks: Mapping[str, Any]) -> Network:
        def count(module: torch.nn.Module) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        blocks = {
            part: [
                count(block) for found in network.modules() if isinstance(found, torch.nn.ModuleList) for block in found
            ]
            for part, network in networks.items()
        }
        transformer = networks["transformer"]
        inside = count(transformer.transformer_blocks) + count(transformer.single_transformer_blocks)
        configs = {part: network.config for part, network in networks.items()}
        return cls(
            name,
            {
                part: dict(config) if part in ("transformer", "vae") else config.to_dict()
                for part, config in configs.items()
            },
            {part: count(network) for part, network in networks.items()},
            {part: max(counts) for part, counts in blocks.items()},
            count(transformer) - inside,
        )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: cannot be read ({error}); a plan needs it") from None
    return dict(config)


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
# Text


def text_peak_bytes(network: Network, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> int:
    """Estimated peak memory of encoding one prompt of so many tokens (the template's included), in bytes, weights not
    counted."""
    return _all_told("text", _text_tensors(network, tokens, dtype), dtype, device)


def _text_tensors(network: Network, tokens: int, dtype: torch.dtype) -> int:
    config = network.configs["text_encoder"]
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    row = tokens * hidden * dtype.itemsize
    states = [row] * (config["num_hidden_layers"] + 1)  # of every layer: all are given back, and one is used
    mlp = [tokens * wide * dtype.itemsize] * 3
    return sum([*states, row, row, *mlp])


# --------------------------------------------------------------------------------------------------
# Denoising


def step_peak_bytes(
    transformer_config: Mapping[str, Any],
    branches: Sequence[BranchShape | Sequence[BranchShape]],
    dtype: torch.dtype,
    isolation: Isolation,
    device: torch.device | str = "cpu",
) -> int:
    """Estimated peak memory of one denoising step, in bytes, weights not counted.

    Args:
        transformer_config: of `HunyuanVideoTransformer3DModel`.
        branches: of the samples that share the step; an element is a branch, or the branches of one sample (with
            classifier-free guidance), which share a pack.
        dtype: of the transformer.
        isolation: "exact" gives each element a pack of its own, "packed" puts all in one.
    """
    samples = _by_sample(branches)
    tensors = _step_tensors(transformer_config, samples, dtype, isolation)
    return _all_told("step", tensors, dtype, device, _streams_of_others(transformer_config, samples, dtype, isolation))


def _by_sample(branches: Sequence[Any]) -> list[list[BranchShape]]:
    return [[found] if hasattr(found, "video") else list(found) for found in branches]


def _step_tensors(
    config: Mapping[str, Any], samples: Sequence[Sequence[BranchShape]], dtype: torch.dtype, isolation: Isolation
) -> int:
    packs = samples if isolation == "exact" else [[branch for sample in samples for branch in sample]]
    latents = config["in_channels"] * config["patch_size"] ** 2 * config["patch_size_t"]
    rope = {shape[:3]: shape.video * config["attention_head_dim"] * 4 for pack in packs for shape in pack}
    kept = sum(
        sample[0].video * latents * (4 + dtype.itemsize)  # the sample's own in fp32, and as the branches read them
        + sum(shape.text for shape in sample) * config["text_embed_dim"] * dtype.itemsize
        for sample in samples
    )
    worst = max(map(sum, _step_moments(config, packs, dtype.itemsize)), default=0)
    return worst + kept + sum(rope.values())


def _streams_of_others(
    config: Mapping[str, Any], samples: Sequence[Sequence[BranchShape]], dtype: torch.dtype, isolation: Isolation
) -> int:
    """Bytes of streams that are held while the largest pack works, and are not its own."""
    if isolation == "packed":
        return 0
    rows = [sum(shape.video + shape.text for shape in sample) for sample in samples]
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    return 2 * (sum(rows) - max(rows)) * int(dim) * dtype.itemsize


def _step_moments(config: Mapping[str, Any], packs: Sequence[Sequence[Any]], itemsize: int) -> Iterator[list[int]]:
    """Sizes of the tensors alive where a block holds most, for each pack: in the dual-stream blocks the GELU of the
    video's feed-forward, in the single-stream blocks the output projection."""
    row = config["num_attention_heads"] * config["attention_head_dim"] * itemsize
    ratio = config["mlp_ratio"]
    video = [sum(shape.video for shape in pack) * row for pack in packs]
    text = [sum(shape.text for shape in pack) * row for pack in packs]
    both = [v + t for v, t in zip(video, text, strict=True)]
    conditions = [len(pack) * row for pack in packs]
    for i, (v, t, n) in enumerate(zip(video, text, both, strict=True)):
        modulation = 6 * conditions[i]
        if config["num_layers"]:
            attended = [v, t, v, t]  # the streams after the attention, and their updates
            streams = [*video, *text, *conditions, *video[:i], *text[:i]]
            yield [*streams, *attended, v, int(ratio * v), int(ratio * v), 2 * modulation]
        if config["num_single_layers"]:
            wide = [n, n, int(ratio * n), n + int(ratio * n), n]  # normed, attended, MLP, both joined, update
            yield [*both, *conditions, *both[:i], *wide, modulation // 2]


# --------------------------------------------------------------------------------------------------
# Decoding


def decode_peak_bytes(
    vae_config: Mapping[str, Any],
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    framewise: bool = True,
    tiled: bool = False,
    device: torch.device | str = "cpu",
) -> int:
    """Estimated peak memory of decoding one sample, in bytes, weights not counted.

    Args:
        vae_config: of `AutoencoderKLHunyuanVideo`.
        latent_shape: [channels, latent_frames, h, w].
        dtype: of the VAE.
        framewise: whether the VAE works through time in tiles (it does so by default).
        tiled: whether it works through space in tiles.
    """
    tensors = _decode_tensors(vae_config, latent_shape, dtype, framewise, tiled, device)
    return _all_told("decode", tensors, dtype, device)


def _decode_tensors(
    config: Mapping[str, Any],
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    framewise: bool,
    tiled: bool,
    device: torch.device | str,
) -> int:
    _, n, h, w = latent_shape
    time, space, itemsize = config["temporal_compression_ratio"], config["spatial_compression_ratio"], dtype.itemsize
    in_columns = torch.device(device).type == "cpu" and not _convolves_directly(dtype)

    starts = range(0, n, TILE_LATENT_STRIDE) if framewise and n > TILE_LATENT_FRAMES else range(1)
    lengths = [n if len(starts) == 1 else min(TILE_LATENT_FRAMES + 1, n - start) for start in starts]
    side, stride = TILE_PIXELS // space, TILE_PIXELS_STRIDE // space
    tiled = tiled and max(h, w) > side
    tile_h, tile_w = (min(h, side), min(w, side)) if tiled else (h, w)
    covered = _covered(h, side, stride) * _covered(w, side, stride) if tiled else h * w  # tiles overlap

    frame = 3 * h * w * space**2
    latents = math.prod(latent_shape)
    worst = {length: _decoder_moments(config, (length, tile_h, tile_w), itemsize, in_columns) for length in {*lengths}}
    moments, done = [], 0
    for length in lengths:
        frames = (length - 1) * time + 1
        others = 3 * frames * (covered - tile_h * tile_w) * space**2  # tiles of the same frames
        moments += [[*sizes, (done + others) * itemsize] for sizes in worst[length]]
        done += frames * frame
    video = ((n - 1) * time + 1) * frame
    moments.append([video * itemsize, done * itemsize if len(starts) > 1 else 0, 4 * video])
    if torch.device(device).type == "cpu":
        moments.append([4 * video, 4 * video, 4 * video])  # frames to 8 bits
    return max(map(sum, moments)) + latents * (4 + itemsize)


def _covered(size: int, side: int, stride: int) -> int:
    """Length of all tiles along an axis."""
    return sum(min(side, size - start) for start in range(0, size, stride))


def _decoder_moments(
    config: Mapping[str, Any], latent: tuple[int, int, int], itemsize: int, in_columns: bool
) -> list[list[int]]:
    """Sizes of the tensors alive in each convolution of the decoder, for latents of [frames, h, w] in one go."""
    frames, height, width = latent
    channels = [*reversed(config["block_out_channels"])]
    spatial, temporal = (int(math.log2(config[f"{kind}_compression_ratio"])) for kind in ("spatial", "temporal"))
    moments: list[list[int]] = []

    def size(count: int) -> int:
        return count * frames * height * width * itemsize

    def convolve(count: int, out: int, kernel: int, held: Sequence[int]) -> None:
        """`held` besides its input, which is padded first."""
        padded = count * (frames + kernel - 1) * (height + kernel - 1) * (width + kernel - 1) * itemsize
        blocked = size(math.ceil(out / CONV_BLOCK) * CONV_BLOCK)
        if in_columns:
            copies = [size(count * kernel**3), size(out)]
        else:  # the library's own copies of input and result, the latter then copied out
            reordered = padded if count >= CONV_BLOCK else 0
            copies = [max(reordered, size(out)), blocked]
        moments.append([*held, size(count), padded, *copies])

    came = channels[0]
    for i, out in enumerate(channels):
        entered = size(came)  # the block's input, held by its caller
        for layer in range(config["layers_per_block"] + 1):
            count, held = (came, [entered]) if layer == 0 else (out, [entered, size(out)])
            convolve(count, out, 3, held)
            convolve(out, out, 3, held)
            if count != out:
                convolve(count, out, 1, [size(out)])
        last = i == len(channels) - 1
        wider, longer = i < spatial, i >= len(channels) - 1 - temporal and not last
        if wider or longer:
            held = [entered, size(out)]
            frames = 2 * frames - 1 if longer else frames
            height, width = (2 * height, 2 * width) if wider else (height, width)
            convolve(out, out, 3, [*held, size(out) * (frames - 1) // frames])
        came = out
    convolve(came, 3, 3, [])
    return moments


def _convolves_directly(dtype: torch.dtype) -> bool:
    """Whether this CPU convolves in this dtype without writing out every window of the input first."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


# --------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class VideoShape:
    """What one request asks of memory.

    Attributes:
        height, width: in pixels.
        cfg: whether a second, unconditional branch runs.
        text_tokens: of each branch, the template cropped; 256 is the most.
    """

    height: int
    width: int
    frames: int
    cfg: bool = False
    text_tokens: int = 256

    def latent(self, network: Network) -> tuple[int, int, int, int]:
        """[channels, latent_frames, h, w]."""
        vae = network.configs["vae"]
        space, time = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
        frames = (self.frames - 1) // time + 1
        return vae["latent_channels"], frames, self.height // space, self.width // space

    def branches(self, network: Network) -> list[BranchShape]:
        """Patches of each branch of a step."""
        from reelbatch.models.layers import BranchShape

        config = network.configs["transformer"]
        _, frames, height, width = self.latent(network)
        patch = config["patch_size"]
        shape = BranchShape(frames // config["patch_size_t"], height // patch, width // patch, self.text_tokens)
        return [shape] * (2 if self.cfg else 1)


@dataclass(frozen=True)
class Plan:
    """Estimated memory of a batch, in bytes.

    Attributes:
        weights: on the device in each phase.
        text, step, decode: activations of each phase at their peak, and what comes on top.
    """

    weights: Mapping[Phase, int]
    text: int
    step: int
    decode: int

    @property
    def phases(self) -> dict[Phase, int]:
        """Weights and activations of each phase."""
        activations: dict[Phase, int] = {"text": self.text, "step": self.step, "decode": self.decode}
        return {phase: self.weights[phase] + size for phase, size in activations.items()}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def fits(self, available_bytes: int) -> bool:
        return self.peak <= available_bytes


TEMPLATE_TOKENS = 95
"""Of HunyuanVideo's own prompt template, which Llama reads before every prompt."""


def plan(
    network: Network,
    shapes: Sequence[VideoShape],
    *,
    dtypes: torch.dtype | Precision,
    isolation: Isolation = "exact",
    offload: Offload = "none",
    tiled: bool = False,
    device: torch.device | str = "cpu",
) -> Plan:
    """The estimated cost of making these videos in one batch.

    Args:
        dtypes: one for all parts of the model, or one of each.
        offload: which weights are on the device; on a CPU those that are not are taken to be on disk.
        tiled: whether the VAE decodes in spatial tiles.
    """
    from reelbatch.loading.precision import Precision

    if not shapes:
        raise ValueError("no shapes given: a plan is of one video or more.")
    precision = Precision.parse(dtypes, torch.device(device))
    longest = max(shape.text_tokens for shape in shapes) + TEMPLATE_TOKENS
    transformer, vae = network.configs["transformer"], network.configs["vae"]
    samples = [shape.branches(network) for shape in shapes]
    latents = {shape: shape.latent(network) for shape in shapes}
    tensors: dict[Phase, int] = {
        "text": _text_tensors(network, longest, precision.text),
        "step": _step_tensors(transformer, samples, precision.transformer, isolation),
        "decode": max(_decode_tensors(vae, latent, precision.vae, True, tiled, device) for latent in latents.values()),
    }
    dtype: dict[Phase, torch.dtype] = {"text": precision.text, "step": precision.transformer, "decode": precision.vae}
    found: dict[Phase, int] = {}
    besides = runtime = 0  # what a process has grown by in one phase it still has in the next
    others: dict[Phase, int] = {"step": _streams_of_others(transformer, samples, precision.transformer, isolation)}
    for phase, size in tensors.items():
        besides = max(besides, slack_bytes(phase, size, dtype[phase], device, others.get(phase, 0)))
        runtime = max(runtime, runtime_bytes(phase, dtype[phase], device))
        found[phase] = size + besides + runtime
    waiting = [math.prod(latents[shape]) * 4 for shape in shapes]
    found["decode"] += sum(waiting) - min(waiting)
    if precision.int8:  # a layer's weights are written out in full while it works
        dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        found["step"] += int(max(6, 1 + transformer["mlp_ratio"]) * dim**2) * precision.transformer.itemsize
    if torch.device(device).type == "cpu" and precision.transformer.itemsize < 4:
        size = precision.weight_bytes("transformer", network.parameters["transformer"])
        for phase in ("step", "decode"):
            found[phase] += _at_most(size, *SLACK_HALF_WEIGHTS)
    return Plan(MappingProxyType(_weights(network, precision, offload)), **found)


def _weights(network: Network, precision: Precision, offload: Offload) -> dict[Phase, int]:
    """Bytes of weights on the device in each phase."""
    size = {part: precision.weight_bytes(part, count) for part, count in network.parameters.items()}
    if offload == "none":
        return dict.fromkeys(("text", "step", "decode"), sum(size.values()))
    weights: dict[Phase, int] = {
        "text": size["text_encoder"] + size["text_encoder_2"],
        "step": size["transformer"],
        "decode": size["vae"],
    }
    if offload == "block":
        block = {part: precision.weight_bytes(part, count) for part, count in network.largest_block.items()}
        outside = precision.weight_bytes("transformer", network.outside_blocks)
        weights["step"] = min(weights["step"], 2 * block["transformer"] + outside)
        weights["text"] = min(weights["text"], 2 * block["text_encoder"] + size["text_encoder_2"])
    return weights
