"""Names of layers in files of HunyuanVideo and 1.5: one table for checkpoints and LoRA files, read both ways.

    Tencent's     double_blocks.0.img_attn_qkv          also diffusion-pipe's, and of most single files
    ComfyUI's     double_blocks.0.img_attn.qkv
    Diffusers'    transformer_blocks.0.attn.to_q (…to_k, …to_v)

kohya's LoRA files (musubi-tuner) have the first or the second with underscores for dots, OneTrainer's and SimpleTuner's
the third. Where one layer is several of Diffusers', they are its rows, in order. Sources: `process_unet_state_dict` of
ComfyUI's comfy/supported_models.py, Diffusers' scripts/convert_hunyuan_video*_to_diffusers.py, and musubi-tuner's
networks/convert_hunyuan_video_1_5_lora_to_comfy.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Style = Literal["tencent", "comfyui"]
PREFIXES = ("model.diffusion_model.", "base_model.model.", "diffusion_model.", "transformer.")
"""What may stand before a layer's name."""
KOHYA = "lora_unet_"
UNDERSCORED_DIFFUSERS = ("lora_transformer_", "lycoris_", KOHYA)
"""What OneTrainer, SimpleTuner and others begin names with that are Diffusers' with underscores for dots."""
BLOCKS = 200
"""More than any network of this family has of a kind: names are read by spelling all that there can be."""


class Target(NamedTuple):
    """The layers of Diffusers' network that a layer of a file is.

    Attributes:
        layers: more than one are its rows, one after the other.
        swapped: whether the two halves of its rows have the other order (shift and scale of the last modulation).
    """

    layers: tuple[str, ...]
    swapped: bool = False


class Row(NamedTuple):
    """One layer in each of the spellings; an empty one where that spelling has it in another row."""

    tencent: str
    comfyui: str
    layers: tuple[str, ...]
    swapped: bool = False
    also: str = ""
    """A further spelling, which is read and not written."""


def _row(tencent: str, comfyui: str, diffusers: str, swapped: bool = False, also: str = "") -> Row:
    return Row(tencent, comfyui or tencent, tuple(diffusers.split()), swapped, also)


_DOUBLE = (
    _row("img_mod.linear", "img_mod.lin", "norm1.linear"),
    _row("txt_mod.linear", "txt_mod.lin", "norm1_context.linear"),
    _row("img_attn_q_norm", "img_attn.norm.query_norm", "attn.norm_q"),
    _row("img_attn_k_norm", "img_attn.norm.key_norm", "attn.norm_k"),
    _row("txt_attn_q_norm", "txt_attn.norm.query_norm", "attn.norm_added_q"),
    _row("txt_attn_k_norm", "txt_attn.norm.key_norm", "attn.norm_added_k"),
    _row("img_attn_proj", "img_attn.proj", "attn.to_out.0"),
    _row("txt_attn_proj", "txt_attn.proj", "attn.to_add_out"),
    _row("img_mlp.fc1", "img_mlp.0", "ff.net.0.proj"),
    _row("img_mlp.fc2", "img_mlp.2", "ff.net.2"),
    _row("txt_mlp.fc1", "txt_mlp.0", "ff_context.net.0.proj"),
    _row("txt_mlp.fc2", "txt_mlp.2", "ff_context.net.2"),
)
_IMAGE_QKV, _TEXT_QKV = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_FUSED = (
    _row("img_attn_qkv", "img_attn.qkv", _IMAGE_QKV),
    _row("txt_attn_qkv", "txt_attn.qkv", _TEXT_QKV),
)
_SPLIT = (
    *(
        Row(f"{stream}_attn_{part}", "", (layer,))
        for stream, layers in (("img", _IMAGE_QKV), ("txt", _TEXT_QKV))
        for part, layer in zip("qkv", layers.split(), strict=True)
    ),
    Row("", "img_attn.qkv", tuple(_IMAGE_QKV.split()), also="img_attn_qkv"),
    Row("", "txt_attn.qkv", tuple(_TEXT_QKV.split()), also="txt_attn_qkv"),
)
"""1.5: Tencent's files have three layers, ComfyUI's network (and files made for it) one."""
_SINGLE = (
    _row("linear1", "", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    _row("linear2", "", "proj_out"),
    _row("modulation.linear", "modulation.lin", "norm.linear"),
    _row("q_norm", "norm.query_norm", "attn.norm_q"),
    _row("k_norm", "norm.key_norm", "attn.norm_k"),
)
_REFINER = (
    _row("norm1", "", "norm1"),
    _row("norm2", "", "norm2"),
    _row("self_attn_qkv", "self_attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    _row("self_attn_proj", "self_attn.proj", "attn.to_out.0"),
    _row("mlp.fc1", "mlp.0", "ff.net.0.proj"),
    _row("mlp.fc2", "mlp.2", "ff.net.2"),
    _row("adaLN_modulation.1", "", "norm_out.linear"),
)


def _embedder(tencent: str, diffusers: str) -> tuple[Row, Row]:
    """The two layers of an embedding of a number."""
    return (
        _row(f"{tencent}.mlp.0", f"{tencent}.in_layer", f"{diffusers}.linear_1"),
        _row(f"{tencent}.mlp.2", f"{tencent}.out_layer", f"{diffusers}.linear_2"),
    )


_TEXT_IN = "context_embedder.time_text_embed"
_OTHER = (
    _row("img_in.proj", "", "x_embedder.proj"),
    _row("txt_in.input_embedder", "", "context_embedder.proj_in"),
    *_embedder("txt_in.t_embedder", f"{_TEXT_IN}.timestep_embedder"),
    _row("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer", f"{_TEXT_IN}.text_embedder.linear_1"),
    _row("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer", f"{_TEXT_IN}.text_embedder.linear_2"),
    _row("final_layer.linear", "", "proj_out"),
    _row("final_layer.adaLN_modulation.1", "", "norm_out.linear", swapped=True),
)
_OTHER_10 = (
    *_embedder("time_in", "time_text_embed.timestep_embedder"),
    *_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    _row("vector_in.in_layer", "", "time_text_embed.text_embedder.linear_1"),
    _row("vector_in.out_layer", "", "time_text_embed.text_embedder.linear_2"),
)
_OTHER_15 = (
    *_embedder("time_in", "time_embed.timestep_embedder"),
    *_embedder("time_r_in", "time_embed.timestep_embedder_r"),
    _row("byt5_in.layernorm", "", "context_embedder_2.norm"),
    *(_row(f"byt5_in.fc{number}", "", f"context_embedder_2.linear_{number}") for number in (1, 2, 3)),
    _row("vision_in.proj.0", "", "image_embedder.norm_in"),
    _row("vision_in.proj.1", "", "image_embedder.linear_1"),
    _row("vision_in.proj.3", "", "image_embedder.linear_2"),
    _row("vision_in.proj.4", "", "image_embedder.norm_out"),
    _row("cond_type_embedding", "", "cond_type_embed"),
)
_REFINER_STACK = ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", _REFINER)


@dataclass(frozen=True)
class ParameterNames:
    """The names of one model's layers.

    Attributes:
        model: what to call it. width: of the published network, which tells whose a LoRA is when names do not.
        stacks: of blocks: what they are called in Tencent's and ComfyUI's files, in Diffusers', and their layers.
    """

    model: str
    width: int
    stacks: tuple[tuple[str, str, tuple[Row, ...]], ...]
    others: tuple[Row, ...]

    def _rows(self) -> Iterator[Row]:
        """Every layer that there can be, its names in full."""
        yield from self.others
        for theirs, diffusers, rows in self.stacks:
            for block in range(BLOCKS):
                for row in rows:
                    spelled = (name and f"{theirs}.{block}.{name}" for name in (row.tencent, row.comfyui, row.also))
                    tencent, comfyui, also = spelled
                    layers = tuple(f"{diffusers}.{block}.{layer}" for layer in row.layers)
                    yield Row(tencent, comfyui, layers, row.swapped, also)

    @cached_property
    def targets(self) -> Mapping[str, Target]:
        """By every name that a layer can have in a file, the prefixes of `PREFIXES` aside."""
        targets: dict[str, Target] = {}
        for row in self._rows():
            target = Target(row.layers, row.swapped)
            for name in filter(None, (row.tencent, row.comfyui, row.also)):
                targets[name] = targets[KOHYA + name.replace(".", "_")] = target
            for layer in row.layers:
                own = Target((layer,))
                targets[layer] = own
                for prefix in UNDERSCORED_DIFFUSERS:
                    targets[prefix + layer.replace(".", "_")] = own
        return targets

    def spelled(self, style: Style) -> Mapping[str, tuple[str, Target]]:
        """The name in a style of the layer that one of Diffusers' is, or is rows of; and what that layer is."""
        names: dict[str, tuple[str, Target]] = {}
        for row in self._rows():
            if name := getattr(row, style):
                for layer in row.layers:
                    names[layer] = (name, Target(row.layers, row.swapped))
        return names


HUNYUAN_VIDEO = ParameterNames(
    "HunyuanVideo 1.0",
    3072,
    (
        ("double_blocks", "transformer_blocks", _DOUBLE + _FUSED),
        ("single_blocks", "single_transformer_blocks", _SINGLE),
        _REFINER_STACK,
    ),
    _OTHER + _OTHER_10,
)
HUNYUAN_VIDEO_15 = ParameterNames(
    "HunyuanVideo 1.5",
    2048,
    (("double_blocks", "transformer_blocks", _DOUBLE + _SPLIT), _REFINER_STACK),
    _OTHER + _OTHER_15,
)


def names_of(transformer: nn.Module) -> ParameterNames:
    """The names of a network's layers."""
    return HUNYUAN_VIDEO_15 if hasattr(transformer, "cond_type_embed") else HUNYUAN_VIDEO


def other_than(names: ParameterNames) -> ParameterNames:
    return HUNYUAN_VIDEO if names is HUNYUAN_VIDEO_15 else HUNYUAN_VIDEO_15


def without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def swap_halves(rows: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])
