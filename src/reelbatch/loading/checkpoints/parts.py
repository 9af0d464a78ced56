"""What weights are, by their names and shapes alone, and where each weight of Diffusers' network is among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from reelbatch.loading.checkpoints.weight_files import WeightFile
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.parameter_names import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, ParameterNames, swap_halves

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "")
VAE_PREFIXES = ("vae.", "first_stage_model.", "")
REFINERS = (
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
)
"""What every network of the family has, in Tencent's and ComfyUI's names and in Diffusers'."""
OWN_15 = ("byt5_in.", "cond_type_embedding", "vision_in.", "context_embedder_2.", "cond_type_embed.")
OTHERS = {"clean_x_embedder": "FramePack", "audio_proj": "HunyuanVideo-Avatar"}
"""What the names begin with that only other networks of the family have."""
VAE_FIRST, VAE_15 = "decoder.conv_in.conv.weight", "decoder.norm_out.gamma"
SHOWN = 3

VAE_15_NAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
)
"""Tencent's names in the VAE of 1.5, and Diffusers' (its scripts/convert_hunyuan_video1_5_to_diffusers.py). Those of
1.0 are the same in both."""


class Source(NamedTuple):
    """Where a weight of Diffusers' network is: all rows of a tensor of a file, or some of them.

    Attributes:
        among: the weights that are the tensor's rows, in order; this one alone where it is all of it.
        swapped: whether the halves of its rows have the other order.
    """

    name: str
    among: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class Part:
    """Attributes:
    component: of a model folder. names: of the model it is of. sources: by Diffusers' name.
    """

    component: str
    names: ParameterNames
    file: WeightFile
    sources: Mapping[str, Source]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight that is a tensor by itself; () where there is none."""
        source = self.sources.get(name)
        return self.file.tensors[source.name].shape if source and len(source.among) == 1 else ()


def recognise(file: WeightFile) -> list[Part]:
    """The networks whose weights a file holds: a transformer, a VAE, or both.

    Raises:
        ModelFolderError: where it holds none of this family.
    """
    parts = []
    for prefix in TRANSFORMER_PREFIXES:
        if any(f"{prefix}{name}" in file.tensors for name in REFINERS):
            parts.append(_transformer(file.part(prefix)))
            break
    for prefix in VAE_PREFIXES:
        if f"{prefix}{VAE_FIRST}" in file.tensors:
            parts.append(_vae(file.part(prefix)))
            break
    if not parts:
        some = ", ".join(name[:100] for name in list(file.tensors)[:SHOWN])
        raise ModelFolderError(
            f"{file.path}: holds neither the transformer nor the VAE of a HunyuanVideo; its tensors are "
            f"{some or 'none'}{' and others' if len(file.tensors) > SHOWN else ''}"
        )
    return parts


def _transformer(file: WeightFile) -> Part:
    for begin, what in OTHERS.items():
        if any(name.startswith(begin) for name in file.tensors):
            raise ModelFolderError(f"{file.path}: is of {what}, which reelbatch does not run")
    names = HUNYUAN_VIDEO_15 if any(name.startswith(OWN_15) for name in file.tensors) else HUNYUAN_VIDEO
    sources: dict[str, Source] = {}
    for name in file.tensors:
        layer, _, parameter = name.rpartition(".")
        if parameter == "scale":  # of a norm, in files of Flux's code
            parameter = "weight"
        target = names.targets.get(layer)
        if target is not None and parameter in ("weight", "bias"):
            among = tuple(f"{own}.{parameter}" for own in target.layers)
            for own in among:
                if own in sources:
                    raise ModelFolderError(f"{file.path}: has {own} twice, as {sources[own].name} and as {name}")
                sources[own] = Source(name, among, target.swapped)
    return Part("transformer", names, file, sources)


def _vae(file: WeightFile) -> Part:
    names = HUNYUAN_VIDEO_15 if VAE_15 in file.tensors else HUNYUAN_VIDEO
    sources = {}
    for name in file.tensors:
        own = name
        for theirs, diffusers in VAE_15_NAMES if names is HUNYUAN_VIDEO_15 else ():
            own = re.sub(theirs, diffusers, own)
        sources[own] = Source(name, (own,))
    return Part("vae", names, file, sources)


def config_of(part: Part) -> dict[str, Any]:
    """What the shapes of a transformer's weights say of its configuration.

    Raises:
        ModelFolderError: for weights that are none of this network.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = part.shape(name)
        if len(found) != dimensions or not all(found):
            raise ModelFolderError(
                f"{part.file.path}: is no whole transformer of {part.names.model}: {name} is "
                f"{f'of {list(found)}' if found else 'missing'}"
            )
        return found

    def count(blocks: str) -> int:
        numbers = {int(match[1]) for name in part.sources if (match := re.match(rf"{blocks}\.(\d+)\.", name))}
        return len(numbers)

    width, channels, *patch = shape("x_embedder.proj.weight", 5)
    (head,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if patch[1] != patch[2] or width % head:
        raise ModelFolderError(f"{part.file.path}: has patches of {patch} and {head} channels a head of {width}")
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0] // prod(patch),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count("transformer_blocks"),
        "num_refiner_layers": count(r"context_embedder\.token_refiner\.refiner_blocks"),
        "mlp_ratio": shape("transformer_blocks.0.ff.net.0.proj.weight", 2)[0] / width,
        "patch_size_t": patch[0],
        "patch_size": patch[1],
        "text_embed_dim": shape("context_embedder.proj_in.weight", 2)[1],
    }
    if part.names is HUNYUAN_VIDEO_15:
        return config | {
            "text_embed_2_dim": shape("context_embedder_2.linear_1.weight", 2)[1],
            "image_embed_dim": shape("image_embedder.linear_1.weight", 2)[1],
            "use_meanflow": "time_embed.timestep_embedder_r.linear_1.weight" in part.sources,
        }
    return config | {
        "num_single_layers": count("single_transformer_blocks"),
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in part.sources,
    }


def reader(part: Part, network: nn.Module) -> Callable[[str], Tensor]:
    """Reads the weights of a network by Diffusers' names, once all are known to be there.

    Args:
        network: whose weights they are to be; its shapes are enough.

    Raises:
        ModelFolderError: where weights are missing, are of no layer of it, or have other shapes.
    """
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    used = {source.name for name, source in part.sources.items() if name in shapes}
    faults = []
    if missing := sorted(shapes.keys() - part.sources.keys()):
        faults.append(f"lacks {len(missing)} weights of the {part.component}, such as {missing[0]}")
    if others := sorted(part.file.tensors.keys() - used):
        listed = ", ".join(name[:100] for name in others[:SHOWN])
        faults.append(f"has {len(others)} tensors that are of no layer of the {part.component}, such as {listed}")
    for name in sorted(shapes.keys() & part.sources.keys()):
        source = part.sources[name]
        given = part.file.tensors[source.name].shape
        expected = shapes[name]
        if len(source.among) > 1 and all(own in shapes for own in source.among):
            expected = (sum(shapes[own][0] for own in source.among), *expected[1:])
        if given != expected:
            faults.append(f"has {source.name} of {list(given)}, where {list(expected)} is expected")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ModelFolderError(f"{part.file.path}: {'; '.join(faults[:SHOWN])}{more}")

    last: dict[str, Tensor] = {}  # the tensor that was read last: its rows are asked for one after the other

    def read(name: str) -> Tensor:
        source = part.sources[name]
        if source.name not in last:
            last.clear()
            last[source.name] = part.file.read(source.name)
        tensor = last[source.name]
        if len(source.among) > 1:
            begin = sum(shapes[own][0] for own in source.among[: source.among.index(name)])
            tensor = tensor[begin : begin + shapes[name][0]]
        return (swap_halves(tensor) if source.swapped else tensor).contiguous()

    return read
